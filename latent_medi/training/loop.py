"""The training loop, to be read from top to bottom.

    accelerate launch train.py --config demo/medi data=runs/demo/data latents=runs/demo/latents out=runs/demo/medi
    accelerate launch --num_processes 8 -m latent_medi.training --config …      (same result, faster)

Killed? Run the same command again: order, noise, learning rate and averaging are pure functions of (settings, images
seen), and a checkpoint holds the rest, so the resumed run gives the unbroken run's numbers.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list

from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.errors import UserError
from latent_medi.progress import get_logger, progress
from latent_medi.training import checkpoint, run
from latent_medi.training.data import TrainingData, open_data
from latent_medi.training.ema import Ema, ema_decay
from latent_medi.training.log import Measure, TrainingLog
from latent_medi.training.settings import TrainSettings
from latent_medi.training.transfer import inherited_objective, open_source

logger = get_logger("training")

ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's word for each precision; ours avoids "no", which YAML reads as false."""

_LOOK_EVERY = 100  # updates after which losses are fetched from the device at the latest


def learning_rate(images: int, lr: float, total: int, warmup: float, schedule: str) -> float:
    """Learning rate of the update that starts at ``images`` images seen.

    A linear rise from 0 over ``warmup`` images, then half a cosine that reaches 0 at ``total``, or a constant.
    """
    if images < warmup:
        return lr * images / warmup
    if schedule == "constant":
        return lr
    share = min(1.0, (images - warmup) / max(total - warmup, 1))
    return lr * 0.5 * (1.0 + math.cos(math.pi * share))


