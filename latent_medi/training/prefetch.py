"""Batches made before they are asked for: several at a time, in order, and only so many that memory stays small."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import torch

from latent_medi.latents.stream import StreamedLatents
from latent_medi.training.data import Batch, TrainingData

MOST_THREADS = 4


def threads_for(data: TrainingData, device: torch.device) -> int:
    """How many threads should make batches beside a device: none beside a CPU, where they would be in its way.

    A batch is drawn for all processes, so that it takes the longer the more devices share it; torch computes without
    Python's lock, so that threads do draw at the same time. An autoencoder in the loop has threads of its own, which
    are told in order what to read.
    """
    if device.type == "cpu":
        return 0
    if isinstance(data.store, StreamedLatents):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mine = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MOST_THREADS, mine - 1))


@contextmanager
def made_ahead(
    make: Callable[[int], Batch], steps: Sequence[int], threads: int, device: torch.device
) -> Iterator[Iterator[Batch]]:
    """The batches of some updates, one after the other.

    Args:
        make: Makes the batch of an update; called in several threads.
        steps: The updates.
        threads: Threads that make them; 0 makes each where it is asked for. One batch more than threads is made or
            waits.
        device: Where the batches go.

    Returns:
        An iterator over the batches; what making one raised, it raises at that one.
    """
    if not threads:
        yield map(make, steps)
        return
    pool = ThreadPoolExecutor(threads, "batches", _choose, (device,))

    def batches() -> Iterator[Batch]:
        left, coming = iter(steps), deque[Future[Batch]]()
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
    """Make a device this thread's own; new threads begin with the first."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
