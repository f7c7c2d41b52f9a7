"""The training loop, to be read from top to bottom.

    accelerate launch train.py --config demo/medi data=runs/demo/data latents=runs/demo/latents out=runs/demo/medi
    accelerate launch --num_processes 8 -m latent_medi.training --config …      (same result, faster)

Killed? Run the same command again: order, noise, learning rate and averaging are pure functions of (settings, images seen), and a checkpoint holds
the rest, so the resumed run gives the unbroken run's numbers.
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
from latent_medi.training.log import TrainingLog
from latent_medi.training.settings import TrainSettings
from latent_medi.training.transfer import inherited_objective, open_source

logger = get_logger("training")

_LOOK_EVERY = 100  # updates after which losses are fetched from the device at the latest


def learning_rate(images: int, lr: float, total: int, warmup: float, schedule: str) -> float:
    """Learning rate of the update that starts at ``images`` images seen: linear rise from 0, then half a cosine to 0 at ``total``, or constant."""
    if images < warmup:
        return lr * images / warmup
    if schedule == "constant":
        return lr
    share = min(1.0, (images - warmup) / max(total - warmup, 1))
    return lr * 0.5 * (1.0 + math.cos(math.pi * share))


def train(settings: TrainSettings, accelerator: Accelerator | None = None) -> Path:
    """Train a model, or go on with a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes or on ``device_batch``, but for rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        The model folder, ``out/model``: a :class:`latent_medi.diffusion.pipeline.MediPipeline` with the averaged weights.

    Raises:
        UserError: Settings that cannot be followed, data that do not fit, a folder with another run, or a loss that is not finite.
    """
    settings.check()
    accelerator = accelerator or Accelerator(
        mixed_precision=settings.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    check_strategy(accelerator, settings)
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(settings.out)

    # What to train on, what to train, and to what end; inherited where it starts from another model.
    source = open_source(settings.init_from) if settings.init_from else None
    data = open_data(settings, source)
    record = run.describe(settings, data, source)
    if run.finished(out, record):
        logger.info("%s is finished.", out)
        return out / "model"
    data.whiten(source, settings.override)
    objective = Objective(inherited_objective(source, settings) if source else settings.objective)
    denoiser, table = run.build(settings, data, source)
    if main:
        run.begin(out, record, settings, table)
    accelerator.wait_for_everyone()

    # Where to go on. The main process chooses, so that all agree.
    found = [checkpoint.newest_checkpoint(out / "checkpoints") if main else None]
    newest = broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]
    tensors, state = checkpoint.load_checkpoint(newest) if newest else ({}, {"images": 0, "window": [], "scaler": {}})
    if newest:
        run.check_same(out, record, state["run"])
        denoiser.load_state_dict(tensors["model"])
        logger.info("Going on at %s images.", f"{state['images']:,}")
    denoiser.to(device)
    if settings.channels_last:
        denoiser.unet.to(memory_format=torch.channels_last)
    ema = Ema(denoiser)
    names = [name for name, _ in denoiser.named_parameters()]
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    if newest:
        ema.module.load_state_dict(tensors["ema"])
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], names)
    del tensors
    if settings.compile:
        denoiser.unet.compile()
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    model.train()
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])

    batch, total = settings.global_batch, settings.total_images
    share = batch // accelerator.num_processes
    largest = min(settings.device_batch or share, share)
    window: list[tuple[float, float]] = [tuple(pair) for pair in state["window"]]  # (loss, gradient norm) per update since the last row
    pending: list[torch.Tensor] = []  # the same, still on the device
    log = TrainingLog(out / "log.csv", state["images"]) if main else None
    last_time, last_images = time.monotonic(), state["images"]

    steps = range(state["images"] // batch, total // batch)
    for step in progress(steps, desc="training", unit="step") if main else steps:
        seen, images = step * batch, (step + 1) * batch
        rate = learning_rate(seen, settings.lr, total, settings.total_warmup_images, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if settings.model.dropout:  # the network's own dropout must not depend on what ran before
            torch.manual_seed(run.dropout_seed(settings.seed, step, accelerator.process_index))

        # Forward and backward, in parts that fit the device. Processes average their gradients in the last part.
        mine = data.batch(
            step, batch, settings.seed, objective.timesteps, settings.dropout, accelerator.process_index, accelerator.num_processes
        )
        loss = torch.zeros((), device=device)
        parts = mine.parts(largest, device)
        for i, part in enumerate(parts):
            with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext():
                each = diffusion_loss(model, part.latents, part.noise, part.timesteps, part.conditions, objective)
                part_loss = each.sum() / share
                accelerator.backward(part_loss)
            loss += part_loss.detach()

        # Update and running average. A step that fp16's loss scaler skips leaves the average alone.
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not accelerator.optimizer_step_was_skipped:
            ema.update(denoiser, ema_decay(images, batch, settings.ema))
        pending.append(torch.stack([loss, norm.to(loss)]))

        # Look at the losses, log and save. Nothing is saved before its losses were seen to be finite.
        logging, saving = crossed(images, batch, settings.log_every_images), crossed(images, batch, settings.checkpoint_every_images)
        last = images == total
        if logging or saving or last or len(pending) >= _LOOK_EVERY:
            values = accelerator.reduce(torch.stack(pending), "mean").tolist()
            check_finite(values, step, settings, data, accelerator.scaler is not None)
            window += [(value[0], value[1]) for value in values]
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
                    "model": denoiser.state_dict(),
                    "ema": ema.module.state_dict(),
                    "optimizer": checkpoint.optimizer_tensors(optimizer, names),
                },
                {"run": record, "window": window, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {}},
                settings.keep_checkpoints,
            )

    if main:
        run.finish(out, settings, data, objective.settings, ema.module)
    accelerator.wait_for_everyone()
    return out / "model"


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether the update that brought the run to ``images`` passed a multiple of ``every`` images; never if that is 0."""
    return every > 0 and images // every > (images - batch) // every


def check_strategy(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Refuse a way of distributing that is not supported, and a batch that the processes cannot share equally.

    Raises:
        UserError: As said.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Training under {accelerator.distributed_type.value} is not supported.",
            "These networks (up to 450 M parameters) and their optimizer fit one device whole, and sharding them would only add traffic "
            "and incomplete checkpoints: launch plain multi-GPU, with a smaller device_batch if memory is short.",
        )
    if settings.global_batch % accelerator.num_processes:
        raise UserError(
            f"global_batch is {settings.global_batch}, which {accelerator.num_processes} processes cannot share equally.",
            "Choose a multiple; the number of processes must not change what is trained.",
        )


def check_finite(values: list[list[float]], step: int, settings: TrainSettings, data: TrainingData, scaled: bool) -> None:
    """Stop at the first update whose loss or gradient is not finite, naming what was trained on.

    Raises:
        UserError: Names the update, its images and the newest safe checkpoint's folder.
    """
    for i, (loss, norm) in enumerate(values):
        # Under fp16 a gradient beyond its range is normal: the scaler skips that update.
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            continue
        bad = step - len(values) + 1 + i
        keys = [str(key) for key in data.keys[data.at(bad, settings.global_batch, settings.seed)]]
        raise UserError(
            f"The loss of update {bad + 1} (images {bad * settings.global_batch:,} to {(bad + 1) * settings.global_batch:,}) is {loss} with "
            f"gradient norm {norm}. Its patches: {', '.join(keys)}.",
            "No checkpoint was written since. Look at these patches' latents; else lower lr, lengthen the warm-up or use bf16 instead of fp16.",
        )
