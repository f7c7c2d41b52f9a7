"""Subsamples: groups or patients in turn, so that no large one crowds out the others."""

from __future__ import annotations

import numpy as np
import pandas as pd


def balanced_draw(groups: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` positions, groups in equal parts; a group repeats its members only after all of them have been drawn."""
    names = np.unique(groups)
    quota = np.full(len(names), n // len(names))
    quota[rng.permutation(len(names))[: n - quota.sum()]] += 1
    parts = [repeated_draw(np.flatnonzero(groups == g), q, rng) for g, q in zip(names, quota, strict=True)]
    return np.concatenate([np.zeros(0, int), *parts])


def repeated_draw(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` of ``rows`` in random order, each used equally often up to one."""
    if len(rows) == 0 or n == 0:
        return np.zeros(0, int)
    rounds = -(-n // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:n]


def patients_in_turn(patients: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of at most ``most`` rows, patients in turn, so that as many patients as possible take part.

    Args:
        patients: Patient of each row, [N].
        most: How many; all rows, in their order, if there are no more.
        rng: Chooses among a patient's rows.
    """
    if len(patients) <= most:
        return np.arange(len(patients))
    rows = rng.permutation(len(patients))
    order = np.argsort(patients[rows], kind="stable")
    starts = np.unique(patients[rows][order], return_index=True)[1]
    turn = np.arange(len(rows)) - np.repeat(starts, np.diff([*starts, len(rows)]))
    return rows[order][np.argsort(turn, kind="stable")][:most]


def evenly(patients: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` positions, ascending, taken from the patients in turn. int64."""
    if len(patients) <= most:
        return np.arange(len(patients))
    order = np.random.default_rng([seed, 11]).permutation(len(patients))
    _, codes = np.unique(patients.astype(str), return_inverse=True)
    turn = np.empty(len(patients), np.int64)  # how many of the same patient came before
    by_patient = order[np.argsort(codes[order], kind="stable")]
    starts = np.r_[0, np.cumsum(np.bincount(codes))[:-1]]
    turn[by_patient] = np.arange(len(patients)) - starts[codes[by_patient]]
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


def spread(patients: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` positions, patients in equal parts as far as they reach, drawn without replacement; ascending."""
    order = np.random.default_rng([seed, 13]).permutation(len(patients))
    turn = pd.Series(patients[order]).groupby(patients[order], sort=False).cumcount().to_numpy()
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])
