"""What each downstream arm trains on. Every arm that adds patches adds equally many to each held-out cell.

Cheap rivals: ``oversample`` (repeat the class's patches, or weight the cells alike), ``reweight`` (the weights alone),
``stain_augmentation`` (the class's patches with jittered stain), ``stain_transfer`` (mapped to the cell's site),
``nearest_site`` (the class's patches from the site most like the cell's). Each synthetic dataset is an arm under its
name, and twice more: ``synthetic_only_<name>`` learns from as many synthetic patches as the others have patches in
all, and ``pretrain_finetune_<name>`` learns from those first and then from the real ones. ``oracle`` adds real patches
of the held-out cells from other patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.combinations import Combination, describe, matches
from latent_medi.evaluation.cohort.study import Study, SyntheticSet, held_out_with_class
from latent_medi.evaluation.downstream.baselines import (
    Transferred,
    alike_sources,
    nearest_sites,
    stain_augmentation,
    stain_transfer,
)
from latent_medi.features.stain import STAIN_METHODS
from latent_medi.statistics.subsampling import balanced_draw, repeated_draw

log = get_logger(__name__)

JITTER = "jitter"
ONLY, FIRST = "synthetic_only_", "pretrain_finetune_"


@dataclass
class Added:
    """One draw of added patches.

    Args:
        features: [n, d].
        labels: Class value of each, [n].
        distinct: Different patches per cell, in the order of the plan's cells.
    """

    features: np.ndarray
    labels: np.ndarray
    distinct: list[int]


@dataclass
class Lesson:
    """What one classifier learns from.

    Args:
        features: [n, d].
        labels: Class value of each, [n].
        weights: Weight of each row, mean 1, [n]; None weights classes alike.
        first: Features and labels to learn from before these; None starts afresh.
        distinct: Different added patches per held-out cell.
        n_synthetic: Rows, of both parts, that a model has made.
    """

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    first: tuple[np.ndarray, np.ndarray] | None = None
    distinct: list[int] = field(default_factory=list)
    n_synthetic: int = 0


@dataclass
class Plan:
    """How many patches each held-out cell gets, the same for every arm.

    Args:
        cells: Held-out cells, each with a class.
        counts: Patches per cell.
        transferred: Stain-transferred patches per cell; None where no stain can be imitated.
        augmented: Stain-augmented patches per cell; None where the class has no training patch.
        unavailable: Reason by arm that cannot take part.
    """

    cells: list[Combination]
    counts: list[int]
    transferred: list[Transferred | None] = field(default_factory=list)
    augmented: list[Transferred | None] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def made(self, embed: Callable[[np.ndarray], np.ndarray]) -> dict[str, list[np.ndarray | None]]:
        """Features of the patches that the rivals made of real ones, per method and cell.

        Args:
            embed: Gives features [n, d] of uint8 patches [n, H, W, 3].
        """
        groups = [(m, self.transferred) for m in STAIN_METHODS] + [(JITTER, self.augmented)]
        return {str(m): [None if t is None else embed(t.images[m]) for t in cells] for m, cells in groups}


def make_plan(study: Study, added_per_cell: int, seed: int, stain_jitter: float = 0.2) -> Plan:
    """Fix cells, counts and the stain-transferred and stain-augmented patches, which are made and embedded once."""
    cells = held_out_with_class(study)
    table = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str)
    typical = int(table.value_counts().median())
    counts = []
    for cell in cells:
        available = [len(arm_rows(arm, cell)) for arm in study.synthetic.values() if _knows(arm, cell)]
        counts.append(added_per_cell or min([typical, *(a for a in available if a)]))
    plan = Plan(cells, counts)
    # A half more than needed, so that the draws of different seeds differ.
    asked = [(c, n + n // 2, seed + i) for i, (c, n) in enumerate(zip(cells, counts, strict=True))]
    plan.transferred = [stain_transfer(study, *a) for a in asked]
    plan.augmented = [stain_augmentation(study, *a, stain_jitter) for a in asked]
    for arm in study.synthetic.values():
        for cell, n in zip(cells, counts, strict=True):
            here = len(arm_rows(arm, cell))
            if here == 0:
                plan.unavailable[arm.name] = f"it has no sample for {describe(cell)}"
            elif here < n:
                log.warning("Arm %s has %d samples for %s and repeats them to %d.", arm.name, here, describe(cell), n)
        lacking = sorted(set(table[study.class_field]) - set(arm.index[study.class_field].astype(str)))
        for name in (ONLY + arm.name, FIRST + arm.name):
            if arm.name in plan.unavailable:
                plan.unavailable[name] = plan.unavailable[arm.name]
            elif lacking:
                plan.unavailable[name] = f"{arm.name} has no sample of {', '.join(lacking)}"
    if study.oracle_reason:
        plan.unavailable["oracle"] = study.oracle_reason
    else:
        for cell in cells:
            if not study.having(cell)[study.probe].any():
                plan.unavailable["oracle"] = f"no probe patient has {describe(cell)}"
    if not any(plan.transferred):
        plan.unavailable["stain_transfer"] = "no held-out cell names a site whose stain is known from training patches"
    if not any(plan.augmented):
        plan.unavailable["stain_augmentation"] = "no class of a held-out cell has a training patch"
    return plan


def _knows(arm: SyntheticSet, cell: Combination) -> bool:
    return all(k in arm.fields for k in cell)


def arm_rows(arm: SyntheticSet, cell: Mapping[str, str]) -> np.ndarray:
    """Positions of an arm's samples that have those values of a cell that its model was given."""
    return np.flatnonzero(matches(arm.index, {k: v for k, v in cell.items() if k in arm.fields}))


