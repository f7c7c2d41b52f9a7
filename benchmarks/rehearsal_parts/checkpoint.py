"""The checkpoint's part of the rehearsal: the state of a run of a preset, written, checked and read by the run's code.

Each half is a process of its own, for its peak memory. The network is on the CPU, as on no machine with a GPU: its
weights, averages and optimizer are part of the memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _open(folder: Path, preset: str) -> Any:
    """A run of the preset at its start, or where the checkpoint in ``folder`` has brought it."""

    from latent_medi.core import config
    from latent_medi.training.estimate.report import stand_in_schema
    from latent_medi.training.estimate.step_cost import build_denoiser
    from latent_medi.training.run_folder import plain
    from latent_medi.training.settings import TrainSettings
    from latent_medi.training.start import find_start, training_accelerator
    from latent_medi.training.updates import Run

    words = ["--config", preset, "data=data", "latents=latents", f"out={folder}", "max_images=51200000"]
    settings = replace(config.parse(TrainSettings, words, "train"), compile=False, precision="fp32")
    accelerator, record = training_accelerator(settings), {"settings": plain(asdict(settings))}
    denoiser = build_denoiser(settings, (4, 32, 32), stand_in_schema(["class", "tss"], 2, 626))
    data: Any = SimpleNamespace(state=lambda: {"whitening": [[0.0] * 4, [1.0] * 4]})
    start = find_start(folder, record, settings, accelerator)
    return Run(denoiser, settings, data, 1000, start, record, accelerator, False, settings.ema.widths())


def _half(folder: Path, preset: str, reads: bool) -> dict[str, float]:
    import torch

    from latent_medi.training.updates import Monitor

    start = time.perf_counter()
    run = _open(folder, preset)
    opened = time.perf_counter() - start
    assert run.resumed == reads, "the checkpoint was not found"
    if not reads:
        # What an update leaves behind, AdamW's two moments of every parameter, without all gradients at once.
        for parameter in run.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
            run.optimizer.step()
            run.optimizer.zero_grad()
    start = time.perf_counter()
    if not reads:
        run._save(256, Monitor(run))
    made = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"s": opened if reads else made, "peak_gib": peak}


def checkpoint(folder: Path, preset: str) -> dict[str, float]:
    """Write a checkpoint of a preset's run and open the run from it: seconds, peak memory, bytes."""
    result: dict[str, float] = {}
    for half, reads in (("write", False), ("read", True)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(_half, folder, preset, reads).result()
        result |= {f"{half}_{name}": value for name, value in found.items()}
    size = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*.safetensors"))
    return result | {"gib": size / 2**30}
