"""The training row at each position of a run, for all processes alike.

A position counts the images of the whole run, over all processes and epochs. The order is a pure function of the seed,
so any number of processes and any resume see the same rows. Batches may span epochs; no row is dropped or repeated.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_BLOCK = 4096  # positions whose weighted draws share one generator
_EPOCH, _DRAW = 0, 1  # two independent random streams from one seed


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the data are smaller than the batch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(n)`` in which an epoch visits the rows.

    Returns:
        int64 [n], read-only because it is cached.
    """
    order = np.random.default_rng([_EPOCH, seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=4)
def _uniforms(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng([_DRAW, seed, block]).random(_BLOCK)


def rows_at(first_image: int, count: int, n: int, seed: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The rows at positions ``first_image`` … ``first_image + count - 1`` of the run.

    Without weights, positions ``[e·n, (e+1)·n)`` are a permutation of all rows for every epoch ``e``. With weights,
    each position is an independent draw with replacement, a pure function of (seed, position).

    Args:
        first_image: First position, from 0.
        count: Number of positions.
        n: Number of training rows.
        seed: Seed of the run, >= 0.
        weights: float [n], >= 0; only their ratios matter.

    Returns:
        int64 [count], each in ``[0, n)``.
    """
    if n < 1:
        raise ValueError("There is no row to draw from.")
    last = first_image + count
    if weights is None:
        parts = []
        for epoch in range(first_image // n, (last - 1) // n + 1):
            start = epoch * n
            parts.append(epoch_order(n, seed, epoch)[max(first_image - start, 0) : last - start])
    else:
        cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
        parts = []
        for block in range(first_image // _BLOCK, (last - 1) // _BLOCK + 1):
            start = block * _BLOCK
            uniform = _uniforms(seed, block)[max(first_image - start, 0) : last - start]
            # side="right" never lands on a row of weight zero; the clip guards the rounding of the last product.
            parts.append(np.minimum(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), n - 1))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def rank_slice(rank: int, processes: int) -> slice:
    """The positions of a global batch that a process trains on.

    It takes every ``processes``-th position, so that stratified draws stay stratified in each share.
    """
    return slice(rank, None, processes)


def balance_weights(combinations: np.ndarray, temperature: float) -> np.ndarray:
    """Weights that make rare combinations more frequent: count(combination) ** -temperature.

    Args:
        combinations: Any [n, k]; a row per sample.
        temperature: 0 keeps the frequencies of the data, 1 draws every combination equally often.

    Returns:
        float64 [n] that sums to 1.
    """
    _, inverse, counts = np.unique(combinations, axis=0, return_inverse=True, return_counts=True)
    weights = counts[inverse.reshape(-1)].astype(np.float64) ** -temperature
    return weights / weights.sum()
