"""Nearest neighbours in feature space, in blocks, on any device.

Between L2-normalised rows the distance is the cosine distance 1 − cos(a, b) = ½·|a − b|², from 0 (the same direction)
to 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latent_medi.core.progress import progress
from latent_medi.statistics.distances import blocks

_QUERIES, _BANK = 1024, 16384  # rows per block: 64 MiB of distances in float32
_ROUNDING = 1e-5  # of a float32 cosine distance, generously


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


def normalise(features: np.ndarray) -> np.ndarray:
    """Give every row of float32 [N, d] the length 1, in place; a row of zeros stays. Returns the array."""
    for start in range(0, len(features), _BANK):
        part = features[start : start + _BANK]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return features


def squared_distances(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance to each centroid, float64 [N, G]: HistoDiffusion's filter, up to its factor 1/d."""
    result = np.empty((len(features), len(centroids)))
    for start in range(0, len(features), _BANK):
        x = features[start : start + _BANK].astype(np.float64)
        cross = x @ centroids.T
        result[start : start + _BANK] = (x * x).sum(1)[:, None] + (centroids * centroids).sum(1)[None] - 2 * cross
    return np.maximum(result, 0.0)


def nearest_distances(
    queries: np.ndarray,
    bank: np.ndarray,
    apart: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str = "cpu",
    desc: str = "nearest patches",
) -> np.ndarray:
    """Cosine distance from each query to the nearest row of the bank, in blocks: no N × M matrix is ever held.

    Args:
        queries: Normalised features [N, d].
        bank: Normalised features [M, d].
        apart: Integer codes of the queries and of the bank: pairs with the same code in any are left out.
        device: Torch device of the products.
        desc: What the progress line calls it.

    Returns:
        float64 [N]; infinity where every pair is left out.
    """
    where = torch.device(device)
    best = np.full(len(queries), -np.inf, np.float32)
    found = np.zeros(len(queries), np.int64)
    codes = [(torch.as_tensor(q).to(where), torch.as_tensor(b).to(where)) for q, b in apart]
    for start in progress(range(0, len(bank), _BANK), desc=desc, unit="block"):
        block = torch.from_numpy(bank[start : start + _BANK]).to(where)
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            cosine = torch.from_numpy(queries[part]).to(where) @ block.T
            for of_query, of_bank in codes:
                same = of_query[part][:, None] == of_bank[start : start + _BANK][None]
                cosine.masked_fill_(same, -torch.inf)
            value, position = (t.cpu().numpy() for t in cosine.max(dim=1))
            better = value > best[part]
            best[part] = np.where(better, value, best[part])
            found[part] = np.where(better, position + start, found[part])
    # The products rank; what is compared with a threshold is exact, down to a distance of 0 for a copy.
    result = _exact(queries, bank, np.arange(len(queries)), found)
    result[np.isneginf(best)] = np.inf
    return result


def _exact(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    result = np.empty(len(rows))
    for start in range(0, len(rows), _BANK):
        part = slice(start, start + _BANK)
        difference = a[rows[part]].astype(np.float64) - b[columns[part]]
        result[part] = (difference * difference).sum(axis=1) / 2
    return result


def without_near_duplicates(features: np.ndarray, threshold: float, device: str = "cpu") -> np.ndarray:
    """Which rows stay if every row that is closer than ``threshold`` to an earlier one that stays is dropped.

    Args:
        features: Normalised features [N, d], the best first.
        threshold: Cosine distance.
        device: Torch device of the products.

    Returns:
        bool [N].
    """
    where = torch.device(device)
    keep = np.ones(len(features), bool)
    for start in progress(range(0, len(features), _QUERIES), desc="near duplicates", unit="block"):
        stop = min(start + _QUERIES, len(features))
        mine = torch.from_numpy(features[start:stop]).to(where)
        alive = np.ones(stop - start, bool)
        for first in range(0, start, _BANK):
            bank = np.flatnonzero(keep[first : min(first + _BANK, start)]) + first
            rows, columns = _close(mine, features[bank], threshold, where)
            near = _exact(features, features, rows + start, bank[columns]) < threshold
            alive[rows[near]] = False
        rows, columns = _close(mine, features[start:stop], threshold, where)
        later = rows > columns
        rows, columns = rows[later], columns[later]
        near = _exact(features, features, rows + start, columns + start) < threshold
        order = np.argsort(rows[near], kind="stable")
        for row, column in zip(rows[near][order].tolist(), columns[near][order].tolist(), strict=True):
            # In order of rows: whether the earlier one of the pair stays is settled.
            if alive[column]:
                alive[row] = False
        keep[start:stop] = alive
    return keep


def _close(
    mine: torch.Tensor, bank: np.ndarray, threshold: float, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that may be closer than the threshold, as far as float32 can tell."""
    pairs = torch.nonzero(mine @ torch.from_numpy(bank).to(device).T > 1.0 - threshold - _ROUNDING)
    rows, columns = pairs.T.cpu().numpy()
    return rows, columns
