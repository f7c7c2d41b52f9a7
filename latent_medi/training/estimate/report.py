"""An estimate of a run before it starts: memory of one device, work per image, and updates per second.

Nothing is computed and no memory is used: the network consists of fake tensors, which have shapes, types and storage
sizes only, and one forward and backward pass of the training's own loss is traced through them. Weights, gradients,
optimizer and averages are exact. Activations are what autograd saves, at the settings' batch, precision and
checkpointing. Rates are estimates; only what ran on a GPU is called measured.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.latents.store import DEVICE_SHARE
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.data import open_latents
from latent_medi.training.estimate.measured import Measured, measured_text, read_measured
from latent_medi.training.estimate.step_cost import AUTOCAST, build_denoiser, example, state_bytes, step_cost
from latent_medi.training.estimate.whole_run import latents_to_come, whole_run, whole_run_text
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.settings import EstimateSettings, TrainSettings

GIB = 2**30

CARDS: dict[str, tuple[float, float]] = {
    "rtx3070": (8, 40.6),
    "rtx4060": (8, 30.2),
    "rtx3060": (12, 25.5),
    "rtx4070": (12, 58.3),
    "rtx3090": (24, 71.2),
    "rtx4090": (24, 165.2),
    "l40s": (48, 362.0),
    "a100": (80, 312.0),
    "h100": (80, 989.4),
    "h200": (141, 989.4),
}
"""GiB of memory, and 10^12 operations per second of dense bf16 matrices with fp32 sums, as the vendor states."""

_CONTEXT = GIB // 2  # memory of CUDA itself, which torch does not count
_NCCL = GIB // 2  # NCCL's channels between devices, not counted either: some dozens, a few MiB each
_RESERVE_SHARE = 0.03  # of the peak: blocks of torch's allocator that nothing fits into
_FIXED_WORKSPACE = 128 * 2**20  # cuBLAS keeps 32 MiB per handle; cuDNN's kernels need a few times that
_WORKSPACE_SHARE = 0.05  # of activations and passing tensors: rounding to the allocator's blocks, gaps between them


PRESET_SHAPE = (4, 32, 32)
"""Shape of the latents on which presets were measured."""


def stand_in_schema(names: list[str] | None, count: int, values: int) -> Schema | None:
    """A schema for an estimate without data: categorical fields of ``values`` values each.

    Args:
        names: The fields that the model is conditioned on; unset: ``count`` of them.
        count: Number of fields without names.
        values: Values of each.
    """
    names = [f"field{i}" for i in range(count)] if names is None else names
    vocabulary = tuple(f"value{i:06d}" for i in range(values))
    return Schema(tuple(Field(name, "categorical", vocabulary) for name in names)) if names else None


def estimate_inputs(settings: EstimateSettings) -> tuple[tuple[int, int, int], Schema | None, str, int]:
    """Shape (C, h, w) of a latent, the model's fields, a phrase on their origin, and bytes of all latents.

    They come from the data and latents of the settings if these exist; of latents that are yet to be made, from the
    autoencoder that the settings name; otherwise from the stand-in settings.

    Raises:
        UserError: Data that do not fit the settings or each other.
    """
    names = settings.model.fields
    if settings.data and (Path(settings.data) / "dataset.json").is_file():
        dataset = PatchDataset.open(settings.data)
        schema = dataset.schema if names is None else dataset.schema.subset(names)
        fields: Schema | None = schema if schema.fields else None
        origin = f"fields of {settings.data}"
        if settings.latents and (Path(settings.latents) / "latents.json").is_file():
            store = open_latents(dataset, settings.latents, "mmap")
            return store.shape, fields, f"{origin}, latents of {settings.latents}", store.nbytes
        if (known := latents_to_come(settings, dataset)) is not None:
            return known[0], fields, f"{origin}, latents that {settings.autoencoder} will make", known[1]
    else:
        fields = stand_in_schema(names, settings.stand_in_fields, settings.stand_in_values)
        count = len(fields.fields) if fields else 0
        origin = f"{count or 'no'} stand-in field{'' if count == 1 else 's'} of {settings.stand_in_values} values"
    channels, height, width = settings.latent_shape
    return (channels, height, width), fields, origin, 0


def device_batch(settings: TrainSettings, processes: int = 1) -> int:
    """Images per forward pass of one process."""
    share = max(settings.global_batch // processes, 1)
    return min(settings.device_batch or share, share)


def estimate(settings: EstimateSettings, ema_count: int | None = None) -> dict[str, Any]:
    """An estimate of what a run takes on one device.

    Args:
        settings: The run, and the card to estimate it for.
        ema_count: Running averages; unset: those of the settings.

    Returns:
        ``bytes`` by purpose with their sum ``peak``, the ``margin`` beyond it, parameters, batch, operations per image,
        and the expected rates. ``measured`` holds rates of a GPU of this machine: empty if its memory was too small,
        ``None`` without one. ``images``, ``hours``, ``files`` and ``weights`` are those of
        :func:`~latent_medi.training.estimate.whole_run.whole_run`. ``measured_before`` holds the rows of
        :func:`~latent_medi.training.estimate.measured.read_measured`.

    Raises:
        UserError: Settings that cannot be followed, or an unknown card.
    """
    settings.check()
    if settings.lora is not None or settings.train_parts is not None:
        raise UserError(
            "Estimates are made for whole models, not for lora or train_parts.",
            "Leave these out; with them a run takes less than the estimate.",
        )
    if settings.global_batch % settings.processes:
        raise UserError(
            f"{settings.processes} processes cannot share a global_batch of {settings.global_batch} equally."
        )
    shape, schema, origin, stored = estimate_inputs(settings)
    batch = device_batch(settings, settings.processes)
    cost, denoiser = step_cost(settings, shape, schema, batch)
    count = len(settings.ema.widths()) if ema_count is None else ema_count
    sizes = state_bytes(denoiser, count, settings.optimizer == "adamw8bit")
    pixels = shape[0] * shape[1] * shape[2]
    fields = len(schema.fields) if schema else 0
    # Latents and noise, timesteps, codes and values; all parts of a process's share wait on the device.
    sizes["batch"] = settings.global_batch // settings.processes * (2 * 4 * pixels + 8 + 12 * fields)
    sizes["activations"], sizes["passing"] = cost.saved, cost.passing
    sizes["workspace"] = _FIXED_WORKSPACE + round(_WORKSPACE_SHARE * (cost.saved + cost.passing))
    sizes["latents"] = stored if settings.resident == "device" else 0
    sizes["peak"] = sum(sizes.values())
    margin = beyond(sizes["peak"], settings.processes)
    card, memory, tflops = choose_card(settings, sizes["peak"] + sum(margin.values()))
    if settings.resident == "auto" and stored <= DEVICE_SHARE * memory * GIB:
        sizes["latents"], sizes["peak"] = stored, sizes["peak"] + stored
        margin = beyond(sizes["peak"], settings.processes)
        card, memory, tflops = choose_card(settings, sizes["peak"] + sum(margin.values()))
    images = operations_per_second(settings, card, tflops) / (cost.flops / batch) * settings.processes
    measured: dict[str, float] | None = None
    if torch.cuda.is_available():
        try:
            measured = measure(settings, shape, schema, batch)
        except torch.cuda.OutOfMemoryError:
            measured = {}
    known = measured["steps_per_s"] * settings.global_batch if measured else images
    return {
        "data": origin,
        "latent_shape": list(shape),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "precision": settings.precision,
        "checkpoint_activations": settings.checkpoint_activations,
        "processes": settings.processes,
        "global_batch": settings.global_batch,
        "device_batch": batch,
        "bytes": sizes,
        "margin": margin,
        "forward_flops_per_image": cost.forward_flops // batch,
        "flops_per_image": cost.flops // batch,
        "card": card,
        "card_gib": memory,
        "card_tflops": tflops,
        "card_share": settings.device_share,
        "fits": sizes["peak"] + sum(margin.values()) <= memory * GIB,
        "estimated_images_per_s": images,
        "estimated_steps_per_s": images / settings.global_batch,
        "measured": measured,
        "network": settings.model.preset if shape == PRESET_SHAPE and not settings.init_from else "",
        **whole_run(settings, denoiser, known),
        "measured_before": [asdict(row) for row in read_measured()],
    }


def beyond(peak: int, processes: int) -> dict[str, int]:
    """Bytes of a card that a run takes beyond what torch counts as allocated, by purpose.

    Args:
        peak: Bytes that torch is expected to count.
        processes: Devices that share the global batch.
    """
    return {"context": _CONTEXT, "nccl": _NCCL if processes > 1 else 0, "reserve": round(_RESERVE_SHARE * peak)}


def choose_card(settings: EstimateSettings, peak: int) -> tuple[str, float, float]:
    """Name, GiB and TFLOP/s of the requested card, or of this machine's, or of the smallest with ``peak`` bytes.

    Raises:
        UserError: An unknown card.
    """
    name = settings.card
    if name and name not in CARDS:
        raise unknown_card(name, "Or give card_gib and card_tflops.")
    if not name and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        known = next((c for c in CARDS if c in name.lower().replace(" ", "")), None)
        return name, memory, settings.card_tflops or (CARDS[known][1] if known else matmul_tflops())
    if not name:
        enough = settings.card_gib or peak / GIB
        name = next((c for c, (memory, _) in CARDS.items() if memory >= enough), "h200")
    memory, tflops = CARDS[name]
    return name, settings.card_gib or memory, settings.card_tflops or tflops


def unknown_card(name: str, hint: str = "") -> UserError:
    """The error for a card that is not in the table."""
    return UserError(f"The speed of the card {name!r} is not known; {nearest(name, CARDS)}.", hint)


def operations_per_second(settings: EstimateSettings, card: str, tflops: float) -> float:
    """Operations per second that a network is expected to reach on a card."""
    share = fp32_share(card) if settings.precision == "fp32" else 1.0
    return settings.device_share * tflops * 1e12 * share


_FP32_SHARE = {"l40s": 0.25, "a100": 1 / 16, "h100": 1 / 15, "h200": 1 / 15}  # of the others: a half


def fp32_share(card: str) -> float:
    """Speed of a card in fp32, which runs without tensor cores, relative to bf16."""
    return next((share for name, share in _FP32_SHARE.items() if name in card.lower().replace(" ", "")), 0.5)


def matmul_tflops(
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda", size: int = 8192, count: int = 20
) -> float:
    """10^12 operations per second of large square matrix products on a device, the best of three times ``count``."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):  # the first warms up
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * count / best / 1e12


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@exact_fp32()
def measure(
    settings: EstimateSettings,
    shape: tuple[int, int, int],
    schema: Schema | None,
    batch: int,
    device: str = "cuda",
    warm: int = 3,
) -> dict[str, float]:
    """Make real updates on one device and measure their peak memory and rate.

    Args:
        settings: The run.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
        batch: Images per forward pass.
        device: Where to run.
        warm: Updates before the clock starts.

    Returns:
        On a GPU ``peak_bytes`` and ``reserved_bytes``, the most that torch had allocated and reserved; and
        ``steps_per_s``, updates of one process's share of the global batch.
    """
    try:
        release(device)
        return _measure(settings, shape, schema, batch, device, warm)
    finally:
        release(device)