def train(settings: TrainSettings, accelerator: Accelerator | None = None) -> Path:
    """Train a model, or go on with a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes or on ``device_batch``, but for
            rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        The model folder, ``out/model``: a :class:`latent_medi.diffusion.pipeline.MediPipeline` with the averaged
        weights; or, with ``lora``, the adapter's folder, ``out/adapter``.

    Raises:
        UserError: Settings that cannot be followed, data that do not fit, a folder with another run, or a loss that is
            not finite.
    """
    settings.check()
    accelerator = accelerator or Accelerator(
        mixed_precision=ACCELERATE_PRECISION[settings.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    check_strategy(accelerator, settings)
    rank, processes = accelerator.process_index, accelerator.num_processes
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(settings.out)

    # What to train on, what to train, and to what end; inherited where it starts from another model.
    source = open_source(settings.init_from) if settings.init_from else None
    data = open_data(settings, source)
    record = run.describe(settings, data, source)
    if run.finished(out, record):
        logger.info("%s is finished.", out)
        return out / run.product(settings)
    data.whiten(source, settings.override)
    objective = Objective(inherited_objective(source, settings) if source else settings.objective)
    denoiser, table = run.build(settings, data, source)
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    autoencoder = run.find_autoencoder(settings, data, source)
    if main:
        run.begin(out, record, settings, table)
    accelerator.wait_for_everyone()

    # Where to go on. The main process chooses, so that all agree.
    found = [checkpoint.newest_checkpoint(out / "checkpoints") if main else None]
    newest: Path | None = broadcast_object_list(found)[0] if processes > 1 else found[0]
    tensors, state = checkpoint.load_checkpoint(newest) if newest else ({}, {"images": 0, "window": [], "scaler": {}})
    if newest:
        run.check_same(out, record, state["run"])
        checkpoint.load_trained(denoiser, tensors["model"], names)
        if main:
            logger.info("Going on at %s images.", f"{state['images']:,}")
    denoiser.to(device)
    if settings.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    ema = Ema(denoiser)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    if newest:
        checkpoint.load_trained(ema.module, tensors["ema"], names)
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], names)
    del tensors
    if settings.compile:
        denoiser.unet.compile()
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    model.train()
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])

    batch, total = settings.global_batch, settings.total_images
    share = batch // processes
    largest = min(settings.device_batch or share, share)
    window: list[Measure] = [(loss, norm) for loss, norm in state["window"]]  # of the updates since the last row
    pending: list[torch.Tensor] = []  # measures still on the device
    log = TrainingLog(out / "log.csv", state["images"]) if main else None
    last_time, last_images = time.monotonic(), state["images"]

    steps = range(state["images"] // batch, total // batch)
    for step in progress(steps, desc="training", unit="step") if main else steps:
        seen, images = step * batch, (step + 1) * batch
        rate = learning_rate(seen, settings.lr, total, settings.total_warmup_images, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The network's (or adapter's) own dropout must not depend on what ran before.
        if denoiser.unet.config["dropout"] or (settings.lora and settings.lora.dropout):
            torch.manual_seed(run.dropout_seed(settings.seed, step, rank))

        # Forward and backward, in parts that fit the device. Processes average their gradients in the last part.
        mine = data.batch(step, batch, settings.seed, objective.timesteps, settings.dropout, rank, processes)
        loss = torch.zeros((), device=device)
        parts = mine.parts(largest, device)
        for i, part in enumerate(parts):
            with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext():
                each = diffusion_loss(model, part.latents, part.noise, part.timesteps, part.conditions, objective)
                part_loss = each.sum() / share
                accelerator.backward(part_loss)
            loss += part_loss.detach()

        # Update and running average. A step that fp16's loss scaler skips leaves the average alone.
        norm = clip_gradients(accelerator, list(model.parameters()), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not accelerator.optimizer_step_was_skipped:
            ema.update(denoiser, ema_decay(images, batch, settings.ema))
        pending.append(torch.stack([loss, norm.to(loss)]))

        # Look at the losses, log and save. Nothing is saved before its losses were seen to be finite.
        logging = crossed(images, batch, settings.log_every_images)
        saving = crossed(images, batch, settings.checkpoint_every_images)
        last = images == total
        if logging or saving or last or len(pending) >= _LOOK_EVERY:
            values = accelerator.reduce(torch.stack(pending), "mean").tolist()
            check_finite(values, step, settings, data, accelerator.scaler is not None)
            window += [(value[0], value[1] if math.isfinite(value[1]) else None) for value in values]
            pending.clear()
        if log is not None and (logging or last):
            now = time.monotonic()
            log.row(images, window, rate, (images - last_images) / (now - last_time))
            last_time, last_images = now, images
        if logging:
            window.clear()
        if main and (saving or last):
            checkpoint.save_checkpoint(
                out / "checkpoints",
                images,
                {
                    "model": checkpoint.trained_tensors(denoiser, names),
                    "ema": checkpoint.trained_tensors(ema.module, names),
                    "optimizer": checkpoint.optimizer_tensors(optimizer, names),
                },
                {
                    "run": record,
                    "window": window,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
                },
                settings.keep_checkpoints,
            )

    if main:
        run.finish(settings, record, data, autoencoder, objective.settings, total, ema.module, source)
    accelerator.wait_for_everyone()
    return out / run.product(settings)


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether the update that brought the run to ``images`` passed a multiple of ``every`` images; never for 0."""
    return every > 0 and images // every > (images - batch) // every


def clip_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most ``limit`` (0: any); returns their norm before."""
    accelerator.unscale_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the CPU the norm can be looked at for free, and most updates then need no pass over the gradients.
    if limit and (norm.device.type != "cpu" or norm > limit):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def check_strategy(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Refuse a way of distributing that is not supported, and a batch that the processes cannot share equally.

    Raises:
        UserError: As said.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Training under {accelerator.distributed_type.value} is not supported.",
            "These networks (up to 450 M parameters) fit one device whole with their optimizer; sharding would only "
            "add traffic. Launch plain multi-GPU, with a smaller device_batch if memory is short.",
        )
    if accelerator.mixed_precision != ACCELERATE_PRECISION[settings.precision]:
        raise UserError(
            f"The launcher's precision is {accelerator.mixed_precision}, and the settings say {settings.precision}.",
            "Set precision, which belongs to the run, and leave it out of the launcher's configuration.",
        )
    if settings.global_batch % accelerator.num_processes:
        raise UserError(
            f"{accelerator.num_processes} processes cannot share a global_batch of {settings.global_batch} equally.",
            "Choose a multiple; the number of processes must not change what is trained.",
        )


def check_finite(
    values: list[list[float]], step: int, settings: TrainSettings, data: TrainingData, scaled: bool
) -> None:
    """Stop at the first update whose loss or gradient is not finite, naming what was trained on.

    Raises:
        UserError: Names the update and its patches.
    """
    for i, (loss, norm) in enumerate(values):
        # Under fp16 a gradient beyond its range is normal: the scaler skips that update.
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            continue
        bad = step - len(values) + 1 + i
        keys = [str(key) for key in data.keys[data.at(bad, settings.global_batch, settings.seed)]]
        raise UserError(
            f"The loss of update {bad + 1} (from {bad * settings.global_batch:,} images on) is {loss}, its gradient "
            f"norm {norm}. Its patches: {', '.join(keys)}.",
            "No checkpoint was written since. Look at the latents of these patches; else lower lr, lengthen the "
            "warm-up, or use bf16 instead of fp16.",
        )
