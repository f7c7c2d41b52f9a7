"""Batches of patches for any number of nodes, processes and loader workers, each patch exactly once per epoch.

The order is drawn over the whole index before it is divided, so it depends neither on the number of shards nor on the
processes: the images of an update are a function of (order, images seen) alone. No loader state has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from latent_medi.core.errors import UserError, needs
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.samples import samples

if TYPE_CHECKING:
    import webdataset

Order = Callable[[int, int], np.ndarray]
"""(first image, count) to the rows at these positions of the run, int64 [count]."""


def webdataset_of(dataset: PatchDataset) -> webdataset.DataPipeline:
    """A ``webdataset`` pipeline over the tars, local or behind any URL that fsspec opens, in their order.

    Shards are divided over processes and loader workers, as ``webdataset`` does. A sample holds ``__key__``, ``png``,
    ``jpg`` or ``webp`` (bytes) and ``json`` (bytes), compared with their checksums; add ``webdataset.shuffle``,
    ``webdataset.decode`` and others with ``pipeline.append(…)``. :class:`PatchStream` needs no such package, and reads
    every patch equally often.

    Raises:
        UserError: ``webdataset`` is not installed.
    """
    with needs("A webdataset pipeline", "webdataset"):
        import webdataset

    return webdataset.DataPipeline(
        webdataset.SimpleShardList([shard["file"] for shard in dataset.info["shards"]]),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        partial(_samples, dataset),
    )


def _samples(dataset: PatchDataset, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples of some shards; read by the index, since webdataset takes a damaged header for the end of a tar."""
    for shard in shards:
        rows = dataset.rows_of_shard.get(shard["url"], np.zeros(0, np.int64))
        for key, image, text in samples(dataset, rows):
            yield {"__key__": key, "__url__": shard["url"], dataset.info["codec"]: image, "json": text}


@dataclass(frozen=True)
class PatchBatch:
    """One process's share of a global batch.

    Args:
        rows: int64 [n], row numbers of the dataset's index.
        images: uint8 [n, H, W, 3].
        images_seen: Of the whole run, after this batch.
    """

    rows: np.ndarray
    images: np.ndarray
    images_seen: int


def epochs(rows: np.ndarray, seed: int) -> Order:
    """An order that visits every row once per epoch, in a new permutation each epoch.

    Args:
        rows: Row numbers, at least one.
        seed: Seed, >= 0.
    """
    if not len(rows):
        raise UserError("There is no patch to stream.")
    rows = np.asarray(rows, np.int64)

    def order(first: int, count: int) -> np.ndarray:
        n, last = len(rows), first + count
        parts = [np.zeros(0, np.int64)]
        for epoch in range(first // n, -(-last // n)):
            shuffled = rows[np.random.default_rng([seed, epoch]).permutation(n)]
            parts.append(shuffled[max(first - epoch * n, 0) : last - epoch * n])
        return np.concatenate(parts)

    return order


class PatchStream(IterableDataset):
    """Batches for one process, the same whatever the number of loader workers.

    Hand it to ``torch.utils.data.DataLoader(stream, batch_size=None, num_workers=…)``: a batch is an item, and workers
    take turns.

    Args:
        dataset: Local or remote.
        order: The row at each position of the run, the same for all processes, such as :func:`epochs`.
        images: Length of the run over all processes, in images; rounded down to whole global batches, so that every
            process has equally many.
        global_batch: Images per update over all processes; a multiple of ``processes``.
        rank: This process, from 0.
        processes: Processes over all nodes.
        seen: Images seen before, where a run goes on; a multiple of ``global_batch``.

    Raises:
        UserError: Numbers that do not divide.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        order: Order,
        images: int,
        global_batch: int,
        rank: int = 0,
        processes: int = 1,
        seen: int = 0,
    ) -> None:
        if not 0 <= rank < processes:
            raise UserError(f"Process {rank} is not one of {processes}; they count from 0.")
        if global_batch < 1 or global_batch % processes:
            raise UserError(f"{processes} processes cannot share a global batch of {global_batch} equally.")
        if seen % global_batch:
            raise UserError(f"{seen} images seen are no whole number of global batches of {global_batch}.")
        self.dataset, self.order, self.global_batch = dataset, order, global_batch
        self.rank, self.processes = rank, processes
        self.steps = range(seen // global_batch, images // global_batch)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[PatchBatch]:
        worker = get_worker_info()
        mine = self.steps if worker is None else self.steps[worker.id :: worker.num_workers]
        for step in mine:
            first = step * self.global_batch
            rows = self.order(first, self.global_batch)[self.rank :: self.processes]
            yield PatchBatch(rows, self.dataset.read(rows), first + self.global_batch)
