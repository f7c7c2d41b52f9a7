"""Results of the fidelity stage, as ``metrics.json`` holds them. Sources are "real", further real patients, and each
synthetic set by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from latent_medi.statistics.intervals import Estimate

TRAINING_IMAGES = (
    "Distances to the images that the models were trained on, as published: a generator that copies them is best, even "
    "below 0. They say how well a model fits its training patients, not how it does on others."
)
"""What must stand with every distance to training images."""


@dataclass(frozen=True, kw_only=True)
class Distance(Estimate):
    """Kernel distance (KID) of one source to the reference in one combination: about 0 for other real patients.

    Args:
        fd: Fréchet distance; null where the source or the reference has fewer than two patches per dimension.
        fd_pca: Fréchet distance after projection to ``pca_dims`` principal components; null where the source has fewer
            than four patches per dimension.
        mix_mismatch: Share of the source's patches in another stratum than the reference's mix asks for, 0 to 1.
        fd_raw: Rank-deficient Fréchet distance, with ``protocol: paper``.
        fd_raw_label: What ``fd_raw`` may be compared with.
        unmatched_fields: Fields whose values in the reference no sample can have, such as the site of patients of other
            hospitals; in these the samples have values that training patches of their class have.
    """

    fd: float | None
    fd_pca: float | None
    mix_mismatch: float
    fd_raw: float | None = None
    fd_raw_label: str | None = None
    unmatched_fields: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MeanDistance(Estimate):
    """Mean of a source's kernel distances over the combinations that it has.

    Args:
        n_combinations: Combinations in the mean.
        n_reference: Patches of the reference in all of them.
        fd: Mean Fréchet distance; null if any is.
        fd_pca: Mean Fréchet distance after projection; null if any is.
        fd_raw: Mean Fréchet distance with rank-deficient ones among them, with ``protocol: paper``; null without any.
    """

    n_combinations: int
    n_reference: int
    fd: float | None
    fd_pca: float | None
    fd_raw: float | None = None


@dataclass(frozen=True)
class CombinationDistances:
    """Distances of each source to one combination's real patches.

    Args:
        combination: Value by field; empty for all patches.
        name: The combination in words.
        n_reference: Real patches of the reference.
        n_patients: Their patients.
        sources: Distance by source.
        skipped: Why a source has no distance; the key "" stands for all.
    """

    combination: dict[str, str]
    name: str
    n_reference: int
    n_patients: int
    sources: dict[str, Distance]
    skipped: dict[str, str]


@dataclass(frozen=True)
class FrechetRatio:
    """(candidate − real) / (baseline − real) of Fréchet distances at one number of patches. It has no interval.

    The distance between real patients is not what a perfect generator reaches, whose samples are each of a patient of
    their own: compare ``value`` with ``perfect``.

    Args:
        value: The ratio; null if there is none.
        perfect: Mean ratio of a perfect generator, in simulated studies of as many patients and patches, with Gaussian
            features of the real patches' covariance between and within patients.
        perfect_error: Standard error of that mean, of the simulation alone.
        dims: Principal components that distances are taken in.
        n: Patches of each source in all combinations.
        n_combinations: Combinations that the ratio is over.
        reason: Why there is none.
    """

    value: float | None
    perfect: float | None
    perfect_error: float | None
    dims: int
    n: int
    n_combinations: int
    reason: str | None = None


@dataclass(frozen=True)
class DistanceTable:
    """Distances in each of some combinations, and their means.

    Args:
        dim: Dimensions of the features.
        pca_dims: Dimensions that ``fd_pca`` is taken in: a quarter of the real patches of the smallest combination.
        combinations: Distances by combination.
        means: Mean distance by source.
        ratio: Kernel distance of the candidate as a share of the baseline's, over the combinations that both have: 0 is
            as near as real patients, 1 no nearer than the baseline; below 0 is chance.
        frechet_ratio: The same from Fréchet distances, with the one between real patients subtracted from both.
        left_out: Why a combination, or a source of it, is not compared, by the combination's name.
    """

    dim: int
    pca_dims: int
    combinations: list[CombinationDistances]
    means: dict[str, MeanDistance]
    ratio: Estimate
    frechet_ratio: FrechetRatio
    left_out: dict[str, str]


@dataclass(frozen=True)
class Neighbourhoods:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        precision, recall, density, coverage: The four measures; null with fewer than k + 1 patches.
        n: Patches of either set.
        k: Neighbours.
        coverage_lowest: Coverage of the class that is covered least, of those with 20 patches.
    """

    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    n: int
    k: int
    coverage_lowest: float | None = None


