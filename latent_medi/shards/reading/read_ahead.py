"""Patches that threads decode before they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.remote import RemotePatchDataset


def read_ahead_threads(device: torch.device, data: PatchDataset) -> int:
    """The default number of threads that read ahead of a network on a device.

    On a CPU none: decoding would compete with the network for the cores. A GPU, or waiting for a server, leaves them
    free.
    """
    return 4 if device.type != "cpu" or isinstance(data, RemotePatchDataset) else 0


class ReadAhead:
    """Reads rows of a dataset; announced rows are read in the background.

    Args:
        dataset: Local or remote.
        workers: Threads; with 0 the caller's thread reads, and announcements have no effect.
        keep: Most announcements to hold; then the oldest one that was not read is dropped.
    """

    def __init__(self, dataset: PatchDataset, workers: int, keep: int = 4) -> None:
        self.dataset, self.workers, self.keep = dataset, workers, keep
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") if workers else None
        self._coming: OrderedDict[bytes, list[Future[np.ndarray]]] = OrderedDict()

    def expect(self, rows: np.ndarray) -> None:
        """Announce that these rows (int64) will be read, in this order and together."""
        key = rows.tobytes()
        if self._pool is None or key in self._coming or not len(rows):
            return
        # Parts of neighbouring rows, since each opens its shards itself; two per thread, so that none waits for long.
        parts = np.array_split(rows, min(len(rows), 2 * self.workers))
        self._coming[key] = [self._pool.submit(self.dataset.read, part) for part in parts]
        while len(self._coming) > self.keep:
            for future in self._coming.popitem(last=False)[1]:
                future.cancel()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Patches of these rows (int64), uint8 [n, H, W, 3], announced or not.

        Raises:
            UserError: A patch is damaged or missing (named).
        """
        futures = self._coming.pop(rows.tobytes(), None)
        if futures is None:
            return self.dataset.read(rows, self.workers)
        return np.concatenate([future.result() for future in futures])

    def batches(self, rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers int64 [n] and patches uint8 [n, H, W, 3] of all rows in their order, two batches ahead."""
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        for i, part in enumerate(parts):
            for later in parts[i : i + 3]:
                self.expect(later)
            yield part, self.read(part)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
