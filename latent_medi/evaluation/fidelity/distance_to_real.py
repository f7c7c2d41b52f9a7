"""Distances of synthetic sets to real patches, and the distance between real patients as a check.

The distance of every table is the kernel distance (KID): it has no bias of the number of patches or patients, so real
patches of other patients are at a distance of about 0, and sets of different size can be compared. Its interval is over
patients and samples. Fréchet distances stand second, where there are patches enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.combinations import describe
from latent_medi.evaluation.cohort.comparison_sets import REAL, Comparison, Part, seed_name
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.frechet_ratio import frechet_ratio, no_frechet_ratio
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.fidelity.records import (
    CombinationDistances,
    Distance,
    DistanceTable,
    MeanDistance,
    OverallFidelity,
)
from latent_medi.statistics.distances import (
    PCA_RULE,
    RANK_DEFICIENT,
    FeatureStatistics,
    fd_infinity,
    frechet_distance,
    full_rank,
    pca_dims,
)
from latent_medi.statistics.intervals import Estimate, estimate
from latent_medi.statistics.kernel_distance import (
    KernelDistance,
    KernelSet,
    distance_ratio,
    kernel_distance,
    mean_distance,
)

_MAX_KERNEL = 3000
"""Patches of either set in a kernel distance; the kernel of all would grow with their square."""

Kernels = dict[str, KernelDistance]


def distance_table(
    study: Study,
    features: Features,
    comparisons: Sequence[Comparison],
    seed: int,
    protocol: str = "default",
    part: Part = "test",
) -> DistanceTable:
    """Distances of every source in each combination, and their means over the combinations that the source has.

    Args:
        study: The cohort.
        features: Features of one encoder.
        comparisons: From :mod:`latent_medi.evaluation.cohort.comparison_sets`.
        seed: Seed of subsamples.
        protocol: "paper" adds raw rank-deficient Fréchet distances.
        part: What the reference is. With training images there is no ratio of Fréchet distances, since samples may be
            nearer to them than other real patients are.
    """
    dim = features.real.shape[1]
    # Of every combination that can be compared, whether a synthetic set has it or not: a set must not change others.
    real = [rows for c in comparisons if "" not in c.skipped for rows in (c.reference, c.rows.get(REAL, c.reference))]
    dims = pca_dims(min(map(len, real), default=0), dim)
    shown = progress(comparisons, desc="distances to real patches", unit="combinations")
    results = [_compare(study, features, c, dims, protocol == "paper", seed) for c in shown]
    kernels = [found for _, found in results]
    means = {}
    for name in [*study.synthetic, REAL]:
        numbers = [i for i, found in enumerate(kernels) if name in found]
        found = [(comparisons[i], results[i][0].sources[name]) for i in numbers]
        means[name] = _mean_distance(study, name, found, [kernels[i][name] for i in numbers])
    return DistanceTable(
        dim=dim,
        pca_dims=dims,
        combinations=[record for record, _ in results],
        means=means,
        ratio=_ratio(study, comparisons, kernels),
        frechet_ratio=(
            frechet_ratio(study, features, comparisons, dims, seed)
            if part == "test"
            else no_frechet_ratio(dims, "the reference are training images")
        ),
        left_out={
            describe(c.combination): "; ".join(f"{n}: {why}" if n else why for n, why in c.skipped.items())
            for c in comparisons
            if c.skipped
        },
    )


def kernel_set(study: Study, features: Features, name: str, rows: np.ndarray, seed: int) -> KernelSet:
    """One side of a kernel distance, with its patients, and strata by class and site as far as they are known. Each
    sample is a patient of its own and has its row for a name, so that a mean over combinations knows it in each.

    Args:
        study: The cohort.
        features: Features of one encoder.
        name: A synthetic set, ``REAL``, or "" for the reference.
        rows: Rows of the set's index, or of the real index; at most 3,000 of them are used.
        seed: Seed of the choice of these.
    """
    rows = rows[_thinned(len(rows), seed, name)]
    pair = [study.class_field, study.site_field]
    if name in study.synthetic:
        synthetic = study.synthetic[name]
        fields = [each for each in pair if each in synthetic.fields]
        return KernelSet(features.synthetic[name][rows], rows, strata(synthetic.index, rows, fields))
    return KernelSet(features.real[rows], study.patients[rows], strata(study.index, rows, pair))


def _mean_distance(
    study: Study, name: str, found: Sequence[tuple[Comparison, Distance]], kernels: Sequence[KernelDistance]
) -> MeanDistance:
    """Mean of a source's distances over the comparisons that it has."""
    # A synthetic set has no patients of its own.
    groups = [[c.reference for c, _ in found], *([[c.rows[name] for c, _ in found]] if name == REAL else [])]
    mean = mean_distance(kernels) if kernels else None
    result = estimate(
        None if mean is None else mean.value,
        sum(len(c.rows[name]) for c, _ in found),
        min(len(_people(study, rows)) for rows in groups),
        None if mean is None else mean.spread,
        smallest_group=min((len(_people(study, [rows])) for group in groups for rows in group), default=0),
    )
    return MeanDistance(
        **vars(result),
        n_combinations=len(found),
        n_reference=sum(len(c.reference) for c, _ in found),
        fd=_mean([d.fd for _, d in found]),
        fd_pca=_mean([d.fd_pca for _, d in found]),
        fd_raw=_mean([d.fd if d.fd_raw is None else d.fd_raw for _, d in found])
        if any(d.fd_raw is not None for _, d in found)
        else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _people(study: Study, parts: Sequence[np.ndarray]) -> set[str]:
    return set(study.patients[np.concatenate(parts)]) if parts else set()


def _ratio(study: Study, comparisons: Sequence[Comparison], kernels: Sequence[Kernels]) -> Estimate:
    """Distance of the candidate as a share of the baseline's, over the combinations that both have."""
    pair = study.roles.candidate, study.roles.baseline
    common = [i for i, found in enumerate(kernels) if all(name in found for name in pair)]
    if not common:
        return estimate(None, 0, 0, reason="no combination has both the candidate and the baseline")
    candidate, baseline = (mean_distance([kernels[i][name] for i in common]) for name in pair)
    references = [comparisons[i].reference for i in common]
    found = distance_ratio(candidate, baseline)
    value, spread = found or (None, None)
    few = math.isinf(baseline.spread.variance)  # no pair of patients is left without one of them
    return estimate(
        value,
        min(sum(len(comparisons[i].rows[name]) for i in common) for name in pair),
        len(_people(study, references)),
        spread,
        smallest_group=min(len(_people(study, [rows])) for rows in references),
        reason=None if found else "too few patients" if few else "the baseline may be as near as real patients are",
    )


def _compare(
    study: Study, features: Features, comparison: Comparison, dims: int, raw: bool, seed: int
) -> tuple[CombinationDistances, Kernels]:
    """The distances of one combination: the record, and kernel distances by source."""
    rows_of, dim = comparison.reference, features.real.shape[1]
    n_patients = len(_people(study, [rows_of]))
    sources: dict[str, Distance] = {}
    kernels: Kernels = {}
    if comparison.rows:
        real = features.real[rows_of]
        reference = kernel_set(study, features, "", rows_of, seed)
        moments = FeatureStatistics.of(real) if full_rank(len(rows_of), dim) else None
        # All principal components are the features, turned.
        projected = features.basis.project(real, dims) if dims < dim else None
    for name, rows in comparison.rows.items():
        is_real = name == REAL
        # Not copied to float64: what needs it takes a block at a time.
        sample = (features.real if is_real else features.synthetic[name])[rows]
        kernels[name] = kernel_distance(reference, kernel_set(study, features, name, rows, seed))
        valid = full_rank(min(len(rows_of), len(rows)), dim)
        full = frechet_distance(moments if moments and valid else real, sample) if valid or raw else None
        fd_pca = full if projected is None else None
        if projected is not None and len(rows) >= PCA_RULE * dims:
            fd_pca = frechet_distance(projected, features.basis.project(sample, dims))
        people = min(n_patients, len(_people(study, [rows]))) if is_real else n_patients
        sources[name] = Distance(
            **vars(estimate(kernels[name].value, len(rows), people, kernels[name].spread)),
            fd=full if valid else None,
            fd_pca=fd_pca if len(rows) >= PCA_RULE * dims else None,
            mix_mismatch=comparison.mismatch[name],
            fd_raw=None if valid else full,
            fd_raw_label=RANK_DEFICIENT if raw and not valid else None,
            unmatched_fields=comparison.unmatched.get(name, []),
        )
    combination, text = comparison.combination, describe(comparison.combination)
    record = CombinationDistances(combination, text, len(rows_of), n_patients, sources, comparison.skipped)
    return record, kernels


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
