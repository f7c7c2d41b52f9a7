"""Precision, recall, density and coverage from nearest neighbours in feature space."""

from __future__ import annotations

import numpy as np

from latent_medi.evaluation.fidelity.records import Neighbourhoods


def neighbourhoods(
    reference: np.ndarray,
    sample: np.ndarray,
    k: int = 5,
    most: int = 2000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Neighbourhoods:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) with k neighbours.

    Args:
        reference: Real features [N, d].
        sample: Features [M, d].
        k: Neighbours.
        most: Both sets are subsampled to at most this many.
        seed: Seed of that.
        groups: Group of each real row, such as its class [N]. With these ``coverage_lowest`` is the coverage of the
            group that is covered least (of those with 20 rows): a mode that is never drawn shows there first.
    """
    rng = np.random.default_rng(seed)
    n = min(len(reference), len(sample), most)
    if n <= k:
        return Neighbourhoods(None, None, None, None, n, k)
    chosen = [np.sort(rng.choice(len(x), n, replace=False)) for x in (reference, sample)]
    real, fake = (np.asarray(x[rows], np.float64) for x, rows in zip((reference, sample), chosen, strict=True))
    between = _distances(real, fake)
    radius_real = np.partition(_distances(real, real), k, axis=1)[:, k]  # index 0 is the point itself
    radius_fake = np.partition(_distances(fake, fake), k, axis=1)[:, k]
    inside = between <= radius_real[:, None]
    covered = np.asarray(inside.any(axis=1))
    lowest: float | None = None
    if groups is not None:
        mine = groups[chosen[0]].astype(str)
        shares = [float(covered[mine == g].mean()) for g in np.unique(mine) if (mine == g).sum() >= 20]
        lowest = min(shares, default=None)
    return Neighbourhoods(
        precision=float(inside.any(axis=0).mean()),
        recall=float((between <= radius_fake[None, :]).any(axis=1).mean()),
        density=float(inside.sum(axis=0).mean() / k),
        coverage=float(covered.mean()),
        n=n,
        k=k,
        coverage_lowest=lowest,
    )


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2 * a @ b.T
    result: np.ndarray = np.sqrt(np.maximum(squared, 0.0))
    return result
