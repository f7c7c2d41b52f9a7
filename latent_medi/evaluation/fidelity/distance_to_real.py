"""How far synthetic patches lie from real ones, beside how far real patients lie from each other at the same n.

Every arm and the floor face the same reference with the same number of samples. One rule decides the headline for a
whole summary, so that its mean never mixes metrics: the Fréchet distance if each side of each cell has n ≥ 2d,
otherwise KID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_medi.evaluation.cohort.combinations import describe
from latent_medi.evaluation.cohort.comparison_sets import FLOOR, Comparison
from latent_medi.evaluation.cohort.study import Study
from latent_medi.statistics.bootstrap import PatientResamples, measure
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
    kid,
    pca_dims,
    polynomial_kernel,
    psd_root,
    scatter,
)

_MAX_KERNEL = 3000
"""Patches of a side that a kernel distance looks at; the kernel of all would grow with their square."""
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
            return (np.einsum("bi,bi->b", w @ kernel, w) - diagonal) / pairs

    sw = np.ones((1, len(sample))) if sample_weights is None else sample_weights
    cross = np.einsum(
        "bj,bj->b", weights @ polynomial_kernel(reference, sample), np.broadcast_to(sw, (len(weights), len(sample)))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = cross / (weights.sum(axis=1) * sw.sum(axis=1))
    return (
        within(polynomial_kernel(reference, reference), weights)
        + within(polynomial_kernel(sample, sample), sw)
        - 2 * cross
    )


def summarise(
    study: Study, features: Features, cells: Sequence[Comparison], resamples: int, seed: int, protocol: str = "default"
) -> dict[str, Any]:
    """Distances of every arm and the floor in each cell, and their means over the cells.

    Args:
        study: The cohort.
        features: Features of one encoder.
        cells: From :func:`held_out_comparisons` or :func:`class_comparisons`.
        resamples: Patient resamples for the intervals.
        seed: Their seed.
        protocol: "paper" adds raw rank-deficient Fréchet distances.

    Returns:
        ``metric``, ``rule``, ``dim``, ``pca_dims``, ``cells`` and ``summary`` (per arm and floor a measure, and
        ``ratio``), ``resamples``, ``left_out`` (why cells, or sides of them, are not judged). A mean counts the cells
        that every arm and the floor have (of those that have any), so that it compares like with like. If there is no
        such cell each mean counts its own, and there is no ratio.
    """
    names = [*study.synthetic, FLOOR]
    dim = features.real.shape[1]
    judged = [c for c in cells if c.rows]
    smallest = min((min(len(c.reference), *(len(r) for r in c.rows.values())) for c in judged), default=0)
    valid, dims = full_rank(smallest, dim), pca_dims(smallest, dim)
    metric = "fd" if valid else "kid"
    resamples = min(resamples, _MOST_EIGEN) if valid and dim > 128 else resamples
    draws_by_patient = _Weights(study, seed, resamples)
    records: list[dict[str, Any]] = []
    draws: dict[str, list[np.ndarray]] = {n: [] for n in names}
    complete: list[int] = []
    anywhere = [n for n in names if any(n in c.rows for c in cells)]
    for number, cell in enumerate(cells):
        record, cell_draws = _judge(study, features, cell, metric, dims, draws_by_patient, protocol, seed)
        records.append(record)
        if cell.rows and all(n in cell.rows for n in anywhere):
            complete.append(number)
            for n in anywhere:
                draws[n].append(cell_draws[n])
    summary: dict[str, Any] = {}
    means: dict[str, np.ndarray] = {}
    for n in names:
        numbers = complete if complete else [i for i, c in enumerate(cells) if n in c.rows]
        numbers = [i for i in numbers if n in cells[i].rows]
        values = [records[i]["arms"][n]["value"] for i in numbers]
        if draws[n]:
            means[n] = np.mean(draws[n], axis=0)
        sides = [[cells[i].reference for i in numbers], *([[cells[i].rows[n] for i in numbers]] if n == FLOOR else [])]
        summary[n] = measure(
            float(np.mean(values)) if values else None,
            sum(len(cells[i].rows[n]) for i in numbers),
            min(len(_people(study, side)) for side in sides),
            means.get(n),
            recentre=True,
            smallest_group=min((len(_people(study, [rows])) for side in sides for rows in side), default=0),
            lowest=0.0 if metric == "fd" else -np.inf,
            n_cells=len(numbers),
            n_reference=sum(len(cells[i].reference) for i in numbers),
        )
        for key in ("fd", "kid", "fd_pca"):
            parts = [records[i]["arms"][n][key] for i in numbers]
            summary[n][key] = float(np.mean(parts)) if parts and None not in parts else None
    apart = "no combination is judged for all sides"  # their means are of different combinations
    summary["ratio"] = ratio(summary, means) if complete else measure(None, 0, 0, reason=apart)
    return {
        "metric": metric,
        "resamples": resamples,
        "left_out": {
            describe(cell.combination): "; ".join(f"{n}: {why}" if n else why for n, why in cell.skipped.items())
            for cell in cells
            if cell.skipped
        },
        "rule": f"Fréchet distance needs n ≥ 2d = {2 * dim} on each side; the smallest side has {smallest}"
        + (
            ""
            if valid
            else f", so KID is the headline and the Fréchet distance is taken after PCA to {dims} dimensions"
        ),
        "dim": dim,
        "pca_dims": dims,
        "complete": len(complete),
        "cells": records,
        "summary": summary,
    }


def _people(study: Study, sides: Sequence[np.ndarray]) -> set[str]:
    return set(study.patients[np.concatenate(sides)]) if sides else set()


def ratio(summary: Mapping[str, Any], draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """(medi − floor) / (cls − floor): 0 is as good as real, 1 is no better than without metadata.

    Drawing patients with replacement raises a distance, once where the reference alone is drawn and twice where both
    sides are, so the draws of each distance are moved to its value before they are divided. A ratio whose denominator
    may be nothing has no end: where more than 0.5 % of the draws leave the class-only arm no gap above the floor, there
    is no interval.
    """
    sides = [summary.get(n, {}) for n in ("medi", "cls", FLOOR)]
    people = [min(side.get(key, 0) for side in sides) for key in ("n_patches", "n_patients", "smallest_group")]
    values = [side.get("value") for side in sides]
    if None in values:
        return measure(None, 0, people[1], reason="an arm or the floor is missing")
    medi, cls, floor = values
    if cls <= floor:
        return measure(None, 0, people[1], reason="the class-only arm is not above the floor")
    bootstrap, told = None, dict[str, Any]()
    if all(n in draws for n in ("medi", "cls", FLOOR)):
        moved = [draws[n] - np.nanmedian(draws[n]) + v for n, v in zip(("medi", "cls", FLOOR), values, strict=True)]
        below = moved[1] - moved[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            bootstrap = (moved[0] - moved[2]) / below
        if (below <= 0).sum() > _NO_GAP * np.isfinite(below).sum():
            bootstrap[:] = np.nan
            told = {"reason": "the class-only arm is not surely above the floor"}
    return measure(
        (medi - floor) / (cls - floor), people[0], people[1], bootstrap, True, smallest_group=people[2], **told
    )


class _Weights:
    """Row weights of reference and floor rows from one bootstrap of all patients, so that cells and arms are paired."""

    def __init__(self, study: Study, seed: int, resamples: int) -> None:
        rows = np.union1d(study.reference, study.probe)
        self.position = np.full(len(study.index), -1)
        self.position[rows] = np.arange(len(rows))
        self.resamples = PatientResamples(study.patients[rows], resamples, seed)

    def of(self, rows: np.ndarray) -> np.ndarray:
        return self.resamples.row_weights(self.position[rows])


def _judge(
    study: Study,
    features: Features,
    cell: Comparison,
    metric: str,
    dims: int,
    weights: _Weights,
    protocol: str,
    seed: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    record: dict[str, Any] = {
        "combination": cell.combination,
        "name": describe(cell.combination),
        "n_reference": len(cell.reference),
        "n_patients": len(set(study.patients[cell.reference])),
        "arms": {},
        "skipped": cell.skipped,
    }
    draws: dict[str, np.ndarray] = {}
    if not cell.rows:
        return record, draws
    # As they are: whoever needs float64 takes a block at a time there.
    reference = features.real[cell.reference]
    reference_weights = weights.of(cell.reference)
    few = _thinned(len(cell.reference), seed, "")
    for name, rows in cell.rows.items():
        sample = (features.real if name == FLOOR else features.synthetic[name])[rows]
        sample_weights = weights.of(rows) if name == FLOOR else None
        mine = _thinned(len(rows), seed, name)
        numbers: dict[str, Any] = {
            "fd": frechet_distance(reference, sample) if metric == "fd" else None,
            "kid": kid(reference[few], sample[mine], subsets=0)[0],
            "fd_pca": frechet_distance(features.basis.project(reference, dims), features.basis.project(sample, dims)),
        }
        if protocol == "paper" and metric == "kid":
            numbers |= {"fd_raw": frechet_distance(reference, sample), "fd_raw_label": RANK_DEFICIENT}
        if metric == "fd":
            draws[name] = frechet_draws(reference, sample, reference_weights, sample_weights)
        else:
            drawn = None if sample_weights is None else sample_weights[:, mine]
            draws[name] = kid_draws(reference[few], sample[mine], reference_weights[:, few], drawn)
        n_patients = record["n_patients"]
        if name == FLOOR:
            n_patients = min(n_patients, len(set(study.patients[rows])))
        record["arms"][name] = measure(
            numbers[metric], len(rows), n_patients, draws[name], recentre=True,
            lowest=0.0 if metric == "fd" else -np.inf, mix_mismatch=cell.mismatch[name], **numbers,
        )  # fmt: skip
    return record, draws


def _thinned(n: int, seed: int, name: str) -> np.ndarray:
    """Positions of at most 3,000 of n rows, each as likely as any other so that their mix stays; whatever else is
    judged does not change them.
    """
    if n <= _MAX_KERNEL:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, 53, *name.encode()]).choice(n, _MAX_KERNEL, replace=False))


def neighbourhoods(
    reference: np.ndarray,
    sample: np.ndarray,
    k: int = 5,
    most: int = 2000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) with k neighbours.

    Args:
        reference: Real features [N, d].
        sample: Features [M, d].
        k: Neighbours.
        most: Both sides are subsampled to at most this many.
        seed: Seed of that.
        groups: Group of each real row, such as its class [N]. With these ``coverage_lowest`` is the coverage of the
            group that is covered least (of those with 20 rows): a mode that is never drawn shows there first.
    """
    rng = np.random.default_rng(seed)
    n = min(len(reference), len(sample), most)
    if n <= k:
        return {"precision": None, "recall": None, "density": None, "coverage": None, "n": n, "k": k}
    chosen = [np.sort(rng.choice(len(x), n, replace=False)) for x in (reference, sample)]
    real, fake = (np.asarray(x[rows], np.float64) for x, rows in zip((reference, sample), chosen, strict=True))
    between = _distances(real, fake)
    radius_real = np.partition(_distances(real, real), k, axis=1)[:, k]  # index 0 is the point itself
    radius_fake = np.partition(_distances(fake, fake), k, axis=1)[:, k]
    inside = between <= radius_real[:, None]
    covered = np.asarray(inside.any(axis=1))
    lowest: dict[str, float] = {}
    if groups is not None:
        mine = groups[chosen[0]].astype(str)
        shares = [float(covered[mine == g].mean()) for g in np.unique(mine) if (mine == g).sum() >= 20]
        lowest = {"coverage_lowest": min(shares)} if shares else {}
    return lowest | {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between <= radius_fake[None, :]).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / k),
        "coverage": float(covered.mean()),
        "n": n,
        "k": k,
    }


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0.0))


def overall(study: Study, features: Features, cell: Comparison, seed: int) -> dict[str, Any]:
    """Precision, recall, density, coverage and the Fréchet distance for endless samples of each arm and of other real
    patients, in the test patches' mix.

    Args:
        study: The cohort.
        features: Features of one encoder.
        cell: Of every class and site, from :func:`latent_medi.evaluation.cohort.comparison_sets.comparison_for`.
        seed: Seed of the subsamples.

    Returns:
        A record by arm and floor, of those that the cell has.
    """
    result: dict[str, Any] = {}
    people = len(_people(study, [cell.reference]))
    for name, rows in cell.rows.items():
        sample = (features.real if name == FLOOR else features.synthetic[name])[rows]
        reference = features.real[cell.reference]
        result[name] = neighbourhoods(reference, sample, seed=seed)
        found = fd_infinity(reference, sample, seed=seed)
        result[name] |= {"fd_infinity": found and found[0], "fd_infinity_error": found and found[1]}
        result[name]["n_patients"] = min(people, len(_people(study, [rows]))) if name == FLOOR else people
        result[name]["mix_mismatch"] = cell.mismatch[name]
    return result