@dataclass(frozen=True, kw_only=True)
class OverallFidelity(Neighbourhoods):
    """Measures of one source over all combinations together.

    Args:
        fd_infinity: Fréchet distance for infinitely many samples (Chong and Forsyth 2020).
        fd_infinity_error: Its standard error.
        n_patients: Patients of the reference, or of the source if these are fewer.
        mix_mismatch: Share of the source's patches in another stratum than the reference's mix asks for, 0 to 1.
    """

    fd_infinity: float | None
    fd_infinity_error: float | None
    n_patients: int
    mix_mismatch: float


@dataclass(frozen=True)
class InRealRange:
    """A measure of a synthetic set, and the range of the same measure between real patients.

    Args:
        value: The measure.
        real: Median over random splits of real patients.
        range: Central 95 % of these.
        worse: Whether the value is outside the range on the bad side.
    """

    value: float
    real: float
    range: tuple[float, float]
    worse: bool


@dataclass(frozen=True)
class RealSplitRange:
    """Measures of each synthetic set, compared with random splits of real patients.

    Args:
        synthetic: By synthetic set and measure.
        skipped: Why a set is missing.
        reason: Why there is nothing.
        n: Patches of each set.
        n_reference: Patches of the reference.
        n_patients: Patients of the reference and of the further real patches.
        fd_dims: Dimensions that the Fréchet distance is taken in.
    """

    synthetic: dict[str, dict[str, InRealRange]]
    skipped: dict[str, str]
    reason: str | None = None
    n: int | None = None
    n_reference: int | None = None
    n_patients: tuple[int, int] | None = None
    fd_dims: int | None = None


@dataclass(frozen=True)
class TissueDistance:
    """Whether samples are nearer to real patches of the held-out combinations than real patches of others are.

    Args:
        value: Kernel distance of the samples to real test patches of these combinations, mean over them.
        other_combinations: The same of the real training patches, which are of other combinations.
        n_combinations: Combinations in the mean: those that the set has samples of.
    """

    value: float
    other_combinations: float
    n_combinations: int


@dataclass(frozen=True)
class TrainingDistances:
    """Distances to the images that models were trained on. Of each class, its samples have these images' mix of the
    other fields; "real" are test patients, as far as they can have it.

    Args:
        per_class: Distances in each class.
        by_fields: Distances in each class at each site, and in each combination of further fields, by their names.
        label: What to think of these numbers.
    """

    per_class: DistanceTable
    by_fields: dict[str, DistanceTable]
    label: str = TRAINING_IMAGES


@dataclass(frozen=True)
class Fidelity:
    """How far each source is from real test patches in one encoder's features.

    Args:
        fingerprint: The encoder's.
        unseen: Distances in each held-out combination.
        per_class: Distances in each class.
        per_site: Distances at each site.
        by_fields: Distances in each combination of further fields, by the fields' names.
        whole: Distance over all patches together.
        overall: Further measures over all patches together, by source.
        tissue: Whether samples are nearer than real patches of other combinations, by synthetic set; without those that
            cannot be compared.
        real_splits: Measures of synthetic sets, compared with random splits of real patients.
        training: Distances to the training images; null unless ``references`` names them.
    """

    fingerprint: str
    unseen: DistanceTable
    per_class: DistanceTable
    per_site: DistanceTable
    by_fields: dict[str, DistanceTable]
    whole: DistanceTable
    overall: dict[str, OverallFidelity]
    tissue: dict[str, TissueDistance]
    real_splits: RealSplitRange | None = None
    training: TrainingDistances | None = None


