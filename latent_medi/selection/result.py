"""What a selection found: counts per combination, thresholds, linear probes, diversity; and its text on the screen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.records import encode
from latent_medi.statistics.linear_probe import ValidatedLinearProbe
from latent_medi.statistics.neighbours import nearest_cosine_distance


@dataclass(kw_only=True)
class Counts:
    """Numbers of patches.

    Args:
        asked: All patches, which a plan asked for.
        passed_*: Patches that pass a filter; None if the filter is not applied.
        accepted: Patches that pass all filters.
        chosen: Patches that are chosen.
        control: Patches of the random control; None without one.
        acceptance: Share accepted, 0 to 1.
    """

    asked: int
    passed_centroid: int | None = None
    passed_confidence: int | None = None
    passed_outliers: int | None = None
    passed_copies: int | None = None
    passed_duplicates: int | None = None
    accepted: int
    chosen: int
    control: int | None = None
    acceptance: float


@dataclass(kw_only=True)
class CombinationCounts(Counts):
    """Numbers of patches of one combination.

    Args:
        cell: The combination, value by field.
        unseen: Whether no real training patch has it.
        wanted: Patches that the settings ask for; None if they name no number.
    """

    cell: dict[str, str]
    unseen: bool
    wanted: int | None = None

    @property
    def missing(self) -> int:
        """Patches that are wanted and not chosen."""
        return max(0, (self.wanted or 0) - self.chosen)


@dataclass
class ProbeReport:
    """The linear probe of one field.

    Args:
        accuracy: On patients that it did not learn from, 0 to 1.
        chance: Accuracy of guessing.
        regularisation: C.
        n_patches, n_patients: Training patches and their patients.
        converged: Whether every optimisation reached its tolerance.
    """

    accuracy: float
    chance: float
    regularisation: float
    n_patches: int
    n_patients: int
    converged: bool

    @classmethod
    def of(cls, probe: ValidatedLinearProbe) -> ProbeReport:
        """The report of a fitted linear probe."""
        chance = 1 / len(probe.values)
        return cls(probe.accuracy, chance, probe.regularisation, probe.n_patches, probe.n_patients, probe.converged)


@dataclass
class Diversity:
    """How different the patches of a combination are, averaged over the combinations that have two.

    Args:
        pairwise: Mean cosine distance of two patches, which does not depend on their number.
        nearest: Mean cosine distance to the nearest other patch. It falls as their number grows, so it is compared
            between the choice and its control, which have as many.
        n_cells: Combinations with two patches.
        n: Patches.
    """

    pairwise: float | None
    nearest: float | None
    n_cells: int
    n: int


@dataclass
class Result:
    """What is recorded of a selection in its dataset.

    Args:
        thresholds: Cosine distances by filter.
        probes: Linear probes by field.
        warnings: What a reader must know.
        exact_copies: Patches whose pixels are those of a real one; None without the filter "copies".
        distance_ratio: Kernel distance of all patches to real training patches, over that between real patches; None if
            it is unknown.
        cells: Counts of each combination.
        total: Their sums.
        diversity: Of the "chosen", the "control" and "all" patches.
    """

    cells: list[CombinationCounts]
    total: Counts
    thresholds: dict[str, float | None] = field(default_factory=dict)
    probes: dict[str, ProbeReport] = field(default_factory=dict)
    diversity: dict[str, Diversity] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    exact_copies: int | None = None
    distance_ratio: float | None = None


@dataclass
class Selection:
    """A selection of a dataset.

    Args:
        folder: The dataset folder.
        name: Name of the selection.
        column: Column of the index that holds it.
        finished: Whether an earlier run had made it.
        result: What it found.
        recipe: All that it depends on.
    """

    folder: str
    name: str
    column: str
    finished: bool
    result: Result
    recipe: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The selection as one JSON object."""
        about = {"folder": self.folder, "name": self.name, "column": self.column, "finished": self.finished}
        return {**about, **encode(self.result), "recipe": self.recipe}


def diversity(features: np.ndarray, combinations: np.ndarray, mask: np.ndarray, device: str) -> Diversity:
    """Diversity of the patches in ``mask``.

    Args:
        features: L2-normalised, [N, d].
        combinations: Code of each row's combination, [N].
        mask: Rows that count, bool [N].
        device: Torch device of the products.
    """
    pairwise, closest = [], []
    for code in np.unique(combinations[mask]):
        own = features[mask & (combinations == code)]
        n = len(own)
        if n < 2:
            continue
        total = own.sum(axis=0, dtype=np.float64)
        # Σ over pairs of 1 − cos, from the length of the sum of unit vectors.
        pairwise.append(1.0 - (total @ total - (own.astype(np.float64) ** 2).sum()) / (n * (n - 1)))
        itself = np.arange(n)
        closest.append(float(nearest_cosine_distance(own, own, [(itself, itself)], device).mean()))
    means = [float(np.mean(values)) if values else None for values in (pairwise, closest)]
    return Diversity(means[0], means[1], len(pairwise), int(mask.sum()))


def selection_text(selection: Selection, rows: int = 24) -> str:
    """One screen: patches asked for, accepted and chosen in the combinations with the lowest acceptance, and in all."""
    result = selection.result
    cells = sorted(result.cells, key=lambda c: (c.acceptance, *c.cell.values()))
    keys = [key for key in encode(result.total) if key != "acceptance"]
    names = [" × ".join(c.cell.values()) + (" (unseen)" if c.unseen else "") for c in cells[:rows]]
    counts = [
        {**{k: getattr(c, k) for k in keys}, "acceptance": f"{c.acceptance:.0%}"} for c in [*cells[:rows], result.total]
    ]
    table = pd.DataFrame(counts, index=[*names, "all cells"]).rename(
        columns=lambda key: key.replace("passed_", "passed ")
    )
    text = table.to_string().splitlines()
    if len(cells) > rows:
        text.insert(-1, f"… and {len(cells) - rows} cells with higher acceptance")
    for name, probe in result.probes.items():
        text.append(
            f"linear probe of {name}: {probe.accuracy:.0%} of held-out patients' patches classified correctly "
            f"({probe.chance:.0%} is chance)"
        )
    if result.distance_ratio is not None:
        text.append(f"distance to real patches: {result.distance_ratio:.2f} of the largest between real patches")
    for name, values in result.diversity.items():
        if values.pairwise is not None:
            text.append(f"diversity, {name}: pairwise {values.pairwise:.3g}, nearest {values.nearest:.3g}")
    state = "kept from an earlier run" if selection.finished else "written"
    text.append(f"{state}: column {selection.column!r} of {selection.folder}")
    return "\n".join(text)
