"""Distances of synthetic sets to real patches, compared with the distance between real patients at the same n.

All sources, the synthetic sets and further real patients, are compared with the same reference by equally many
patches. One rule chooses the metric of a whole table, so that no mean mixes metrics: the Fréchet distance if reference
and sources have n ≥ 2d in each combination, otherwise KID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latent_medi.evaluation.cohort.combinations import describe
from latent_medi.evaluation.cohort.comparison_sets import REAL, Comparison, seed_name
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.fidelity.records import (
    CombinationDistances,
    Distance,
    DistanceTable,
    MeanDistance,
    Metric,
    OverallFidelity,
)
from latent_medi.statistics.bootstrap import PatientResamples, estimate
from latent_medi.statistics.distances import (
    BLOCK,
    RANK_DEFICIENT,
    Basis,
    FeatureStatistics,
    blocks,
    fd_infinity,
    frechet,
    frechet_distance,
    full_rank,
    pca_dims,
    psd_root,
    scatter,
)
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.kernel_distance import kid, polynomial_kernel

_MAX_KERNEL = 3000
"""Patches of either set in a kernel distance; the kernel of all would grow with their square."""
_NO_GAP = 0.005
"""Largest share of draws that may leave a ratio without a denominator."""
_MOST_EIGEN = 50
"""Resamples of a large Fréchet distance, each of which costs a d³ eigenvalue problem."""


@dataclass
class Features:
    """Features of one encoder.

    Args:
        real: Of every row of the real index, [N, d].
        synthetic: Of every row of each synthetic set, by its name.
        basis: Principal directions of the real training features.
    """

    real: np.ndarray
    synthetic: Mapping[str, np.ndarray]
    basis: Basis


def _moments(x: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance; ``w`` says how often each row occurs."""
    if w is None:
        if len(x) > BLOCK:
            whole = FeatureStatistics.of(x)
            return whole.mean, whole.cov
        x = np.asarray(x, np.float64)
        return x.mean(axis=0), np.cov(x.T).reshape(x.shape[1], x.shape[1])
    total = w.sum()
    mean = sum((w[part] @ np.asarray(x[part], np.float64) for part in blocks(len(x))), np.zeros(x.shape[1])) / total
    return mean, scatter(x, mean, w) / (total - 1)


def frechet_draws(
    reference: np.ndarray, sample: np.ndarray, weights: np.ndarray, sample_weights: np.ndarray | None
) -> np.ndarray:
    """Fréchet distance in each resample of the patients, [B]; synthetic samples (no weights) stay as they are."""
    fixed = None if sample_weights is not None else _moments(sample, None)
    root = psd_root(fixed[1]) if fixed is not None else None
    draws = np.full(len(weights), np.nan)
    for b, w in enumerate(weights):
        if w.sum() < 2 or (sample_weights is not None and sample_weights[b].sum() < 2):
            continue
        other = fixed if fixed is not None else _moments(sample, sample_weights[b])  # type: ignore[index]
        draws[b] = frechet(*_moments(reference, w), *other, root_b=root)
    return draws


