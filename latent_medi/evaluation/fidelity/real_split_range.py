"""Would other real patients do as well? Every measure of fidelity beside the range that real patients themselves reach.

The patients of the reference and those of the probe part are dealt anew into two sides, many times; each time one side
plays the generator. A generator whose measure is worse than 97.5 % of these is worse than real patients, whatever the
number of patches and patients is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_medi.evaluation.cohort.comparison_sets import FLOOR, comparison_for
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.distance_to_real import Features, neighbourhoods
from latent_medi.statistics.bootstrap import LEVEL, MIN_PATIENTS
from latent_medi.statistics.distances import frechet_distance, full_rank, kid, pca_dims
from latent_medi.statistics.linear_probe import fit_linear_probe

WORSE = {"fd": 1, "fd_pca": 1, "kid": 1, "class_mix": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1,
         "coverage_lowest": -1}  # fmt: skip
"""Which way a measure is worse: 1 upwards, −1 downwards. To be better than other real patients is no fault."""
MIN_REAL_SPLITS = 20
_MOST = 2000


@dataclass
class Patches:
    """What is known of some patches.

    Args:
        features: [N, d].
        classes: The class of each, [N]; of the real ones only.
        seen: The class that a probe sees in each, [N].
        projected: The features in the few dimensions that the Fréchet distance is taken in where there are too few
            patches for all, [N, k].
    """

    features: np.ndarray
    classes: np.ndarray | None = None
    seen: np.ndarray | None = None
    projected: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Patches:
        """Some of them."""
        parts = (self.features, self.classes, self.seen, self.projected)
        return Patches(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]


Measures = Callable[[Patches, Patches], dict[str, float]]


def measures_of(reference: Patches, sample: Patches, seed: int = 0) -> dict[str, float]:
    """All measures of one sample set.

    Args:
        reference: Real patches.
        sample: Patches to judge.
        seed: Seed of subsamples above 2,000.

    Returns:
        Distances (``fd_pca`` instead of ``fd`` where features are projected), neighbourhood measures, and
        ``class_mix``: the total variation distance, 0 to 1, between the classes that one probe sees in the two sets. A
        class that is hardly drawn, whatever was asked for, raises it.
    """
    a, b = reference.features, sample.features
    result: dict[str, float] = {}
    if reference.projected is not None and sample.projected is not None:
        result["fd_pca"] = frechet_distance(reference.projected, sample.projected)
    else:
        result["fd"] = frechet_distance(a, b)
    result["kid"] = kid(a, b, subsets=0)[0]
    if reference.seen is not None and sample.seen is not None:
        names = np.union1d(reference.seen, sample.seen)
        shares = [np.array([(seen == name).mean() for name in names]) for seen in (reference.seen, sample.seen)]
        result["class_mix"] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    near = neighbourhoods(a, b, most=_MOST, seed=seed, groups=reference.classes)
    return result | {name: near[name] for name in WORSE if near.get(name) is not None}


def deals(
    patients: np.ndarray, strata: np.ndarray, share: float, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of two sides, patients dealt at random within each stratum and never on both sides.

    Args:
        patients: Patient of each row, [N].
        strata: Stratum of each row, [N]; a patient's first row says where they belong.
        share: Share of each stratum's patients on the first side, 0 to 1.
        count: How many times.
        seed: Seed.
    """
    names, first, code = np.unique(patients.astype(str), return_index=True, return_inverse=True)
    of_patient = strata.astype(str)[first]
    rng = np.random.default_rng([seed, 31])
    result = []
    for _ in range(count):
        left = np.zeros(len(names), bool)
        for stratum in np.unique(of_patient):
            here = rng.permutation(np.flatnonzero(of_patient == stratum))
            wanted = share * len(here)  # the broken patient is dealt by chance, so that the mean share is right
            left[here[: int(wanted) + (rng.random() < wanted % 1)]] = True
        result.append((np.flatnonzero(left[code]), np.flatnonzero(~left[code])))
    return result


