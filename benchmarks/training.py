"""Training steps per second of the loop, against a plain loop, against tensors already in memory, and against pixels.

    python benchmarks/training.py [--quick] [--json FILE]

(a) The plain loop is that of diffusers' examples/unconditional_image_generation/train_unconditional.py, adapted to
latents: a DataLoader over single samples, Accelerate, AdamW, a prepared learning-rate scheduler, diffusers' EMAModel, a
progress bar with the loss of every step. Network, batch, precision and data are the same in all loops; they run in
turns, and the median window counts.
(b) Tensors already in memory: the same loop, whose data hand out one batch that is on the device. Without a GPU, where
nothing else runs during an update, the share of the time that making batches takes is timed as well: other programs on
the machine change it far less than they change the ratio of two runs.
(c) With a GPU: images per second of UNet L on latents of 256 px against MeDi's UNet on pixels of 128 px, each at its
best batch in the same memory, and the ratio of operations, which needs no GPU; and UNet B's share of the measured
peak of matrix products. Without one these rows say "not measured".
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from output import options
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from latent_medi.core import config
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.objective import make_scheduler
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.latents.encode import encode
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.training.data import Batch, TrainingData, open_data
from latent_medi.training.estimate.report import GIB, EstimateSettings, matmul_tflops, measure, release, stand_in_schema
from latent_medi.training.estimate.step_cost import step_cost
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.run_folder import build
from latent_medi.training.settings import TrainSettings
from latent_medi.training.start import ACCELERATE_PRECISION

NOT_MEASURED = "not measured (no GPU)"
MEDI_PIXELS = ModelSettings(
    block_out_channels=[128, 256, 512, 512, 1024, 1024],
    attention=[False] * 6,
    attention_head_dim=8,
    resnet_time_scale_shift="default",
)
"""MeDi's network, from its description: 3×128×128 in, attention in the middle only."""

OURS = ModelSettings(preset="L")
"""On 4×32×32 latents of 256 px."""


def make_data(folder: Path, count: int, edge: int) -> None:
    """``count`` patches with a class and a site, and their 4×edge×edge latents of a small random autoencoder."""
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {"class": [f"c{i % 8}" for i in range(count)], "site": [f"s{i // 8 % 16}" for i in range(count)]}
    )
    patches = (
        Patch(
            f"k{i:06d}", draw.integers(0, 256, (4 * edge, 4 * edge, 3), dtype=np.uint8), f"p{i}", f"s{i}", 0, 0, 0.5, r
        )
        for i, r in enumerate(table.to_dict("records"))
    )
    write_dataset(folder / "data", patches, "training", Schema.from_table(table, "class", ["site"]), 4 * edge, 0.5)
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    autoencoder.save_pretrained(folder / "autoencoder")  # type: ignore[attr-defined]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forget_precision()
    encode(EncodeSettings(str(folder / "data"), str(folder / "latents"), str(folder / "autoencoder"), device=device))


def forget_precision() -> None:
    """Let what comes next choose its precision: Accelerate keeps the first one of a process for its whole life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loop_rates(settings: TrainSettings) -> list[float]:
    """Steps per second of the loop, of each window of ``log_every_images`` after the first."""
    forget_precision()
    with tempfile.TemporaryDirectory() as out:
        train(replace(settings, out=out))
        rows = read_log(Path(out) / "log.csv")
    return [float(row["images_per_s"]) / settings.global_batch for row in rows[1:]]


class Ready(Batch):
    """A batch that is on the device, in parts."""

    def pinned(self) -> Batch:
        return self

    def parts(self, size: int, device: torch.device) -> list[Batch]:
        if not hasattr(self, "_parts"):
            object.__setattr__(self, "_parts", Batch.parts(self, size, device))
        return self._parts  # type: ignore[attr-defined]


def memory_rates(settings: TrainSettings) -> list[float]:
    """As :func:`loop_rates`, for the same loop on one batch that is already in memory."""
    make = TrainingData.batch
    ready: list[Batch] = []

    def batch(self: TrainingData, *words: Any, **named: Any) -> Batch:
        if not ready:
            made = make(self, *words, **named)
            ready.append(Ready(made.latents, made.noise, made.timesteps, made.conditions))
        return ready[0]

    with mock.patch.object(TrainingData, "batch", batch):
        return loop_rates(settings)


def timed_rates(settings: TrainSettings, shares: list[float]) -> list[float]:
    """As :func:`loop_rates`; appends the share of the run that was spent in making batches, drawing noise included."""
    make, spent = TrainingData.batch, 0.0

    def batch(self: TrainingData, *words: Any, **named: Any) -> Batch:
        nonlocal spent
        start = time.monotonic()
        made = make(self, *words, **named)
        spent += time.monotonic() - start
        return made

    with mock.patch.object(TrainingData, "batch", batch):
        rates = loop_rates(settings)
    shares.append(spent * statistics.median(rates) / settings.max_steps)
    return rates


class Latents(Dataset):
    """Single samples of the same rows: a latent drawn from the posterior and whitened, codes and values."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        data = self.data
        mean, std = data.store.moments(data.rows[[i]])
        raw = mean if std is None else mean + std * torch.randn_like(std)
        assert data.conditions is not None
        return {
            "input": ((raw - data.shift.view(-1, 1, 1)) / data.scale.view(-1, 1, 1))[0],
            "codes": data.conditions.codes[i],
            "values": data.conditions.values[i],
        }


