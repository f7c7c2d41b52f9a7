"""The loader's part of the rehearsal: training batches from files that are mapped, in one process and in two."""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256

_together: list[Any] = []
"""A barrier of the processes that load at the same time."""


def _meet(barrier: Any) -> None:
    _together.append(barrier)


def load(data: Path, latents: Path, rank: int, processes: int, batches: int) -> tuple[float, float, float]:
    """Samples per second of one training process, wall and processor time, and its peak memory in GiB."""
    from latent_medi.diffusion.settings import DropoutSettings
    from latent_medi.training.data import open_data
    from latent_medi.training.settings import TrainSettings

    settings = TrainSettings(
        data=str(data), latents=str(latents), out="", split="medi", resident="mmap", balance=["class"]
    )
    rows = open_data(settings, None)
    rows.batch(0, BATCH, 0, 1000, DropoutSettings(), rank, processes)
    _together[0].wait(600)
    start, busy = time.perf_counter(), time.process_time()
    for number in range(1, 1 + batches):
        rows.batch(number, BATCH, 0, 1000, DropoutSettings(), rank, processes)
    mine = batches * BATCH / processes
    rate, processor = mine / (time.perf_counter() - start), mine / (time.process_time() - busy)
    return rate, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def loader(data: Path, latents: Path, processes: int, batches: int) -> dict[str, float]:
    """What each of so many processes loads at the same time, on average."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _meet, (context.Barrier(processes),)) as pool:
        tasks = [pool.submit(load, data, latents, rank, processes, batches) for rank in range(processes)]
        found = np.array([task.result() for task in tasks])
    means = {"samples_per_s_each": found[:, 0].mean(), "samples_per_processor_s": found[:, 1].mean()}
    return means | {"peak_gib": found[:, 2].max()}