@dataclass(frozen=True)
class ListedPair:
    """A synthetic patch and the training patch that it is most like.

    Args:
        synthetic_key: Key of the synthetic patch.
        train_row: Row of the training patch in the real dataset's index.
        patient: "patient N", the place among the sorted patients; or the name, with ``patient_names``.
        likeness: Correlation of the two, −1 to 1.
        view: How the synthetic patch is turned or mirrored.
        copy: Whether it counts as a copy.
        train_key: Key of the training patch, with ``patient_names``.
    """

    synthetic_key: str
    train_row: int
    patient: str
    likeness: float
    view: str
    copy: bool
    train_key: str | None = None


@dataclass(frozen=True)
class CombinationCopies:
    """How near the samples of one combination are to training and to held-out patients.

    Args:
        name: The combination in words.
        combination: Value by field.
        n: Samples.
        copies: Those that count as copies.
        median_train, median_held_out: Median distance to the nearest patch of training, or held-out, patients.
        nearer_train: Share of samples that are nearer to training patients, 0 to 1.
        n_bank: Real patches of either kind; 0 where there are too few.
    """

    name: str
    combination: dict[str, str]
    n: int
    copies: int
    median_train: float | None
    median_held_out: float | None
    nearer_train: float | None
    n_bank: int


@dataclass(frozen=True)
class CopyTest:
    """C_T (Meehan et al. 2020).

    Args:
        value: z-score; below −3 speaks for copying.
        n_patches: Samples.
        left_out: Samples in clusters with too few patches.
    """

    value: float | None
    n_patches: int
    left_out: int


@dataclass(frozen=True)
class SetMemorisation:
    """Copies among the samples of one synthetic set.

    Args:
        copies: Samples that count as copies.
        copy_rate: Their share, 0 to 1.
        auth_pct: AuthPct, percent (Alaa et al. 2022).
        ct: C_T.
        combinations: By class and site, as far as the model was conditioned on them.
        listed: Every copy, and the pairs most alike.
    """

    copies: int
    copy_rate: Estimate
    auth_pct: Estimate
    ct: CopyTest
    combinations: list[CombinationCopies]
    listed: list[ListedPair]


@dataclass(frozen=True)
class Memorisation:
    """Whether synthetic sets repeat training patches, in one encoder's features.

    Args:
        fingerprint: The encoder's.
        rule: What counts as a copy.
        threshold: Correlation above which a patch is a copy.
        threshold_patches: Real patches that the threshold comes from.
        real_duplicates: Real patches that show the same picture as a training patch, by part; they count nowhere.
        held_out_flagged: Share of held-out real patches that the rule calls copies, 0 to 1.
        held_out_auth_pct: AuthPct of held-out real patches, percent.
        synthetic: By synthetic set.
    """

    fingerprint: str
    rule: str
    threshold: float
    threshold_patches: int
    real_duplicates: dict[str, int]
    held_out_flagged: Estimate
    held_out_auth_pct: Estimate
    synthetic: dict[str, SetMemorisation]


@dataclass(frozen=True)
class ProjectedPoints:
    """Points of one source.

    Args:
        n: Patches of the source.
        x, y: Coordinates of some of them.
        class_codes: Class of each point, an index of ``classes``; −1 for none.
        site_codes: Site of each point, an index of ``sites``; −1 for none.
    """

    n: int
    x: list[float]
    y: list[float]
    class_codes: list[int]
    site_codes: list[int]


TSNE_METHOD = "t-SNE of the points shown"


@dataclass(frozen=True)
class Projection:
    """Real test patches and samples in a plane.

    Args:
        fingerprint: The encoder's.
        method: How the plane was chosen.
        n_fitted: Patches that chose it: real training patches, or the points shown.
        explained: Share of their variance on each axis, 0 to 1; null for t-SNE.
        classes: Classes that codes point to.
        sites: Sites that codes point to.
        sources: Points by source; "real" are real test patches.
    """

    fingerprint: str
    method: str
    n_fitted: int
    explained: list[float | None]
    classes: list[str]
    sites: list[str]
    sources: dict[str, ProjectedPoints] = field(default_factory=dict)

    @property
    def by_tsne(self) -> bool:
        """Whether axes and distances between groups mean nothing."""
        return self.method == TSNE_METHOD
