"""The ratio of Fréchet distances, and what a perfect generator gets by simulation.

A Fréchet distance is biased by the number of patches and, more so, of patients. Real patches of other patients carry
that bias twice, samples once, so a perfect generator's ratio is below 0; how far depends on the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.comparison_sets import REAL, Comparison, seed_name
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.records import FrechetRatio
from latent_medi.statistics.distances import frechet_distance, pca_dims
from latent_medi.statistics.patient_gaussian import PatientGaussian

_MOST_DIMS = 128
"""A Fréchet distance in more dimensions takes too long to be simulated."""
_SIMULATIONS = 20
_FEW_SIMULATIONS = 5
_MANY_ROWS = 20_000
"""With more real patches than this there are fewer simulations; and no more training patches are fitted."""


@dataclass(frozen=True)
class _Cell:
    """One combination.

    Args:
        rows: Rows of the real index: the reference, and other real patches.
        distances: Fréchet distance of each source to the reference.
    """

    rows: tuple[np.ndarray, np.ndarray]
    distances: Mapping[str, float]


def frechet_ratio(
    study: Study, features: Features, comparisons: Sequence[Comparison], dims: int, seed: int
) -> FrechetRatio:
    """The ratio over the combinations that candidate, baseline and other real patients have.

    Args:
        study: The cohort.
        features: Features of one encoder.
        comparisons: Rows to compare.
        dims: Principal components that the real patches are enough for; the ratio takes at most 128, and as few as the
            smallest set is enough for.
        seed: Seed of subsamples and simulations.
    """
    names = (study.roles.candidate, study.roles.baseline, REAL)
    chosen = [c for c in comparisons if all(name in c.rows for name in names)]
    sizes = [min(len(c.rows[name]) for name in names) for c in chosen]
    n = sum(sizes)
    dims = min(dims, _MOST_DIMS, pca_dims(min(sizes, default=0), dims))

    def without(reason: str) -> FrechetRatio:
        return no_frechet_ratio(dims, reason, n, len(chosen))

    if not chosen:
        return without("no combination has the candidate, the baseline and other real patients")
    cells = [
        _cell(features, comparison, size, names, dims, seed) for comparison, size in zip(chosen, sizes, strict=True)
    ]
    candidate, baseline, real = (float(np.mean([cell.distances[name] for cell in cells])) for name in names)
    gap = baseline - real
    if gap <= 0:
        return without("the baseline is not farther than real patients are")
    found = _perfect(study, features, cells, dims, seed) / gap
    error = float(found.std(ddof=1)) / len(found) ** 0.5
    return FrechetRatio((candidate - real) / gap, float(found.mean()), error, dims, n, len(cells))


def no_frechet_ratio(dims: int, reason: str, n: int = 0, n_combinations: int = 0) -> FrechetRatio:
    """That there is no ratio, and why."""
    return FrechetRatio(None, None, None, dims, n, n_combinations, reason)


def _cell(features: Features, comparison: Comparison, n: int, names: Sequence[str], dims: int, seed: int) -> _Cell:
    """Distances of one combination, with ``n`` patches of each source."""

    def project(x: np.ndarray) -> np.ndarray:
        return features.basis.project(x, dims)

    few = {
        name: np.sort(np.random.default_rng([seed, 59, *seed_name(name)]).choice(comparison.rows[name], n, False))
        for name in names
    }
    reference = project(features.real[comparison.reference])
    found = {
        name: frechet_distance(reference, project((features.real if name == REAL else features.synthetic[name])[rows]))
        for name, rows in few.items()
    }
    return _Cell((comparison.reference, few[REAL]), found)


def _perfect(study: Study, features: Features, cells: Sequence[_Cell], dims: int, seed: int) -> np.ndarray:
    """Distance of a perfect generator less that of other real patients, as a mean over the combinations, in each
    simulated study.
    """
    rng = np.random.default_rng([seed, 61])
    compared = np.unique(np.concatenate([rows for cell in cells for rows in cell.rows]))
    training = np.setdiff1d(study.train, compared)
    if len(training) > _MANY_ROWS:
        training = rng.choice(training, _MANY_ROWS, replace=False)
    fitted = np.union1d(compared, training)
    place = np.full(len(study.index), -1)
    place[fitted] = np.arange(len(fitted))
    people = study.patients[fitted]
    kinds = strata(study.index, fitted, [study.class_field, study.site_field]).astype(str)
    model = PatientGaussian.fit(features.basis.project(features.real[fitted], dims), people, kinds)
    result = []
    count = _SIMULATIONS if len(compared) <= _MANY_ROWS else _FEW_SIMULATIONS
    for _ in progress(range(count), desc="simulated Fréchet distances", unit="studies"):
        gaps = []
        for cell in cells:
            of_reference, of_others = (place[rows] for rows in cell.rows)
            reference, real = (model.draw(people[rows], kinds[rows], rng) for rows in (of_reference, of_others))
            made = model.draw(np.arange(len(of_others)), kinds[of_others], rng)
            gaps.append(frechet_distance(reference, made) - frechet_distance(reference, real))
        result.append(float(np.mean(gaps)))
    return np.array(result)
