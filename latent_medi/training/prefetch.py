"""Batches prepared ahead by threads, in order, and few at a time so that memory stays small."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from joblib import cpu_count

from latent_medi.diffusion.settings import DropoutSettings

MOST_THREADS = 4


T = TypeVar("T")


class RunData(Protocol):
    """The rows that a run trains on.

    Its batches have ``pinned()``, the same in pinned memory, and ``parts(size, device)``, the batch on a device in
    parts of at most ``size`` images.
    """

    keys: np.ndarray

    def at(self, number: int, batch: int, seed: int) -> np.ndarray:
        """Positions in :attr:`keys` of the ``number``-th global batch, int64 [batch]."""

    def batch(
        self, number: int, batch: int, seed: int, timesteps: int, dropout: DropoutSettings, rank: int, processes: int
    ) -> Any:
        """A process's share of the ``number``-th global batch."""

    @property
    def in_order(self) -> bool:
        """Whether batches are to be requested one after the other."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON-able."""


def threads_for(data: RunData, device: torch.device) -> int:
    """Number of threads that prepare batches for a device: 0 for a CPU, whose cores the network needs.

    Every process draws the whole global batch, so a batch takes longer the more devices share it. Torch computes
    without Python's lock, so threads draw in parallel. Data with readers of their own, such as those of an autoencoder
    in the loop, need their announcements in order; they get one thread.
    """
    if device.type == "cpu":
        return 0
    if data.in_order:
        return 1
    cores = cpu_count()
    mine = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MOST_THREADS, mine - 1))


@contextmanager
def made_ahead(
    make: Callable[[int], T], steps: Sequence[int], threads: int, device: torch.device
) -> Iterator[Iterator[T]]:
    """The batches of some updates, in order.

    Args:
        make: Makes the batch of an update; called in several threads.
        steps: The updates.
        threads: Threads that make them; 0 makes each batch when it is requested. At most one batch more than there are
            threads exists at a time.
        device: Where the batches go.

    Returns:
        An iterator over the batches. An error in ``make`` is raised at its batch.
    """
    if not threads:
        yield map(make, steps)
        return
    pool = ThreadPoolExecutor(threads, "batches", _choose, (device,))

    def batches() -> Iterator[T]:
        left, coming = iter(steps), deque[Future[T]]()
        coming.extend(pool.submit(make, step) for step in islice(left, threads + 1))
        while coming:
            ready = coming.popleft().result()
            coming.extend(pool.submit(make, step) for step in islice(left, 1))
            yield ready

    try:
        yield batches()
    finally:
        pool.shutdown(cancel_futures=True)


def _choose(device: torch.device) -> None:
    """Select a device in this thread; new threads start with the first device."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
