"""Nearest neighbours in feature space, in blocks on any device: no matrix of all pairs is ever held.

Between L2-normalised rows the cosine distance is 1 − cos(a, b) = ½·|a − b|², from 0 (the same direction) to 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from scipy.spatial.distance import cdist

from latent_medi.core.progress import progress

_QUERIES, _BANK = 1024, 16384  # rows per block: 64 MiB of distances in float32
_ROUNDING = 1e-5  # of a float32 cosine distance, generously


def nearest_neighbours(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int = 1,
    exclude: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str | torch.device = "cpu",
    desc: str = "nearest patches",
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and positions of the ``k`` nearest rows of the bank to each query, nearest first.

    Args:
        queries: [N, d].
        bank: [M, d].
        k: Neighbours, at most M.
        exclude: Pairs of integer codes of the queries [N] and of the bank [M], such as their patients: a query and a
            row of the bank with the same code in any pair are no neighbours.
        device: Torch device of the products.
        desc: Name of the progress display.

    Returns:
        Euclidean distances, float64 [N, k], and positions in the bank, int64 [N, k]. Where fewer than ``k`` neighbours
        are left, the distance is infinite.
    """
    squared, found = _nearest(queries, bank, k, exclude, device, desc)
    return np.sqrt(squared), found


def nearest_cosine_distance(
    queries: np.ndarray,
    bank: np.ndarray,
    exclude: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str | torch.device = "cpu",
    desc: str = "nearest patches",
) -> np.ndarray:
    """Cosine distance from each query to the nearest row of the bank, float64 [N]; see :func:`nearest_neighbours`.

    Queries and bank are L2-normalised. The distance of a copy is exactly 0.
    """
    return _nearest(queries, bank, 1, exclude, device, desc)[0][:, 0] / 2


def _nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    exclude: Sequence[tuple[np.ndarray, np.ndarray]],
    device: str | torch.device,
    desc: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and positions. Float32 products rank the candidates; the distances returned are exact."""
    where = torch.device(device)
    k = min(k, len(bank))
    # Around the common mean, so that the squares in |a|² + |b|² − 2a·b do not cancel.
    centre = bank.mean(axis=0, dtype=np.float64) if len(bank) else 0.0

    def centred(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((rows - centre).astype(np.float32)).to(where)

    codes = [(torch.as_tensor(q).to(where), torch.as_tensor(b).to(where)) for q, b in exclude]
    best = torch.full((len(queries), k), torch.inf, device=where)
    found = torch.full((len(queries), k), -1, dtype=torch.int64, device=where)
    steps = list(product(range(0, len(bank), _BANK), range(0, len(queries), _QUERIES)))
    sizes = [min(_QUERIES, len(queries) - start) * min(_BANK, len(bank) - first) for first, start in steps]
    for first, start in progress(steps, desc=desc, unit="pairs", each=sizes):
        if start == 0:
            block = centred(bank[first : first + _BANK])
        part = slice(start, start + _QUERIES)
        x = centred(queries[part])
        squared = (x * x).sum(1)[:, None] + (block * block).sum(1)[None] - 2 * x @ block.T
        for of_query, of_bank in codes:
            squared.masked_fill_(of_query[part][:, None] == of_bank[first : first + _BANK][None], torch.inf)
        value, place = squared.topk(min(k, len(block)), largest=False)
        place = torch.where(torch.isinf(value), -1, place + first)
        best[part], order = torch.cat([best[part], value], 1).topk(k, largest=False)
        found[part] = torch.cat([found[part], place], 1).gather(1, order)
    positions = found.cpu().numpy()
    distances = np.full(positions.shape, np.inf)
    for column in range(k):
        known = np.flatnonzero(positions[:, column] >= 0)
        distances[known, column] = _squared_distance(queries, bank, known, positions[known, column])
    return distances, np.maximum(positions, 0)


def _squared_distance(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """|a[rows[i]] − b[columns[i]]|² for each i, float64."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), _BANK):
        part = slice(start, start + _BANK)
        difference = a[rows[part]].astype(np.float64) - b[columns[part]]
        result[part] = (difference * difference).sum(axis=1)
    return result


def normalise(features: np.ndarray) -> np.ndarray:
    """Give every row of float32 [N, d] the length 1, in place; a row of zeros stays. Returns the array."""
    for start in range(0, len(features), _BANK):
        part = features[start : start + _BANK]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return features


def squared_distances(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance to each centroid, float64 [N, G]: HistoDiffusion's filter, up to its factor 1/d."""
    starts = range(0, len(features), _BANK)
    return np.concatenate([cdist(features[i : i + _BANK], centroids, "sqeuclidean") for i in starts])


def without_near_duplicates(features: np.ndarray, threshold: float, device: str = "cpu") -> np.ndarray:
    """Which rows stay if each row closer than ``threshold`` to an earlier row that stays is dropped.

    Args:
        features: Normalised features [N, d], the best first.
        threshold: Cosine distance.
        device: Torch device of the products.

    Returns:
        bool [N].
    """
    where = torch.device(device)
    keep = np.ones(len(features), bool)
    for start in progress(range(0, len(features), _QUERIES), len(features), "near duplicates", "patches", _QUERIES):
        stop = min(start + _QUERIES, len(features))
        mine = torch.from_numpy(features[start:stop]).to(where)
        alive = np.ones(stop - start, bool)
        for first in range(0, start, _BANK):
            bank = np.flatnonzero(keep[first : min(first + _BANK, start)]) + first
            rows, columns = _close(mine, features[bank], threshold, where)
            near = _squared_distance(features, features, rows + start, bank[columns]) < 2 * threshold
            alive[rows[near]] = False
        rows, columns = _close(mine, features[start:stop], threshold, where)
        later = rows > columns
        rows, columns = rows[later], columns[later]
        near = _squared_distance(features, features, rows + start, columns + start) < 2 * threshold
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
