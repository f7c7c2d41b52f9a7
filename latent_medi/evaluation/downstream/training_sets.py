"""Training sets of the downstream classifiers: real training patches, and patches added to held-out combinations.

Every training set adds equally many patches to each held-out combination. Which ones there are, and the role of each,
is the table in :mod:`latent_medi.evaluation.downstream.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, matches
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.statistics.differences import pool_factor
from latent_medi.statistics.subsampling import balanced_draw, repeated_draw

DerivedFeatures = dict[str, dict[str, list[np.ndarray | None]]]
"""Features [n, d] of derived patches, by training set, variant and combination."""


@dataclass
class TrainingSet:
    """What one classifier is trained on.

    Args:
        features: [n, d].
        labels: Class value of each row, [n].
        weights: Weight of each row, mean 1, [n]; None weights classes equally.
        pretraining: Features and labels to train on before these; None trains from scratch.
        distinct: Number of different added patches, by held-out combination.
        n_synthetic: Number of synthetic rows in both parts.
        pool: See :func:`~latent_medi.statistics.differences.pool_factor`, the largest of all combinations; None where
            nothing is drawn at random.
    """

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    pretraining: tuple[np.ndarray, np.ndarray] | None = None
    distinct: list[int] = field(default_factory=list)
    n_synthetic: int = 0
    pool: float | None = None

    @property
    def size(self) -> int:
        """Number of rows in both parts."""
        return len(self.labels) + (len(self.pretraining[1]) if self.pretraining else 0)


@dataclass(frozen=True)
class ProtocolSources:
    """What a published protocol builds its training sets from.

    Args:
        study: The cohort.
        fingerprint: The encoder's.
        real: Features of every real row, [N, d]; for a network on pixels the rows' places, as ``PatchPools`` has them.
        synthetic: The same of every sample of each synthetic set.
    """

    study: Study
    fingerprint: str
    real: np.ndarray
    synthetic: Mapping[str, np.ndarray]


@dataclass
class DerivedPatches:
    """Patches computed from real training patches, such as the same tissue in another stain.

    Args:
        images: By variant, uint8 [n, H, W, 3].
        rows: Real row that each patch was computed from, [n].
        population: Number of patches that could have been computed; infinite where chance changes each.
    """

    images: dict[str, np.ndarray]
    rows: np.ndarray
    population: float


@dataclass
class Additions:
    """How many patches every training set adds to each held-out combination.

    Args:
        combinations: Held-out combinations, each with a class.
        counts: Patches to add, by combination.
        derived: By training set, the patches that were computed for each combination; None where that is impossible.
    """

    combinations: list[Combination]
    counts: list[int]
    derived: dict[str, list[DerivedPatches | None]] = field(default_factory=dict)

    def derived_features(self, embed: Callable[[np.ndarray], np.ndarray]) -> DerivedFeatures:
        """Features of the derived patches, by training set, variant and combination.

        Args:
            embed: Gives features [n, d] of uint8 patches [n, H, W, 3].
        """
        found: DerivedFeatures = {}
        for name, parts in self.derived.items():
            variants = dict.fromkeys(variant for part in parts if part for variant in part.images)
            found[name] = {v: [embed(part.images[v]) if part else None for part in parts] for v in variants}
        return found


@dataclass
class Request:
    """Patches that one held-out combination needs.

    Args:
        number: Position of the combination in :class:`Additions`; −1 for a cell of the training patches.
        combination: Its values.
        n: Number of patches.
        rng: Source of every random choice.
        used: Rows that other combinations of the same class have taken from this training set's pool.
    """

    number: int
    combination: Combination
    n: int
    rng: np.random.Generator
    used: set[int]


@dataclass
class Sources:
    """The patches that training sets are made of.

    Args:
        study: The cohort.
        additions: Held-out combinations and patches to add.
        real: Features of every real row, [N, d].
        synthetic: Features of every row of each synthetic set.
        derived: Features of the derived patches; see :meth:`Additions.derived_features`.
        nearest_sites: By combination the most similar site; None where there is none.
        further_seeds: Features of the study's further synthetic sets, of the same model with other training seeds.
    """

    study: Study
    additions: Additions
    real: np.ndarray
    synthetic: Mapping[str, np.ndarray]
    derived: DerivedFeatures
    nearest_sites: Sequence[str | None]
    further_seeds: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    def training_seeds(self, name: str) -> int:
        """Number of training seeds of a synthetic set; 1 for an empty name."""
        return 1 + len(self.further_seeds.get(name, ()))

    def of_seed(self, name: str, number: int) -> Sources:
        """The same with the samples of one training seed, counted from 0, in the place of a synthetic set's."""
        if number == 0:
            return self
        samples = self.study.further_seeds[name][number - 1]
        study = replace(self.study, synthetic={**self.study.synthetic, name: samples})
        return replace(self, study=study, synthetic={**self.synthetic, name: self.further_seeds[name][number - 1]})

    @property
    def labels(self) -> np.ndarray:
        """Class value of each real training patch."""
        return np.asarray(self.study.class_labels[self.study.train])