def release(device: str = "cuda") -> None:
    """Release unused memory of a device, also that of reference cycles, which a compiled network is part of."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _measure(
    settings: EstimateSettings, shape: tuple[int, int, int], schema: Schema | None, batch: int, device: str, warm: int
) -> dict[str, float]:
    from latent_medi.training.ema import Ema

    dtype = AUTOCAST[settings.precision]
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    denoiser = build_denoiser(settings, shape, schema).train().to(device)
    if settings.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    copies = [Ema(denoiser) for _ in settings.ema.widths()]
    optimizer = build_optimizer(denoiser.parameters(), settings)
    scaler = torch.amp.GradScaler(device, enabled=settings.precision == "fp16")
    objective = Objective(settings.objective)
    if settings.compile:
        denoiser.unet.compile()
    with torch.device(device):
        inputs = example(denoiser, shape, batch, objective.timesteps)
    parts = max(settings.global_batch // settings.processes // batch, 1)
    for step in range(warm + settings.measure_steps):
        if step == warm:
            _wait(device)
            start = time.perf_counter()
        for _ in range(parts):
            with torch.autocast(device.partition(":")[0], dtype or torch.bfloat16, enabled=dtype is not None):
                loss = diffusion_loss(denoiser, *inputs, objective).sum() / (batch * parts)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(denoiser.parameters(), settings.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for average in copies:
            average.update(denoiser, 0.999)
    _wait(device)
    result = {"steps_per_s": settings.measure_steps / (time.perf_counter() - start)}
    if gpu:
        result["peak_bytes"] = float(torch.cuda.max_memory_allocated())
        result["reserved_bytes"] = float(torch.cuda.max_memory_reserved())
    return result


def estimate_text(result: dict[str, Any]) -> str:
    """The estimate as lines to read."""
    purposes = {
        "weights": "weights, fp32",
        "gradients": "gradients, fp32",
        "optimizer": "AdamW's two moments",
        "averages": "running averages, fp32",
        "ddp_buckets": "DDP buckets (the gradients are views of them)",
        "batch": "latents and noise of one update",
        "latents": "all latents, if the run keeps them on the device",
        "activations": f"activations that autograd saves at a batch of {result['device_batch']}",
        "passing": "further tensors at the peak of the backward pass",
        "workspace": "allowance for workspaces of libraries and gaps of the allocator",
        "peak": "expected peak",
    }
    sizes, margin = result["bytes"], result["margin"]
    lines = [
        f"{result['parameters']:,} parameters; latents {'×'.join(map(str, result['latent_shape']))}; {result['data']}",
        f"precision {result['precision']}, checkpoint_activations {str(result['checkpoint_activations']).lower()}, "
        f"global_batch {result['global_batch']} in parts of {result['device_batch']} on {result['processes']} "
        f"device{'s' if result['processes'] > 1 else ''}",
        "",
        *(f"{sizes[key]:>16,} B {sizes[key] / GIB:7.2f} GiB  {text}" for key, text in purposes.items()),
        f"{sum(margin.values()):>16,} B {sum(margin.values()) / GIB:7.2f} GiB  further margin: CUDA itself "
        f"{margin['context'] / GIB:.2f}, NCCL between devices {margin['nccl'] / GIB:.2f}, reserved by torch's "
        f"allocator {margin['reserve'] / GIB:.2f} GiB",
        "",
        f"{result['flops_per_image'] / 1e9:.1f} GFLOP per image, forward and backward",
        f"estimated: {result['estimated_steps_per_s']:.3g} steps/s, {result['estimated_images_per_s']:.3g} images/s at "
        f"{result['card_share']:.0%} of the {result['card_tflops']:.4g} TFLOP/s of {result['card']} "
        f"({result['card_gib']:.3g} GiB: {'enough' if result['fits'] else 'NOT enough'})",
    ]
    if result["measured"] is None:
        lines.append("not measured: this machine has no GPU")
    elif not result["measured"]:
        lines.append("not measured: the memory of this GPU is too small; lower device_batch")
    else:
        peak, held, rate = (result["measured"][key] for key in ("peak_bytes", "reserved_bytes", "steps_per_s"))
        lines.append(
            f"measured on this GPU: peak {peak / GIB:.2f} GiB, reserved by torch {held / GIB:.2f} GiB, "
            f"{rate:.3g} steps/s per process"
        )
    lines += whole_run_text(result)
    lines += measured_text([Measured(**row) for row in result["measured_before"]], result["network"])
    return "\n".join(lines)
