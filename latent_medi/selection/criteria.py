"""What tells a good synthetic patch from a bad one, beside distances and probes: centroids, pixels, ranks in a cell.

Arrays in, arrays out. Features are L2-normalised rows.
"""

from __future__ import annotations

import hashlib

import numpy as np

from latent_medi.core.progress import progress
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.additive_effects import patient_weights


def class_centroids(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean normalised feature of each label, every patient weighing the same.

    Returns:
        The labels in order and float64 [G, d].
    """
    weights = patient_weights(labels, patients)
    names = sorted(set(labels.tolist()))
    centroids = [weights[labels == name] @ features[labels == name].astype(np.float64) for name in names]
    return names, np.stack(centroids)


def pixel_identities(dataset: PatchDataset, rows: np.ndarray, batch: int, workers: int = 0) -> list[bytes]:
    """What patches with the same pixels have in common, turned or mirrored too: the least SHA-256 of the 8 views."""
    result = []
    batches = dataset.iterate(rows, batch, workers)
    for _, images in progress(batches, -(-len(rows) // batch), f"pixels of {dataset.name}", "batch"):
        for image in images:
            turned = [np.rot90(image, k) for k in range(4)]
            views = [*turned, *(view[:, ::-1] for view in turned)]
            result.append(min(hashlib.sha256(np.ascontiguousarray(view).tobytes()).digest() for view in views))
    return result


def best_per_cell(scores: np.ndarray, keys: np.ndarray, cells: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The best-ranked rows of each cell.

    Args:
        scores: The lower the better, [N]; infinity for what is never chosen. Equal ones are ranked by key.
        keys: A different string per row, [N].
        cells: Cell of each row, int from 0, [N].
        most: Rows to choose at most, by cell.

    Returns:
        bool [N].
    """
    order = np.lexsort((keys, scores, cells))
    ordered = cells[order]
    starts = np.searchsorted(ordered, np.arange(len(most)))
    place = np.arange(len(order)) - starts[ordered]
    chosen = np.zeros(len(order), bool)
    chosen[order] = (place < most[ordered]) & np.isfinite(scores[order])
    return chosen
