"""A real "out of memory", by a cap on what this process may take of the card."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from gpu_parts.child import Context, fresh_accelerator
from gpu_parts.smoke_make import small_pipeline, test_parts, work_folder
from gpu_parts.smoke_train import patches
from latent_medi.cli import main as command
from latent_medi.latents.autoencoder import load_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.store import LatentStore
from latent_medi.sampling.generate import generate_plan
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.shards.dataset import PatchDataset


@contextlib.contextmanager
def cap(context: Context, taken: float) -> Iterator[None]:
    """At most this many bytes for tensors, on a GPU."""
    if not context.gpu:
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, taken / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What the program logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("latent_medi").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("latent_medi").removeHandler(handler)


def _peak(context: Context, run: Callable[[], object]) -> float:
    """Bytes reserved at most."""
    gc.collect()
    if not context.gpu:
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return float(torch.cuda.max_memory_reserved())


def _train(context: Context) -> None:
    """UNet S at a batch that the cap does not allow: one clear message."""
    context.only_on_gpu()
    folder, out = patches(context), work_folder(context, "full-train")
    words = [
        "train",
        "--config",
        "demo/medi" if context.quick else "presets/8gb",
        f"data={folder / 'data'}",
        f"latents={folder / 'latents'}",
        f"out={out}",
        "split=",
        "balance=[]",
        "max_steps=2",
        "compile=false",
        *(["global_batch=4"] if context.quick else ["global_batch=256", "device_batch=256"]),
    ]
    context.command = "latent-medi " + " ".join(words)
    fresh_accelerator()
    errors = io.StringIO()
    with cap(context, 2.0 * 2**30 if not context.quick else 1.0 * 2**28), contextlib.redirect_stderr(errors):
        code = command(words)
    fresh_accelerator()
    message = errors.getvalue().strip()
    print(message)
    context.figures(exit_code=code, message=message[-500:])
    if context.gpu:
        context.require(code == 2, f"exit code {code}, not 2")
        context.require("device_batch" in message and "Traceback" not in message, "no clear message")
    else:
        context.require(code == 0, f"exit code {code}")


def _halved(context: Context, name: str, make: Callable[[int, Path], np.ndarray], large: int, bound: float) -> None:
    """Make the same with memory for it, and with memory for half of it."""
    context.only_on_gpu()
    folder = work_folder(context, f"full-{name}")
    small = _peak(context, lambda: make(large // 4, folder / "quarter"))
    kept: list[np.ndarray] = []
    whole = _peak(context, lambda: kept.append(make(large, folder / "whole")))
    with messages() as found, cap(context, (small + whole) / 2):
        again = make(large, folder / "again")
    warned = [text for text in found if "memory" in text]
    context.figures(peak_at_a_quarter_gib=small / 2**30, peak_gib=whole / 2**30, warnings=warned)
    context.require(bool(warned) or not context.gpu, "the batch was not halved")
    difference = np.abs(again.astype(np.float64) - kept[0])
    context.show(share_equal=float((difference == 0).mean()))
    context.within("largest", float(difference.max()), bound)


def _sample(context: Context) -> None:
    pipeline = small_pipeline(context, context.device)
    count = 8 if context.quick else 512
    plan = pd.DataFrame([{"class": "c0", "site": "s1", "count": count, "seed": 0}])
    settings = config_of(count)

    def make(batch: int, out: Path) -> np.ndarray:
        fresh_accelerator()
        made = generate_plan(plan, pipeline, out, replace(settings, device_batch=batch))
        return made.read(np.arange(count))

    _halved(context, "sample", make, count, 1)  # a grey level


def config_of(count: int) -> GenerateSettings:
    """Few steps; one shard."""
    settings = GenerateSettings(patches_per_shard=count, name="full")
    return replace(settings, sampler=replace(settings.sampler, steps=2))


def _encode(context: Context) -> None:
    folder = context.work / "vae"
    if not (folder / "config.json").is_file():
        test_parts().stable_diffusion_vae(folder)
    data = PatchDataset.open(patches(context) / "data")
    count, large = len(data), 8 if context.quick else 64
    autoencoder = load_autoencoder(str(folder), context.device)

    def make(batch: int, out: Path) -> np.ndarray:
        encode_dataset(data.folder, autoencoder, out, batch)
        mean, std = LatentStore(out, "mmap").moments(np.arange(count))
        return torch.cat([mean, std] if std is not None else [mean], 1).float().numpy()

    _halved(context, "encode", make, large, 2e-2)  # stored in half precision


ROWS: dict[str, Callable[[Context], None]] = {
    "memory full: train": _train,
    "memory full: sample": _sample,
    "memory full: encode": _encode,
}