def plain_rates(settings: TrainSettings) -> list[float]:
    """Steps per second of the plain loop, in windows as of :func:`loop_rates`."""
    forget_precision()
    accelerator = Accelerator(mixed_precision=ACCELERATE_PRECISION[settings.precision])
    data = open_data(settings, None)
    data.whiten(None, [])
    model: Any = build(settings, data, None)[0]
    ema_model = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler = make_scheduler(settings.objective)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, eps=1e-8
    )
    # The example's default is no worker; a GPU is not kept waiting for single samples here.
    workers = 4 if accelerator.device.type == "cuda" else 0
    loader: Any = DataLoader(Latents(data), batch_size=settings.global_batch, shuffle=True, num_workers=workers)
    total = settings.max_steps
    lr_scheduler: Any = get_cosine_schedule_with_warmup(optimizer, total // 100, total)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema_model.to(accelerator.device)
    window = settings.log_every_images // settings.global_batch
    rates, global_step, start = [], 0, time.monotonic()
    bar = tqdm(total=total, desc="plain loop", leave=False)
    model.train()
    while global_step < total:
        for batch in loader:
            clean = batch["input"]
            noise = torch.randn_like(clean)
            timesteps: Any = torch.randint(0, settings.objective.timesteps, (len(clean),), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(model):
                output = model(noisy, timesteps, Conditions(batch["codes"], batch["values"]))
                target = noise_scheduler.get_velocity(clean, noise, timesteps)
                loss = F.mse_loss(output.float(), target.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                bar.update(1)
                global_step += 1
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": global_step}
            logs["ema_decay"] = ema_model.cur_decay_value
            bar.set_postfix(**logs)
            accelerator.log(logs, step=global_step)
            if global_step % window == 0:
                now = time.monotonic()
                rates.append(window / (now - start))
                start = now
            if global_step >= total:
                break
    bar.close()
    accelerator.free_memory()
    return rates[1:]


def run_settings(folder: Path, quick: bool, gpu: bool) -> TrainSettings:
    """The run of (a) and (b): on a GPU UNet S as in the 8 GB preset, else the demo's small network."""
    words = ["--config", "presets/8gb" if gpu else "demo/medi"]
    settings = config.parse(
        TrainSettings, [*words, f"data={folder / 'data'}", f"latents={folder / 'latents'}", f"out={folder / 'run'}"]
    )
    window, windows = ((20, 4) if quick else (50, 6)) if gpu else ((8, 3) if quick else (20, 4))
    batch = 64 if gpu else 16
    return replace(
        settings,
        split="",
        global_batch=batch,
        device_batch=batch,
        max_images=0,
        max_steps=window * windows,
        log_every_images=window * batch,
        checkpoint_every_images=0,
        weight_decay=0.0,
        balance=[],
    )


def speed_of_loops(quick: bool, gpu: bool) -> dict[str, Any]:
    """Parts (a) and (b)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder, (2048 if gpu else 256) if quick else (8192 if gpu else 1024), 32 if gpu else 16)
        settings = run_settings(folder, quick, gpu)
        shares: list[float] = []
        loops: dict[str, Callable[[], list[float]]] = {
            "loop": lambda: loop_rates(settings) if gpu else timed_rates(settings, shares),
            "plain": lambda: plain_rates(settings),
            "memory": lambda: memory_rates(settings),
        }
        if gpu:
            eager = replace(settings, compile=False, channels_last=False)
            loops["loop_eager"] = lambda: loop_rates(eager)
        seen: dict[str, list[float]] = {name: [] for name in loops}
        turns: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(2 if quick else 5):
            # Back and forth, so that a machine that slows down or speeds up does so to all.
            for name in list(loops) if turn % 2 == 0 else list(loops)[::-1]:
                rates = loops[name]()
                seen[name] += rates
                turns[name].append(statistics.median(rates))
    rate = {name: statistics.median(rates) for name, rates in seen.items()}
    result: dict[str, Any] = {f"{name}_steps_per_s": value for name, value in rate.items()}
    result["loop_over_plain_loop"] = rate["loop"] / rate["plain"]
    result["loop_over_tensors_in_memory"] = rate["loop"] / rate["memory"]
    # How far single turns are apart says how much of a ratio is the machine's.
    ratios = [a / b for a, b in zip(turns["loop"], turns["memory"], strict=True)]
    result["loop_over_tensors_in_memory_lowest_turn"] = min(ratios)
    result["loop_over_tensors_in_memory_highest_turn"] = max(ratios)
    if shares:
        result["share_of_the_loop_in_making_batches"] = statistics.median(shares)
    if gpu:
        result["loop_eager_over_plain_loop"] = rate["loop_eager"] / rate["plain"]
    return result


def one_device(model: ModelSettings, batch: int, **values: Any) -> EstimateSettings:
    """Settings of updates of one part."""
    return EstimateSettings(
        max_steps=1, model=model, global_batch=batch, device_batch=batch, precision="bf16", measure_steps=8, **values
    )


def best_rate(model: ModelSettings, shape: tuple[int, int, int], **values: Any) -> tuple[float, int]:
    """Images per second of real updates, at the batch that gives most, of those that fit the device, and that batch."""
    best, batch = (0.0, 0), 16
    while True:
        try:
            rate = measure(one_device(model, batch, **values), shape, stand_in_schema(None, 2, 32), batch)[
                "steps_per_s"
            ]
        except torch.cuda.OutOfMemoryError:
            return best
        finally:
            torch._dynamo.reset()
            release()
        if rate * batch < 0.9 * best[0]:
            return best
        best = max(best, (rate * batch, batch))
        batch *= 2


def against_pixels(gpu: bool, memory_gib: float) -> dict[str, Any]:
    """Part (c)."""
    latent, pixel = (4, 32, 32), (3, 128, 128)
    schema = stand_in_schema(None, 2, 32)

    def flops(model: ModelSettings, shape: tuple[int, int, int]) -> float:
        return step_cost(one_device(model, 2), shape, schema, 2)[0].flops / 2

    work = {"latent": flops(OURS, latent), "pixel": flops(MEDI_PIXELS, pixel)}
    result: dict[str, Any] = {
        "latent_l_gflop_per_image": work["latent"] / 1e9,
        "medi_pixels_gflop_per_image": work["pixel"] / 1e9,
        "medi_pixels_flop_over_latent_l": work["pixel"] / work["latent"],
    }
    keys = [
        "latent_l_images_per_s",
        "medi_pixels_images_per_s",
        "medi_pixels_same_options_images_per_s",
        "latent_l_over_medi_pixels",
        "latent_l_over_medi_pixels_same_options",
        "matmul_tflops",
        "unet_b_share_of_matmul",
    ]
    if not gpu:
        return {**result, **dict.fromkeys(keys, NOT_MEASURED)}
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib / total) if memory_gib else 0.95)
    fast = {"channels_last": True, "compile": True}
    ours, ours_batch = best_rate(OURS, latent, **fast)
    medi, medi_batch = best_rate(MEDI_PIXELS, pixel)
    same, _ = best_rate(MEDI_PIXELS, pixel, **fast)
    peak = matmul_tflops()
    middle = ModelSettings(preset="B")
    rate, _ = best_rate(middle, latent, **fast)
    values = [ours, medi, same, ours / medi, ours / same, peak, rate * flops(middle, latent) / (peak * 1e12)]
    return {
        **result,
        **dict(zip(keys, values, strict=True)),
        "latent_l_batch": ours_batch,
        "medi_pixels_batch": medi_batch,
        "memory_gib": memory_gib or 0.95 * total,
    }


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print the numbers, and write them if a file is named; what was not measured is written as null."""
    for key, value in result.items():
        print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}")
    if path is not None:
        values = {key: None if value == NOT_MEASURED else value for key, value in result.items()}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser: argparse.ArgumentParser = options(__doc__, "fewer and shorter turns")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="(c): memory both may use; default: the device's")
    arguments = parser.parse_args()
    logging.getLogger("latent_medi").setLevel(logging.WARNING)
    gpu = torch.cuda.is_available()
    result = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        **speed_of_loops(arguments.quick, gpu),
        **against_pixels(gpu, arguments.memory_gib),
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