def judge(
    reference: Patches,
    sample: Patches,
    pool: Patches,
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
    measures: Measures = measures_of,
) -> dict[str, dict[str, Any]]:
    """Measures of a sample set, and where they lie among those of real patients.

    Args:
        reference: Real patches.
        sample: Patches to judge.
        pool: All the real patches that are dealt.
        sides: From :func:`deals`: rows of ``pool`` that play reference and sample.
        measures: What is measured.

    Returns:
        By measure: ``value``; ``real``, the median of the deals; ``range``, their central 95 %; ``worse``, whether the
        value lies beyond the end of the range at which the measure is bad.
    """
    sizes = len(reference.features), len(sample.features)
    rng = np.random.default_rng(sizes)
    draws: list[dict[str, float]] = []
    for first, second in sides:
        theirs, mine = (
            rng.choice(rows, size, replace=False) if len(rows) > size else rows
            for rows, size in zip((first, second), sizes, strict=True)
        )
        draws.append(measures(pool.take(theirs), pool.take(mine)))
    record = {}
    for name, value in measures(reference, sample).items():
        values = np.array([draw[name] for draw in draws if name in draw])
        if len(values) < MIN_REAL_SPLITS:
            continue
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        worse = value > high if WORSE[name] > 0 else value < low
        record[name] = {"value": value, "real": float(np.median(values)), "range": [float(low), float(high)],
                        "worse": bool(worse)}  # fmt: skip
    return record


def against_real(study: Study, features: Features, count: int, seed: int) -> dict[str, Any]:
    """Each arm over the whole mix of the test patches, held against real patients.

    Args:
        study: The cohort.
        features: Features of one encoder.
        count: How often the real patients are dealt.
        seed: Seed of the deals and of the choice of samples.

    Returns:
        ``arms``: a record of :func:`judge` each; ``n``, ``n_reference`` and ``n_patients``; or ``reason`` why there is
        none; and ``skipped``, why an arm is not there.
    """
    cell = comparison_for(study, {}, seed)
    if FLOOR not in cell.rows:
        return {"arms": {}, "reason": cell.skipped.get(FLOOR) or cell.skipped.get("", "no other real patients"),
                "skipped": cell.skipped}  # fmt: skip
    reference, other = cell.reference, cell.rows[FLOOR]

    def few(rows: np.ndarray, name: str) -> np.ndarray:
        # By name: which arms are judged does not change what is looked at of each.
        rng = np.random.default_rng([seed, 37, *name.encode()])
        return rows if len(rows) <= _MOST else np.sort(rng.choice(rows, _MOST, replace=False))

    reference, other = few(reference, ""), few(other, FLOOR)
    patients = [set(study.patients[rows]) for rows in (reference, other)]
    if min(map(len, patients)) < MIN_PATIENTS:
        return {"arms": {}, "reason": f"fewer than {MIN_PATIENTS} patients on one side", "skipped": cell.skipped}
    n = len(other)
    rows = np.concatenate([reference, other])
    dim = features.real.shape[1]
    smallest = min(len(reference), n) // 2  # a deal may give one side fewer rows
    dims = 0 if full_rank(smallest, dim) else pca_dims(smallest, dim)

    classes = study.class_labels
    learn = few(study.train, "train")
    # From training patches alone: the patients that are dealt must be as new to it as the samples are.
    probe = fit_linear_probe(features.real[learn], classes[learn]) if len(set(classes[learn])) > 1 else None

    def known(x: np.ndarray, truth: np.ndarray | None = None) -> Patches:
        seen = None if probe is None else probe.predict(x)
        return Patches(np.asarray(x, np.float64), truth, seen, features.basis.project(x, dims) if dims else None)

    sides = deals(
        study.patients[rows], strata(study.index, rows, [study.class_field, study.site_field]),
        len(reference) / len(rows), count, seed,
    )  # fmt: skip
    pool, base = (known(features.real[part], classes[part]) for part in (rows, reference))

    def measures(a: Patches, b: Patches) -> dict[str, float]:
        return measures_of(a, b, seed)

    arms = {
        name: judge(base, known(features.synthetic[name][few(mine, name)]), pool, sides, measures)
        for name, mine in cell.rows.items()
        if name != FLOOR
    }
    return {
        "arms": arms, "n": n, "n_reference": len(reference), "n_patients": [len(p) for p in patients],
        "fd_dims": dims or dim, "skipped": cell.skipped,
    }  # fmt: skip
