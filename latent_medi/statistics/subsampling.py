"""Subsamples that no large group dominates: equal parts of each group, or patients in turn."""

from __future__ import annotations

import numpy as np
import pandas as pd


def balanced_draw(groups: np.ndarray, n: int, rng: np.random.Generator, repeat: bool = True) -> np.ndarray:
    """Positions of ``n`` rows, groups in equal parts.

    Args:
        groups: Group of each row, [N].
        n: How many rows to draw.
        rng: Draws the rows, and the groups that give one more where ``n`` cannot be divided evenly.
        repeat: A small group repeats its rows once each has been drawn. If False, no row is drawn twice: small groups
            give fewer rows, and every group may give n / groups, rounded up.
    """
    names = np.unique(groups)
    quota = np.full(len(names), n // len(names) if repeat else -(-n // len(names)))
    if repeat:
        quota[rng.permutation(len(names))[: n - quota.sum()]] += 1
    members = [np.flatnonzero(groups == name) for name in names]
    drawn = [repeated_draw(m, q if repeat else min(q, len(m)), rng) for m, q in zip(members, quota, strict=True)]
    return np.concatenate([np.zeros(0, int), *drawn])


def repeated_draw(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` of ``rows`` in random order; how often two rows are drawn differs by one at most."""
    if len(rows) == 0 or n == 0:
        return np.zeros(0, int)
    rounds = -(-n // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:n]


def patients_in_turn(
    patients: np.ndarray, most: int, rng: np.random.Generator, last_by_name: bool = False
) -> np.ndarray:
    """Positions of at most ``most`` rows, ascending: one of each patient, then a second of each, and so on.

    Args:
        patients: Patient of each row, [N].
        most: Number of rows to draw; with no more rows than that, all are taken.
        rng: Draws among a patient's rows, and among the patients of the last turn, which not all may reach.
        last_by_name: Take the patients of the last turn in the order of their names instead.
    """
    if len(patients) <= most:
        return np.arange(len(patients))
    drawn = rng.permutation(len(patients))
    order = pd.DataFrame({"patient": patients[drawn], "row": drawn})
    order["turn"] = order.groupby("patient").cumcount()
    by = ["turn", "patient"] if last_by_name else ["turn"]
    return np.sort(order.sort_values(by, kind="stable")["row"].to_numpy()[:most])


def whole_patients(patients: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of at most ``most`` rows, ascending: all rows of patients in random order, until there are enough."""
    if len(patients) <= most:
        return np.arange(len(patients))
    names, codes = np.unique(patients, return_inverse=True)
    place = rng.permutation(len(names))[codes]
    return np.sort(np.argsort(place, kind="stable")[:most])