@dataclass(frozen=True)
class Drawn:
    """Patches drawn for one combination.

    Args:
        features: Of a pool of patches, [n, d].
        rows: The rows drawn.
        pool: See :func:`~latent_medi.statistics.differences.pool_factor`; 0 where the pool is all there is, as are the
            training patches, or the patches of the probe patients.
    """

    features: np.ndarray
    rows: np.ndarray
    pool: float = 0.0


@dataclass(frozen=True)
class Added:
    """Patches drawn for all combinations.

    Args:
        features: [n, d].
        labels: Class value of each, [n].
        distinct: Number of different ones by combination.
        pool: The largest of all draws.
    """

    features: np.ndarray
    labels: np.ndarray
    distinct: list[int]
    pool: float


Draw = Callable[[Sources, Request], Drawn | None]
"""Draws what a training set adds to one combination; None stands for real patches of its class."""
Build = Callable[[Sources, str, int], TrainingSet]
"""Builds a training set from the sources, the name of a synthetic set (or "") and a seed."""


@dataclass(frozen=True)
class Add:
    """A :data:`Build` that adds drawn patches to the real training patches.

    Args:
        draw: Draws them.
    """

    draw: Draw

    def __call__(self, sources: Sources, synthetic: str, seed: int) -> TrainingSet:
        """The real training patches and the drawn ones."""
        return _with_real(sources, _drawn(sources, self.draw, seed))


def real_alone(sources: Sources, synthetic: str, seed: int) -> TrainingSet:
    """The real training patches alone."""
    rows = sources.study.train
    return TrainingSet(sources.real[rows], sources.labels, distinct=[0] * len(sources.additions.counts))


def balanced(sources: Sources, synthetic: str, seed: int) -> TrainingSet:
    """The real training patches, weighted so that all class × site cells with a patch count the same."""
    result = real_alone(sources, synthetic, seed)
    result.weights = balancing_weights(sources.study)
    return result


def with_synthetic(sources: Sources, synthetic: str, seed: int) -> TrainingSet:
    """The real training patches and patches of a synthetic set."""
    result = _with_real(sources, _drawn(sources, draw_synthetic(synthetic), seed))
    result.n_synthetic = len(result.labels) - len(sources.study.train)
    return result


def synthetic_alone(sources: Sources, synthetic: str, seed: int) -> TrainingSet:
    """Synthetic patches in the number and mix of :func:`with_synthetic`.

    Each class × site cell gets as many samples as it has real training patches, from samples of the class where the
    set has none of the site. The held-out combinations get what every training set adds to them. Samples repeat only
    after all of a pool's samples are used, whether by one cell or by several.
    """
    study, samples = sources.study, sources.study.synthetic[synthetic]
    rng = np.random.default_rng([seed, 19])
    draw = draw_synthetic(synthetic)
    used: dict[str, set[int]] = {}
    added = _drawn(sources, draw, seed, used)
    cells = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str).value_counts()
    parts, labels, factors = [], [], [added.pool]
    drawn_for = list(sources.additions.combinations)
    for (value, site), n in sorted(cells.items()):
        cell = {study.class_field: value, study.site_field: site}
        if not len(synthetic_rows(samples, cell)):
            cell = {study.class_field: value}
        found = draw(sources, Request(-1, cell, int(n), rng, used.setdefault(value, set())))
        parts.append(found.features[found.rows])
        labels.append(np.full(len(found.rows), value))
        factors.append(found.pool)
        drawn_for.append(cell)
    # A later draw may have taken from the pool of an earlier one.
    for combination in drawn_for:
        pool = synthetic_rows(samples, combination)
        taken = used.get(combination[study.class_field], set()).intersection(pool.tolist())
        factors.append(pool_factor(len(taken), len(pool)))
    features, every = np.concatenate([*parts, added.features]), np.concatenate([*labels, added.labels])
    return TrainingSet(features, every, distinct=added.distinct, n_synthetic=len(every), pool=max(factors))


