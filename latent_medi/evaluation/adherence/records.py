"""Results of the adherence stage, as ``metrics.json`` holds them."""

from __future__ import annotations

from dataclasses import dataclass

from latent_medi.statistics.intervals import Estimate

_LEAST_GAIN = 0.1
"""How much more than chance a linear probe finds in real patches, if its finds in synthetic ones mean anything."""


@dataclass(frozen=True, kw_only=True)
class Recovery(Estimate):
    """Share of samples in which a linear probe finds the requested value, 0 to 1.

    Args:
        conditioned: Whether the model was conditioned on the field. If not, its samples are compared with the
            combination's value all the same: their share is what the class alone achieves.
        n_combinations: Combinations in the mean.
    """

    conditioned: bool
    n_combinations: int = 1


@dataclass(frozen=True)
class CombinationRecovery:
    """Recovery of one field in one held-out combination.

    Args:
        name: The combination in words.
        combination: Value by field.
        synthetic: By synthetic set.
        real: Accuracy of the linear probe on real test patches of the combination.
    """

    name: str
    combination: dict[str, str]
    synthetic: dict[str, Recovery]
    real: Estimate


@dataclass(frozen=True)
class FieldRecovery:
    """Recovery of one field over all held-out combinations.

    Args:
        values: Values that the linear probe knows.
        chance: Share that guessing finds.
        synthetic: Mean over the combinations, each weighing the same, by synthetic set.
        real: The same mean of the linear probe's accuracy on real test patches, averaged over patients first. It has an
            interval where every combination has 10 patients.
        combinations: By held-out combination.
        confusion: Shares of requested (row) and found (column) values over all samples, by synthetic set; "real" are
            real test patches.
        converged: Whether the linear probe's optimiser reached its tolerance.
        n_training: Real patches that it was trained on.
    """

    values: list[str]
    chance: float
    synthetic: dict[str, Recovery]
    real: Estimate
    combinations: list[CombinationRecovery]
    confusion: dict[str, list[list[float | None]]]
    converged: bool
    n_training: int

    @property
    def says_nothing(self) -> bool:
        """Whether the linear probe hardly finds the values in real patches, and so says nothing of synthetic ones."""
        return self.real.value is not None and self.real.value - self.chance < _LEAST_GAIN


@dataclass(frozen=True)
class ClassShift:
    """How much the site of a sample changes its class.

    Args:
        value: Mean total variation distance, 0 to 1, of the class predictions at a site from those over all sites, of
            one requested class.
        limit: What 97.5 % of random assignments of sites stay below.
        beyond: Whether the value is above the limit and above the real patches' value.
    """

    value: float
    limit: float
    beyond: bool


@dataclass(frozen=True)
class SourceLeakage:
    """Class and site predictions on the patches of one source.

    Args:
        n: Patches of values that the linear probes know.
        association: Bias-corrected Cramér's V, 0 to 1, of predicted class and predicted site.
        requested_association: Cramér's V of requested class and site (real patches: of the true ones); null without a
            requested site, and then what follows is, too.
        site_found: How often the class is found where the site is found.
        site_missed: How often the class is found where the site is not.
        class_shift: How much the site changes the class.
    """

    n: int
    association: float | None
    requested_association: float | None = None
    site_found: Estimate | None = None
    site_missed: Estimate | None = None
    class_shift: ClassShift | None = None


@dataclass(frozen=True)
class Leakage:
    """Whether the site changes the class.

    Args:
        training_association: Bias-corrected Cramér's V, 0 to 1, of class and site over training patients.
        sources: By synthetic set; "real" are real test patches.
        reason: Why there is nothing.
    """

    training_association: float | None
    sources: dict[str, SourceLeakage]
    reason: str | None = None


@dataclass(frozen=True)
class Adherence:
    """Whether samples show the requested values, in one encoder's features.

    Args:
        fingerprint: The encoder's.
        fields: By field.
        leakage: Whether the site changes the class.
    """

    fingerprint: str
    fields: dict[str, FieldRecovery]
    leakage: Leakage


@dataclass(frozen=True)
class SourceStain:
    """Stain of one source compared with real test patches of the same site or combination.

    Args:
        conditioned: Whether the model was conditioned on the site; true for real patches.
        n: Patches.
        density: Mean decadic optical density of red, green and blue where there is tissue.
        distance: Euclidean distance of that density to the real test patches'.
        angles: Degrees between the haematoxylin and between the eosin vectors (Macenko et al. 2009).
        strength: 99th percentile of either stain's concentration over the real test patches'.
        nearest: Share of patches whose density is nearer to this site's than to another's, 0 to 1.
    """

    conditioned: bool
    n: int
    density: list[float]
    distance: float
    angles: list[float]
    strength: list[float]
    nearest: Estimate


@dataclass(frozen=True)
class CombinationStain:
    """Stain at one site or in one held-out combination.

    Args:
        name: The combination in words.
        combination: Value by field.
        held_out: Whether it is a held-out combination.
        density: Mean decadic optical density of the real test patches.
        sources: By synthetic set; "real" are further real patients.
    """

    name: str
    combination: dict[str, str]
    held_out: bool
    density: list[float]
    sources: dict[str, SourceStain]


@dataclass(frozen=True)
class Stain:
    """Stain of the samples of each site and held-out combination.

    Args:
        combinations: By site, then by held-out combination.
        reason: Why there is nothing.
    """

    combinations: list[CombinationStain]
    reason: str | None = None