def arm_variants(generators: Iterable[str]) -> dict[str, list[str]]:
    """Every downstream arm with its variants, given the names of the synthetic datasets."""
    names = list(generators)
    return {
        "real": ["real"],
        "oversample": ["duplicate", "balance"],
        "reweight": ["balance"],
        "stain_augmentation": [JITTER],
        "stain_transfer": list(STAIN_METHODS),
        "nearest_site": ["nearest_site"],
        **{name: [name] for name in names},
        **{prefix + name: [prefix + name] for prefix in (ONLY, FIRST) for name in names},
        "oracle": ["oracle"],
    }


class Drawer:
    """Draws what each arm trains on.

    Args:
        study: The cohort.
        plan: Cells and counts.
        real: Features of every real row, [N, d].
        arms: Features of every row of each synthetic dataset.
        transferred: Features of the patches that rivals made, per method and cell; see :meth:`Plan.made`.
        nearest: Per cell the site most like its own, if known already; found from ``real`` otherwise.

    Attributes:
        unavailable: Reason by arm that cannot take part.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        real: np.ndarray,
        arms: Mapping[str, np.ndarray],
        transferred: Mapping[str, Sequence[np.ndarray | None]],
        nearest: Sequence[str | None] | None = None,
    ) -> None:
        self.study, self.plan, self.real, self.arms, self.transferred = study, plan, real, arms, transferred
        self.nearest = list(nearest) if nearest is not None else nearest_sites(study, plan.cells, real)
        self.unavailable = dict(plan.unavailable)
        if JITTER not in transferred:
            self.unavailable["stain_augmentation"] = "no patch with jittered stain was made"
        if not any(self.nearest):
            self.unavailable["nearest_site"] = "no site with the class shares a class with the site of a held-out cell"
        self._seen = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str).value_counts()

    def variants(self) -> dict[str, list[str]]:
        """Variants of each arm that can take part; of several, the best is headlined."""
        return {a: v for a, v in arm_variants(self.study.synthetic).items() if a not in self.unavailable}

    def lesson(self, arm: str, variant: str, seed: int) -> Lesson:
        """What an arm's classifier learns from, with one seed."""
        study = self.study
        real = self.real[study.train]
        labels = study.class_labels[study.train]
        for prefix in (ONLY, FIRST):
            if arm.startswith(prefix) and arm.removeprefix(prefix) in study.synthetic:
                made = self.whole(arm.removeprefix(prefix), seed)
                if prefix == ONLY:
                    return Lesson(made.features, made.labels, None, None, made.distinct, len(made.labels))
                return Lesson(real, labels, None, (made.features, made.labels), made.distinct, len(made.labels))
        added = self.draw(arm, variant, seed)
        return Lesson(
            np.concatenate([real, added.features]),
            np.concatenate([labels, added.labels]),
            balancing_weights(study) if variant == "balance" else None,
            None,
            added.distinct,
            len(added.labels) if arm in study.synthetic else 0,
        )

    def whole(self, name: str, seed: int) -> Added:
        """A synthetic training set of the same size and mix as real and added patches together.

        Each class × site cell gets as many samples as it has training patches; where the arm has none for the site,
        samples of the class. The held-out cells get what every arm adds to them. Samples repeat only when a cell has
        used all that it has.
        """
        study, arm = self.study, self.study.synthetic[name]
        rng = np.random.default_rng([seed, 19])
        added = self.draw(name, name, seed)
        rows, labels = [], []
        for (value, site), n in sorted(self._seen.items()):
            pool = arm_rows(arm, {study.class_field: value, study.site_field: site})
            if not len(pool):
                pool = arm_rows(arm, {study.class_field: value})
            rows.append(repeated_draw(pool, int(n), rng))
            labels.append(np.full(len(rows[-1]), value))
        return Added(
            np.concatenate([self.arms[name][np.concatenate(rows)], added.features]),
            np.concatenate([*labels, added.labels]),
            added.distinct,
        )

    def draw(self, arm: str, variant: str, seed: int) -> Added:
        """The patches that an arm adds to the held-out cells, with one seed."""
        rng = np.random.default_rng([seed, 5])
        taken: dict[str, set[int]] = {}
        parts, labels, distinct = [np.zeros((0, self.real.shape[1]))], [np.zeros(0, str)], []
        for i, (cell, n) in enumerate(zip(self.plan.cells, self.plan.counts, strict=True)):
            value = cell[self.study.class_field]
            source, rows = self._rows(arm, variant, i, n, rng, taken.setdefault(value, set()))
            parts.append(source[rows])
            labels.append(np.full(len(rows), value))
            distinct.append(len(np.unique(rows)))
        return Added(np.concatenate(parts), np.concatenate(labels), distinct)

    def _rows(
        self, arm: str, variant: str, i: int, n: int, rng: np.random.Generator, taken: set[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        study, cell = self.study, self.plan.cells[i]
        if arm in ("real",) or variant == "balance":
            return self.real, np.zeros(0, int)
        if arm == "oracle":
            return self.real, repeated_draw(study.rows_of(study.probe, cell), n, rng)
        if arm in ("stain_transfer", "stain_augmentation") and (features := self.transferred[variant][i]) is not None:
            return features, repeated_draw(np.arange(len(features)), n, rng)
        if arm == "nearest_site" and (site := self.nearest[i]) is not None:
            return self.real, repeated_draw(alike_sources(study, cell, site), n, rng)
        if arm in ("oversample", "stain_transfer", "stain_augmentation", "nearest_site"):
            own = study.rows_of(study.train, {study.class_field: cell[study.class_field]})
            sites = study.site_labels[own]
            return self.real, own[balanced_draw(sites, n, rng)] if len(own) else own
        rows = arm_rows(study.synthetic[arm], cell)
        # An arm that knows only the class serves all cells of a class from one pool: without repeats while it lasts.
        fresh = np.array([r for r in rows if r not in taken], dtype=int)
        rows = repeated_draw(fresh if len(fresh) >= n else rows, n, rng)
        taken.update(rows.tolist())
        return self.arms[arm], rows


def balancing_weights(study: Study) -> np.ndarray:
    """Weight of each training row that makes all seen class × site cells count the same; mean 1."""
    cell = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str).agg("|".join, axis=1)
    weights = 1.0 / cell.map(cell.value_counts()).to_numpy(float)
    return weights * len(weights) / weights.sum()