def pretrained_on_synthetic(sources: Sources, synthetic: str, seed: int) -> TrainingSet:
    """The patches of :func:`synthetic_alone` for pre-training, then the real training patches."""
    first = synthetic_alone(sources, synthetic, seed)
    real = sources.real[sources.study.train]
    return replace(first, features=real, labels=sources.labels, pretraining=(first.features, first.labels))


WITHOUT_DRAW: tuple[Build, ...] = (real_alone, balanced)
"""What is the same with every seed."""


def draw_synthetic(name: str) -> Callable[[Sources, Request], Drawn]:
    """A :data:`Draw` from a synthetic set.

    A set that is conditioned on the class alone serves all combinations of a class from one pool, without repeats while
    it lasts.
    """

    def draw(sources: Sources, request: Request) -> Drawn:
        pool = synthetic_rows(sources.study.synthetic[name], request.combination)
        unused = np.array([row for row in pool if row not in request.used], dtype=int)
        taken = len(pool) - len(unused) + request.n
        rows = repeated_draw(unused if len(unused) >= request.n else pool, request.n, request.rng)
        request.used.update(rows.tolist())
        return Drawn(sources.synthetic[name], rows, pool_factor(taken, len(pool)))

    return draw


def draw_of_class(sources: Sources, request: Request) -> Drawn:
    """Real training patches of the combination's class, sites in equal parts."""
    study = sources.study
    own = study.rows_of(study.train, {study.class_field: request.combination[study.class_field]})
    rows = own[balanced_draw(study.site_labels[own], request.n, request.rng)] if len(own) else own
    return Drawn(sources.real, rows)


def _drawn(sources: Sources, draw: Draw, seed: int, used: dict[str, set[int]] | None = None) -> Added:
    """The patches drawn for every combination; ``used`` gets the rows that were taken, by class."""
    rng = np.random.default_rng([seed, 5])
    used = {} if used is None else used
    parts, labels, distinct, pools = [sources.real[:0]], [np.zeros(0, str)], [], [0.0]
    for i, (combination, n) in enumerate(zip(sources.additions.combinations, sources.additions.counts, strict=True)):
        value = combination[sources.study.class_field]
        request = Request(i, combination, n, rng, used.setdefault(value, set()))
        found = draw(sources, request) or draw_of_class(sources, request)
        parts.append(found.features[found.rows])
        labels.append(np.full(len(found.rows), value))
        distinct.append(len(np.unique(found.rows)))
        pools.append(found.pool)
    return Added(np.concatenate(parts), np.concatenate(labels), distinct, max(pools))


def _with_real(sources: Sources, added: Added) -> TrainingSet:
    return TrainingSet(
        np.concatenate([sources.real[sources.study.train], added.features]),
        np.concatenate([sources.labels, added.labels]),
        distinct=added.distinct,
        pool=added.pool,
    )


def synthetic_rows(samples: SyntheticSet, combination: Mapping[str, str]) -> np.ndarray:
    """Positions of the samples that have a combination's values, of the fields that the model was conditioned on."""
    return np.flatnonzero(matches(samples.index, {k: v for k, v in combination.items() if k in samples.fields}))


def balancing_weights(study: Study) -> np.ndarray:
    """Weight of each real training patch such that all class × site cells with a patch count the same; mean 1."""
    cell = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str).agg("|".join, axis=1)
    weights = 1.0 / cell.map(cell.value_counts()).to_numpy(float)
    return np.asarray(weights * len(weights) / weights.sum())
