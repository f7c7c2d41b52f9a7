"""The range of each measure over random splits of real patients, and whether each synthetic set is inside it.

The patients of the reference and those of the probe part are split at random into group A, which plays the reference,
and group B, which plays the synthetic set, many times. A synthetic set whose measure is worse than 97.5 % of these is
worse than real patients, whatever the number of patches and patients is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.comparison_sets import REAL, Comparison, comparison_for, seed_name
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.fidelity.records import InRealRange, RealSplitRange
from latent_medi.statistics.distances import frechet_distance, full_rank, pca_dims
from latent_medi.statistics.intervals import LEVEL, MIN_PATIENTS
from latent_medi.statistics.kernel_distance import KernelSet, kernel_distance
from latent_medi.statistics.linear_probe import fit_linear_probe

_DISTANCES = ("fd", "fd_pca", "kid", "class_mix")
"""Measures that are worse upwards."""
_NEIGHBOURHOODS = ("precision", "recall", "density", "coverage", "coverage_lowest")
"""Measures that are worse downwards. To be better than real patients is no fault."""
MIN_REAL_SPLITS = 20
_MOST = 2000

Groups = tuple[np.ndarray, np.ndarray]


@dataclass
class Patches:
    """Patches to compare.

    Args:
        features: [N, d].
        classes: Class of each, [N]; of real patches only.
        predicted: Class that a linear probe predicts for each, [N].
        projected: Features after projection, [N, k]; the Fréchet distance is taken in these where there are too few
            patches for the features themselves.
        patients: Patient of each, [N]; of real patches only.
        strata: Class and site of each, as far as they are known, [N].
    """

    features: np.ndarray
    classes: np.ndarray | None = None
    predicted: np.ndarray | None = None
    projected: np.ndarray | None = None
    patients: np.ndarray | None = None
    strata: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Patches:
        """Some of them."""
        parts = (self.features, self.classes, self.predicted, self.projected, self.patients, self.strata)
        return Patches(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]


Measures = Callable[[Patches, Patches], dict[str, float]]


def measures_of(reference: Patches, sample: Patches, seed: int = 0) -> dict[str, float]:
    """All measures of one set of patches.

    Args:
        reference: Real patches.
        sample: Patches to compare with them.
        seed: Seed of subsamples above 2,000.

    Returns:
        Distances (``fd_pca`` instead of ``fd`` where features are projected; the kernel distance without pairs of one
        patient), neighbourhood measures, and
        ``class_mix``: the total variation distance, 0 to 1, between the classes that a linear probe predicts in the two
        sets. A class that is hardly generated, whatever was requested, raises it.
    """
    a, b = reference.features, sample.features
    result: dict[str, float] = {}
    if reference.projected is not None and sample.projected is not None:
        result["fd_pca"] = frechet_distance(reference.projected, sample.projected)
    else:
        result["fd"] = frechet_distance(a, b)
    result["kid"] = kernel_distance(*(KernelSet(x.features, x.patients, x.strata) for x in (reference, sample))).value
    if reference.predicted is not None and sample.predicted is not None:
        names = np.union1d(reference.predicted, sample.predicted)
        shares = [np.array([(found == n).mean() for n in names]) for found in (reference.predicted, sample.predicted)]
        result["class_mix"] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    near = neighbourhoods(a, b, most=_MOST, seed=seed, groups=reference.classes)
    found = {name: getattr(near, name) for name in _NEIGHBOURHOODS}
    return result | {name: value for name, value in found.items() if value is not None}


def real_splits(patients: np.ndarray, strata: np.ndarray, share: float, count: int, seed: int) -> list[Groups]:
    """Random splits of real patients: rows of group A and of group B, no patient in both.

    Args:
        patients: Patient of each row, [N].
        strata: Stratum of each row, [N]; each stratum is split, and a patient belongs to that of their first row.
        share: Share of each stratum's patients in group A, 0 to 1.
        count: Number of splits.
        seed: Seed.
    """
    names, first, code = np.unique(patients.astype(str), return_index=True, return_inverse=True)
    of_patient = strata.astype(str)[first]
    rng = np.random.default_rng([seed, 31])
    result = []
    for _ in range(count):
        in_a = np.zeros(len(names), bool)
        for stratum in np.unique(of_patient):
            here = rng.permutation(np.flatnonzero(of_patient == stratum))
            wanted = share * len(here)  # a fraction of a patient is rounded at random, so that the mean share is right
            in_a[here[: int(wanted) + (rng.random() < wanted % 1)]] = True
        result.append((np.flatnonzero(in_a[code]), np.flatnonzero(~in_a[code])))
    return result


def compare_with_splits(
    reference: Patches,
    sample: Patches,
    pool: Patches,
    splits: Sequence[Groups],
    measures: Measures = measures_of,
) -> dict[str, InRealRange]:
    """Measures of a synthetic set, and their ranges over splits of real patients.

    Args:
        reference: Real patches.
        sample: Synthetic patches.
        pool: All real patches that are split.
        splits: From :func:`real_splits`: rows of ``pool``.
        measures: What is measured.
    """
    sizes = len(reference.features), len(sample.features)
    rng = np.random.default_rng(sizes)
    draws: list[dict[str, float]] = []
    for groups in progress(splits, desc="splits of real patients", unit="splits"):
        a, b = (
            rng.choice(rows, size, replace=False) if len(rows) > size else rows
            for rows, size in zip(groups, sizes, strict=True)
        )
        draws.append(measures(pool.take(a), pool.take(b)))
    result = {}
    for name, value in measures(reference, sample).items():
        values = np.array([draw[name] for draw in draws if name in draw])
        if len(values) < MIN_REAL_SPLITS:
            continue
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        worse = value > high if name in _DISTANCES else value < low
        result[name] = InRealRange(value, float(np.median(values)), (float(low), float(high)), bool(worse))
    return result


def real_split_range(study: Study, features: Features, count: int, seed: int) -> RealSplitRange:
    """Each synthetic set over all patches, in the test patches' mix, compared with splits of real patients.

    Args:
        study: The cohort.
        features: Features of one encoder.
        count: Number of splits.
        seed: Seed of the splits and of the choice of samples.
    """
    comparison = comparison_for(study, {}, seed)
    skipped = comparison.skipped
    if REAL not in comparison.rows:
        reason = skipped.get(REAL) or skipped.get("", "no other real patients")
        return RealSplitRange({}, skipped, reason)
    reference, other = _some(comparison.reference, b"", seed), _some(comparison.rows[REAL], seed_name(REAL), seed)
    n_patients = len(set(study.patients[reference])), len(set(study.patients[other]))
    if min(n_patients) < MIN_PATIENTS:
        return RealSplitRange({}, skipped, f"fewer than {MIN_PATIENTS} patients in the reference or the other patches")
    rows = np.concatenate([reference, other])
    dim = features.real.shape[1]
    smallest = min(len(reference), len(other)) // 2  # a split may give one group fewer rows
    dims = 0 if full_rank(smallest, dim) else pca_dims(smallest, dim)
    prepare = _preparation(study, features, dims, seed)
    pair = [study.class_field, study.site_field]
    share = len(reference) / len(rows)
    strata_of_rows = strata(study.index, rows, pair)
    splits = real_splits(study.patients[rows], strata_of_rows, share, count, seed)
    pool, base = (
        prepare(
            Patches(
                features.real[part],
                study.class_labels[part],
                patients=study.patients[part],
                strata=strata(study.index, part, pair),
            )
        )
        for part in (rows, reference)
    )

    def measures(a: Patches, b: Patches) -> dict[str, float]:
        return measures_of(a, b, seed)

    synthetic = {}
    for name, samples in _synthetic_rows(comparison, seed).items():
        made = study.synthetic[name]
        kinds = strata(made.index, samples, [f for f in pair if f in made.fields])
        patches = prepare(Patches(features.synthetic[name][samples], strata=kinds))
        synthetic[name] = compare_with_splits(base, patches, pool, splits, measures)
    return RealSplitRange(
        synthetic, skipped, None, n=len(other), n_reference=len(reference), n_patients=n_patients, fd_dims=dims or dim
    )


def _some(rows: np.ndarray, name: bytes, seed: int) -> np.ndarray:
    """At most 2,000 of some rows. The name is part of the seed, so that other sources do not change the choice."""
    rng = np.random.default_rng([seed, 37, *name])
    return rows if len(rows) <= _MOST else np.sort(rng.choice(rows, _MOST, replace=False))


def _synthetic_rows(comparison: Comparison, seed: int) -> dict[str, np.ndarray]:
    return {n: _some(rows, seed_name(n), seed) for n, rows in comparison.rows.items() if n != REAL}


def _preparation(study: Study, features: Features, dims: int, seed: int) -> Callable[[Patches], Patches]:
    """A function that adds predicted classes and the projection. Its linear probe is trained on training patches alone:
    the patients that are split must be as new to it as the samples are.
    """
    labels = study.class_labels
    training = _some(study.train, b"train", seed)
    probe = fit_linear_probe(features.real[training], labels[training]) if len(set(labels[training])) > 1 else None

    def prepare(patches: Patches) -> Patches:
        x = patches.features
        predicted = None if probe is None else probe.predict(x)
        projected = features.basis.project(x, dims) if dims else None
        return replace(patches, features=np.asarray(x, np.float64), predicted=predicted, projected=projected)

    return prepare
