"""Mean of a score over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class MeanOverSeeds:
    """Mean of a score over seeds.

    Args:
        mean: Mean.
        sem: Standard error, s/√n with n − 1 in s; null for a single seed.
        by_seed: Score of each seed.
    """

    mean: float
    sem: float | None
    by_seed: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanOverSeeds:
        """Mean of a score by seed, and its standard error."""
        n, mean = len(values), fmean(values)
        sem = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else None
        return cls(mean, sem, [float(v) for v in values])
