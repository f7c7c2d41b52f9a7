"""Draws of rows in the mix of a reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


class Matched:
    """Rows to subsample so that their mix of strata follows a target's.

    Args:
        rows: Row numbers to draw from.
        strata: Stratum of each of them.
        target: Stratum of each row of the target.
        tolerance: Share of a sample that may lie in the wrong stratum because the right one has run out.
    """

    def __init__(self, rows: np.ndarray, strata: np.ndarray, target: np.ndarray, tolerance: float = 0.02) -> None:
        self.rows = np.asarray(rows)
        names, counts = np.unique(np.asarray(target, str), return_counts=True)
        self.share = counts / max(counts.sum(), 1)
        labels = np.asarray(strata, str)
        place = np.searchsorted(names, labels)
        found = np.flatnonzero(names[np.minimum(place, len(names) - 1)] == labels) if len(names) else place[:0]
        order = found[np.argsort(place[found], kind="stable")]
        self.members = np.split(order, np.searchsorted(place[order], np.arange(1, len(names))))[: len(names)]
        self.available = np.array([len(m) for m in self.members])
        self.missing = float(self.share[self.available == 0].sum())
        low, high = 0, len(self.rows)
        while low < high:
            middle = (low + high + 1) // 2
            short = np.maximum(self._quota(middle) - self.available, 0).sum() / middle
            low, high = (middle, high) if short <= self.missing + tolerance else (low, middle - 1)
        self.largest = low
        """Largest sample that stays within the tolerance."""

    def _quota(self, n: int) -> np.ndarray:
        exact = n * self.share
        quota = np.floor(exact).astype(int)
        rest = np.argsort(-(exact - quota), kind="stable")[: n - quota.sum()]
        quota[rest] += 1
        result: np.ndarray = quota
        return result

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """``n`` rows without repeats, and the share of them that stands in for a stratum that has run out."""
        n = min(n, len(self.rows))
        chosen = [
            rng.choice(members, min(quota, len(members)), replace=False)
            for members, quota in zip(self.members, self._quota(n), strict=True)
        ]
        picked = np.concatenate([np.zeros(0, int), *chosen])
        left = np.setdiff1d(np.arange(len(self.rows)), picked)
        fill = rng.choice(left, n - len(picked), replace=False)
        return self.rows[np.sort(np.concatenate([picked, fill]))], (len(fill) / n if n else 0.0)


def strata(index: pd.DataFrame, rows: np.ndarray, fields: Sequence[str]) -> np.ndarray:
    """One label per row that joins its values of several fields."""
    columns = [index[name].iloc[rows].astype(str).to_numpy(object) for name in fields]
    result: np.ndarray = columns[0] if columns else np.full(len(rows), "", dtype=object)
    for column in columns[1:]:
        result = result + "|" + column
    return result
