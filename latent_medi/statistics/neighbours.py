"""Nearest neighbours in feature space, in blocks, on any device."""

from __future__ import annotations

import numpy as np
import torch

from latent_medi.core.progress import progress
from latent_medi.statistics.distances import blocks

_QUERIES, _BANK = 1024, 16384  # rows per block: 64 MiB of distances in float32


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int = 1,
    apart: tuple[np.ndarray, np.ndarray] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest rows of the bank to each query, nearest first; no matrix of all pairs is ever held.

    Args:
        queries: [N, d].
        bank: [M, d].
        k: Neighbours, at most M.
        apart: Integer codes of the queries [N] and of the bank [M], such as patients: pairs with the same code are left
            out.
        device: Torch device of the products.

    Returns:
        Euclidean distances, float64 [N, k], and positions in the bank, int64 [N, k]. Where fewer than ``k`` pairs are
        left, the distance is infinite.
    """
    where = torch.device(device)
    k = min(k, len(bank))
    # Around the common mean, so that the squares in |a|² + |b|² − 2a·b do not cancel.
    centre = bank.mean(axis=0, dtype=np.float64)
    centred = torch.empty(bank.shape, dtype=torch.float32, device=where)
    for part in blocks(len(bank)):
        centred[part] = torch.from_numpy((bank[part] - centre).astype(np.float32)).to(where)
    codes = None if apart is None else torch.as_tensor(np.asarray(apart[1])).to(where)
    found = np.zeros((len(queries), k), np.int64)
    starts = range(0, len(queries), _QUERIES)
    for start in progress(starts, desc="nearest patches", unit="block") if len(starts) > 8 else starts:
        part = slice(start, start + _QUERIES)
        x = torch.from_numpy((queries[part] - centre).astype(np.float32)).to(where)
        best = torch.full((len(x), k), torch.inf, device=where)
        position = torch.zeros((len(x), k), dtype=torch.int64, device=where)
        mine = None if apart is None else torch.as_tensor(np.asarray(apart[0])[part]).to(where)
        for first in range(0, len(bank), _BANK):
            block = centred[first : first + _BANK]
            squared = (x * x).sum(1)[:, None] + (block * block).sum(1)[None] - 2 * x @ block.T
            if mine is not None and codes is not None:
                squared.masked_fill_(mine[:, None] == codes[first : first + _BANK][None], torch.inf)
            value, place = squared.topk(min(k, block.shape[0]), largest=False)
            value, order = torch.cat([best, value], 1).topk(k, largest=False)
            position = torch.cat([position, place + first], 1).gather(1, order)
            best = value
        found[part] = position.cpu().numpy()
        lost = torch.isinf(best).cpu().numpy()
        found[part][lost] = -1
    # The products rank; what is told is exact.
    distance = np.full(found.shape, np.inf)
    for column in range(k):
        there = np.flatnonzero(found[:, column] >= 0)
        for start in range(0, len(there), _BANK):
            rows = there[start : start + _BANK]
            difference = queries[rows].astype(np.float64) - bank[found[rows, column]]
            distance[rows, column] = np.sqrt((difference * difference).sum(axis=1))
    return distance, np.maximum(found, 0)
