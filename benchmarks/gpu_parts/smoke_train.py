"""Training in every precision and way, each held against fp32 at equal applied updates."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from gpu_parts.child import Context, NeedsGpu, NotHere, fresh_accelerator
from latent_medi.core import config
from latent_medi.launch import make_accelerator
from latent_medi.training import loop, updates
from latent_medi.training.ema import Ema
from latent_medi.training.log import read_log
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.settings import TrainSettings

BOUND = 0.02
"""Of the mean loss of each third of a run, relative to fp32's on the same batches."""

TINY_S = {"block_out_channels": [32, 32, 64, 64], "attention_head_dim": 32, "norm_num_groups": 16}


def patches(context: Context) -> Path:
    """A folder with data, latents of 4×32×32 (4×8×8) and their autoencoder, made once."""
    from training import make_data

    folder = context.work / "patches"
    with (context.work / "patches.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this part may want them too
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fresh_accelerator()
            make_data(folder, 48 if context.quick else 256, 8 if context.quick else 32)
            (folder / "whole").touch()
    return folder


def settings_of(context: Context, model: str, **changes: Any) -> TrainSettings:
    """A run of the demo's network or of UNet S."""
    if changes.get("precision") == "bf16" and context.gpu and not torch.cuda.is_bf16_supported(False):
        raise NotHere("this card computes no bf16")
    folder, batch = patches(context), 4 if context.quick else 32
    words = [f"data={folder / 'data'}", f"latents={folder / 'latents'}", f"out={context.work / 'train'}"]
    settings = config.parse(TrainSettings, ["--config", "demo/medi", *words])
    if model == "S":
        chosen = {"preset": "S"} if not context.quick else TINY_S
        settings = replace(settings, model=config.build(type(settings.model), chosen))
    settings = replace(
        settings,
        split="",
        balance=[],
        global_batch=batch,
        max_images=0,
        max_steps=6 if context.quick else 30,
        lr=2e-4,
        log_every_images=batch,
        checkpoint_every_images=0,
    )
    return replace(settings, **changes)


def losses_of(context: Context, settings: TrainSettings, accelerator: Any = None) -> tuple[list[float], list[int]]:
    """Train; returns the loss of every update, and the updates that fp16's scaler skipped."""
    out = Path(settings.out)
    shutil.rmtree(out, ignore_errors=True)
    if accelerator is None:
        fresh_accelerator()
    if context.gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        loop.train(settings, accelerator)
        rows = read_log(out / "log.csv")
    finally:
        torch._dynamo.reset()
    if context.gpu:
        context.figures(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    skipped = [i for i, row in enumerate(rows) if row["grad_norm"] == "nan"]
    return [float(row["loss"]) for row in rows], skipped


def reference(context: Context, model: str, skipped: Sequence[int] = ()) -> list[float]:
    """fp32's losses when the same updates are left out; trained once, and kept."""
    file = context.work / f"fp32-{model}-{'-'.join(map(str, skipped)) or 'all'}.json"
    if file.is_file():
        return json.loads(file.read_text())

    def leaving_out(parameters: Any, settings: TrainSettings, undecayed: int = 0) -> torch.optim.Optimizer:
        optimizer = build_optimizer(parameters, settings, undecayed)
        step, count = optimizer.step, iter(range(sys.maxsize))
        optimizer.step = lambda *a, **k: None if next(count) in skipped else step(*a, **k)  # type: ignore
        return optimizer

    with mock.patch.object(updates, "build_optimizer", leaving_out if skipped else build_optimizer):
        losses = losses_of(context, settings_of(context, model))[0]
    file.write_text(json.dumps(losses))
    return losses


def compare(context: Context, model: str, losses: Sequence[float], skipped: Sequence[int] = ()) -> None:
    """Hold a run's losses against fp32's: finite, and each third of the run within the bound."""
    expected = np.array(reference(context, model, skipped))
    found = np.array(losses)
    context.figures(losses=found.tolist(), fp32_losses=expected.tolist(), skipped_updates=list(skipped))
    context.require(len(found) == len(expected), f"{len(found)} updates logged, not {len(expected)}")
    context.require(bool(np.isfinite(found).all()), "a loss is not finite")
    if len(found) != len(expected) or not np.isfinite(found).all():
        return
    thirds = zip(np.array_split(found, 3), np.array_split(expected, 3), strict=True)
    context.within("from fp32", max(abs(a.mean() / b.mean() - 1) for a, b in thirds), BOUND)
    context.figures(largest_of_one_update=float(np.abs(found / expected - 1).max()))
    if skipped:
        context.show(skipped=len(skipped))


def _plain(model: str) -> Callable[[Context], None]:
    def row(context: Context) -> None:
        losses = reference(context, model)
        context.figures(losses=losses)
        context.show(first=losses[0], last=losses[-1])
        context.require(bool(np.isfinite(losses).all()), "a loss is not finite")

    return row


def mode(model: str, **changes: Any) -> Callable[[Context], None]:
    """A row that trains with some settings changed."""

    def row(context: Context) -> None:
        if changes.get("precision") == "fp16" and not context.gpu:
            raise NeedsGpu("fp16 with a loss scaler is for GPUs")
        if "resident" in changes:
            context.only_on_gpu()  # elsewhere it is all the same memory
        parted = {"device_batch": 3 if context.quick else 12} if changes.get("device_batch") else {}
        compare(context, model, *losses_of(context, settings_of(context, model, **{**changes, **parted})))

    return row


def _overflow(context: Context) -> None:
    """With a loss scale beyond fp16's range the first updates must be skipped, and the averages must not count them."""
    if not context.gpu:
        raise NeedsGpu("fp16 with a loss scaler is for GPUs")
    from accelerate import GradScalerKwargs

    settings = settings_of(context, "demo", precision="fp16")
    fresh_accelerator()
    scaler = GradScalerKwargs(init_scale=2.0**32, growth_interval=10_000)
    accelerator = make_accelerator(mixed_precision="fp16", kwargs_handlers=[scaler])
    with mock.patch.object(Ema, "update", autospec=True, side_effect=Ema.update) as averaged:
        losses, skipped = losses_of(context, settings, accelerator)
    context.show(averaged=averaged.call_count)
    context.require(bool(skipped), "no update overflowed at a scale of 2^32")
    context.require(len(skipped) < len(losses), "no update was applied")
    context.require(averaged.call_count == len(losses) - len(skipped), "skipped updates moved the averages")
    compare(context, "demo", losses, skipped)


def _previews(context: Context) -> None:
    settings = settings_of(context, "demo")
    every = settings.global_batch * settings.max_steps // 2
    settings = replace(settings, preview_every_images=every, preview_images=8, preview_steps=4)
    losses, _ = losses_of(context, settings)
    compare(context, "demo", losses)
    rows, files = read_log(Path(settings.out) / "previews.csv"), sorted(Path(settings.out, "previews").glob("*"))
    context.require(len(rows) == 2 and len(files) >= 2, f"{len(rows)} rows and {len(files)} pictures of two previews")
    if files:
        shutil.copy(files[-1], context.pictures / f"preview{files[-1].suffix}")


def _fused(context: Context) -> None:
    """The fused kernel is the default: held against torch's plain loop over parameters."""
    context.only_on_gpu()

    def plain(parameters: Any, settings: TrainSettings, undecayed: int = 0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            foreach=False,
            fused=False,
        )

    with mock.patch.object(updates, "build_optimizer", plain):
        losses, _ = losses_of(context, settings_of(context, "demo"))
    compare(context, "demo", losses)


def _eight_bit(context: Context) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    context.only_on_gpu()
    losses, _ = losses_of(context, settings_of(context, "demo", optimizer="adamw8bit"))
    compare(context, "demo", losses)


ROWS: dict[str, Callable[[Context], None]] = {
    **{f"train {model} fp32": _plain(model) for model in ("demo", "S")},
    **{f"train {model} {p}": mode(model, precision=p) for model in ("demo", "S") for p in ("bf16", "fp16")},
    **{f"train {m} channels_last": mode(m, precision="bf16", channels_last=True) for m in ("demo", "S")},
    **{f"resident {where}": mode("demo", resident=where) for where in ("device", "ram", "mmap")},
    "accumulation": mode("demo", device_batch=True),
    "activation checkpointing": mode("demo", checkpoint_activations=True),
    "fp16 overflow": _overflow,
    "previews": _previews,
    "fused AdamW": _fused,
    "8-bit AdamW": _eight_bit,
}