def kid_draws(
    reference: np.ndarray, sample: np.ndarray, weights: np.ndarray, sample_weights: np.ndarray | None
) -> np.ndarray:
    """Kernel distance in each resample, [B]; pairs of copies of one row are left out, like a row with itself."""

    def within(kernel: np.ndarray, w: np.ndarray) -> np.ndarray:
        diagonal = (w * w) @ np.diag(kernel)
        pairs = w.sum(axis=1) ** 2 - (w * w).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            result: np.ndarray = (np.einsum("bi,bi->b", w @ kernel, w) - diagonal) / pairs
            return result

    sw = np.ones((1, len(sample))) if sample_weights is None else sample_weights
    cross = np.einsum(
        "bj,bj->b", weights @ polynomial_kernel(reference, sample), np.broadcast_to(sw, (len(weights), len(sample)))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = cross / (weights.sum(axis=1) * sw.sum(axis=1))
    own = within(polynomial_kernel(reference, reference), weights) + within(polynomial_kernel(sample, sample), sw)
    result: np.ndarray = own - 2 * cross
    return result


@dataclass(frozen=True)
class _Options:
    """How the distances of a table are taken.

    Args:
        metric: The distance that estimates have as value.
        pca_dims: Dimensions of the Fréchet distance after projection.
        raw: Whether to add rank-deficient Fréchet distances.
        seed: Seed of subsamples.
    """

    metric: Metric
    pca_dims: int
    raw: bool
    seed: int

    @property
    def lowest(self) -> float:
        """Smallest value that the metric can have."""
        return 0.0 if self.metric == "fd" else -np.inf


Draws = dict[str, np.ndarray]


def distance_table(
    study: Study,
    features: Features,
    comparisons: Sequence[Comparison],
    resamples: int,
    seed: int,
    protocol: str = "default",
) -> DistanceTable:
    """Distances of every source in each combination, and their means over the combinations.

    A mean counts the combinations that every source has (of the sources that have any), so that it compares like with
    like. If there is none, each mean counts its own combinations, and there is no ratio.

    Args:
        study: The cohort.
        features: Features of one encoder.
        comparisons: From :mod:`latent_medi.evaluation.cohort.comparison_sets`.
        resamples: Patient resamples for the intervals.
        seed: Their seed.
        protocol: "paper" adds raw rank-deficient Fréchet distances.
    """
    names = [*study.synthetic, REAL]
    dim = features.real.shape[1]
    smallest = min((len(rows) for c in comparisons if c.rows for rows in (c.reference, *c.rows.values())), default=0)
    valid = full_rank(smallest, dim)
    resamples = min(resamples, _MOST_EIGEN) if valid and dim > 128 else resamples
    options = _Options("fd" if valid else "kid", pca_dims(smallest, dim), protocol == "paper", seed)
    weights = _Weights(study, seed, resamples)
    results = [_compare(study, features, c, options, weights) for c in comparisons]
    present = [n for n in names if any(n in c.rows for c in comparisons)]
    complete = [i for i, c in enumerate(comparisons) if c.rows and all(n in c.rows for n in present)]
    means: dict[str, MeanDistance] = {}
    draws: Draws = {}
    for n in names:
        numbers = complete or [i for i, c in enumerate(comparisons) if n in c.rows]
        numbers = [i for i in numbers if n in comparisons[i].rows]
        if complete and n in present:
            draws[n] = np.mean([results[i][1][n] for i in numbers], axis=0)
        found = [(comparisons[i], results[i][0].sources[n]) for i in numbers]
        means[n] = _mean_distance(study, n, found, draws.get(n), options)
    return DistanceTable(
        metric=options.metric,
        rule=f"Fréchet distance needs n ≥ 2d = {2 * dim} in either set; the smallest has {smallest}"
        + ("" if valid else f", so the metric is KID. fd_pca has {options.pca_dims} dimensions"),
        dim=dim,
        pca_dims=options.pca_dims,
        resamples=resamples,
        n_complete=len(complete),
        combinations=[record for record, _ in results],
        means=means,
        ratio=distance_ratio(study, means, draws)
        if complete
        else estimate(None, 0, 0, reason="no combination has all sources, so their means are of different ones"),
        left_out={
            describe(c.combination): "; ".join(f"{n}: {why}" if n else why for n, why in c.skipped.items())
            for c in comparisons
            if c.skipped
        },
    )


def _mean_distance(
    study: Study,
    name: str,
    found: Sequence[tuple[Comparison, Distance]],
    draws: np.ndarray | None,
    options: _Options,
) -> MeanDistance:
    """Mean of a source's distances over the comparisons that it has."""
    # A synthetic set has no patients of its own: its distance is as sure as the reference is.
    groups = [[c.reference for c, _ in found], *([[c.rows[name] for c, _ in found]] if name == REAL else [])]
    n_patches = sum(len(c.rows[name]) for c, _ in found)
    mean = estimate(
        _mean([d.value for _, d in found]),
        n_patches,
        min(len(_people(study, rows)) for rows in groups),
        draws,
        recentre=True,
        smallest_group=min((len(_people(study, [rows])) for group in groups for rows in group), default=0),
        lowest=options.lowest,
    )
    return MeanDistance(
        **vars(mean),
        n_combinations=len(found),
        n_reference=sum(len(c.reference) for c, _ in found),
        fd=_mean([d.fd for _, d in found]),
        kid=_mean([d.kid for _, d in found]),
        fd_pca=_mean([d.fd_pca for _, d in found]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _people(study: Study, parts: Sequence[np.ndarray]) -> set[str]:
    return set(study.patients[np.concatenate(parts)]) if parts else set()


def distance_ratio(study: Study, means: Mapping[str, Estimate], draws: Mapping[str, np.ndarray]) -> Estimate:
    """(candidate − real) / (baseline − real): 0 is as good as real, 1 is no better than the baseline.

    Drawing patients with replacement raises a distance, once where the reference alone is drawn and twice where both
    sets are, so the draws of each distance are moved to its value before they are divided. A ratio whose denominator
    may be nothing has no end: where more than 0.5 % of the draws leave the baseline no gap above the real patients,
    there is no interval.
    """
    names = (study.roles.candidate, study.roles.baseline, REAL)
    parts = [means[n] for n in names if n in means]
    missing = len(parts) < len(names)
    n_patches, n_patients, smallest = (
        0 if missing else min(int(getattr(part, key) or 0) for part in parts)
        for key in ("n_patches", "n_patients", "smallest_group")
    )
    candidate, baseline, real = (part.value for part in parts) if not missing else (None, None, None)
    if candidate is None or baseline is None or real is None:
        return estimate(None, 0, n_patients, reason="a synthetic set or the real patients have no distance")
    if baseline <= real:
        return estimate(None, 0, n_patients, reason="the baseline is not farther than real patients are")
    bootstrap, reason = None, None
    if all(n in draws for n in names):
        values = (candidate, baseline, real)
        moved = [draws[n] - np.nanmedian(draws[n]) + v for n, v in zip(names, values, strict=True)]
        gap = moved[1] - moved[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            bootstrap = (moved[0] - moved[2]) / gap
        if (gap <= 0).sum() > _NO_GAP * np.isfinite(gap).sum():
            bootstrap[:] = np.nan
            reason = "the baseline may be no farther than real patients are"
    value = (candidate - real) / (baseline - real)
    return estimate(value, n_patches, n_patients, bootstrap, True, smallest_group=smallest, reason=reason)


class _Weights:
    """Row weights from one bootstrap of all real patients, so that combinations and sources are paired."""

    def __init__(self, study: Study, seed: int, resamples: int) -> None:
        rows = np.union1d(study.reference, study.probe)
        self.position = np.full(len(study.index), -1)
        self.position[rows] = np.arange(len(rows))
        self.resamples = PatientResamples(study.patients[rows], resamples, seed)

    def of(self, rows: np.ndarray) -> np.ndarray:
        return self.resamples.row_weights(self.position[rows])


def _compare(
    study: Study, features: Features, comparison: Comparison, options: _Options, weights: _Weights
) -> tuple[CombinationDistances, Draws]:
    """The distances of one combination with their bootstrap values by source."""
    reference_rows = comparison.reference
    n_patients = len(_people(study, [reference_rows]))
    sources: dict[str, Distance] = {}
    draws: Draws = {}
    # Not copied to float64: what needs it takes a block at a time.
    reference = features.real[reference_rows]
    few = _thinned(len(reference_rows), options.seed, "")
    reference_weights = weights.of(reference_rows)
    for name, rows in comparison.rows.items():
        is_real = name == REAL
        sample = (features.real if is_real else features.synthetic[name])[rows]
        sample_weights = weights.of(rows) if is_real else None
        kept = _thinned(len(rows), options.seed, name)
        full = frechet_distance(reference, sample) if options.metric == "fd" or options.raw else None
        fd = full if options.metric == "fd" else None
        kernel = kid(reference[few], sample[kept])
        if options.metric == "fd":
            draws[name] = frechet_draws(reference, sample, reference_weights, sample_weights)
        else:
            drawn = None if sample_weights is None else sample_weights[:, kept]
            draws[name] = kid_draws(reference[few], sample[kept], reference_weights[:, few], drawn)
        people = min(n_patients, len(_people(study, [rows]))) if is_real else n_patients
        value = kernel if fd is None else fd
        found = estimate(value, len(rows), people, draws[name], recentre=True, lowest=options.lowest)
        projected = [features.basis.project(x, options.pca_dims) for x in (reference, sample)]
        sources[name] = Distance(
            **vars(found),
            fd=fd,
            kid=kernel,
            fd_pca=frechet_distance(*projected),
            mix_mismatch=comparison.mismatch[name],
            fd_raw=full if fd is None else None,
            fd_raw_label=RANK_DEFICIENT if options.raw and fd is None else None,
        )
    combination, name = comparison.combination, describe(comparison.combination)
    record = CombinationDistances(combination, name, len(reference_rows), n_patients, sources, comparison.skipped)
    return record, draws


def _thinned(n: int, seed: int, name: str) -> np.ndarray:
    """Positions of at most 3,000 of n rows, each as likely as any other so that their mix stays. The other sources do
    not change them.
    """
    if n <= _MAX_KERNEL:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, 53, *seed_name(name)]).choice(n, _MAX_KERNEL, replace=False))


def overall(study: Study, features: Features, comparison: Comparison, seed: int) -> dict[str, OverallFidelity]:
    """Neighbourhood measures and the Fréchet distance for infinitely many samples, by source.

    Args:
        study: The cohort.
        features: Features of one encoder.
        comparison: Of all patches, in the test patches' mix.
        seed: Seed of the subsamples.
    """
    result: dict[str, OverallFidelity] = {}
    people = len(_people(study, [comparison.reference]))
    reference = features.real[comparison.reference]
    for name, rows in comparison.rows.items():
        sample = (features.real if name == REAL else features.synthetic[name])[rows]
        value, error = fd_infinity(reference, sample, seed=seed) or (None, None)
        result[name] = OverallFidelity(
            **vars(neighbourhoods(reference, sample, seed=seed)),
            fd_infinity=value,
            fd_infinity_error=error,
            n_patients=min(people, len(_people(study, [rows]))) if name == REAL else people,
            mix_mismatch=comparison.mismatch[name],
        )
    return result
