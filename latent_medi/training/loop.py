"""The training loop, to be read from top to bottom.

    accelerate launch train.py --config demo/medi data=runs/demo/data latents=runs/demo/latents out=runs/demo/medi
    accelerate launch --num_processes 8 -m latent_medi.training --config …      (same result, faster)

Killed? Run the same command again: order, noise, learning rate and averaging are pure functions of (settings, images
seen), and a checkpoint holds the rest, so the resumed run gives the unbroken run's numbers.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.preemption import listening
from latent_medi.core.progress import get_logger, progress
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.launch import make_accelerator
from latent_medi.training import checkpoint, ddp, posthoc_ema, run_folder
from latent_medi.training.data import Batch, open_data
from latent_medi.training.ema import Ema, ema_decay
from latent_medi.training.finetune.transfer import inherited_objective, open_source
from latent_medi.training.monitor import Watch
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.prefetch import made_ahead, threads_for
from latent_medi.training.settings import TrainSettings

logger = get_logger("training")

ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's word for each precision; ours avoids "no", which YAML reads as false."""

_LOOK_EVERY = 100  # updates after which losses are fetched from the device at the latest


def learning_rate(images: int, lr: float, total: int, warmup: float, schedule: str, decay: int = 0) -> float:
    """Learning rate of the update that starts at ``images`` images seen.

    A linear rise from 0 over ``warmup`` images, then half a cosine that reaches 0 at ``total``; or a constant; or
    lr/√max(images/``decay``, 1) (Karras et al. 2024, arXiv 2312.02696, equation 67).
    """
    if images < warmup:
        return lr * images / warmup
    if schedule == "constant":
        return lr
    if schedule == "inverse_sqrt":
        return lr / math.sqrt(max(images / decay, 1.0))
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
        UserError: Settings that cannot be followed, data that do not fit, a folder with another run or that another
            job writes, or a loss that is not finite.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
    """
    accelerator = accelerator or make_accelerator(
        mixed_precision=ACCELERATE_PRECISION[settings.precision],
        log_with=list(settings.trackers) or None,
        project_dir=settings.out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    with output_lock(settings.out, accelerator):
        return _train(settings, accelerator)


def _train(settings: TrainSettings, accelerator: Accelerator) -> Path:
    rank, processes = accelerator.process_index, accelerator.num_processes
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(settings.out)

    # What to train on, what to train, and to what end; inherited where it starts from another model.
    with agreed(accelerator) as declared:
        settings.check()
        check_strategy(accelerator, settings)
        source = open_source(settings.init_from) if settings.init_from else None
        data = open_data(settings, source, device)
        record = run_folder.describe(settings, data, source)
        finished = run_folder.finished(out, record)
        run_folder.declare(declared, settings, data)
        declared.add_input("init_from", settings.init_from, lambda: record["source"])
        declared.add_settings({"finished": finished})
    if finished:
        logger.info("%s is finished.", out)
        return out / run_folder.product(settings)
    objective = Objective(inherited_objective(source, settings) if source else settings.objective)
    denoiser, table = run_folder.build(settings, data, source)
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    autoencoder = run_folder.find_autoencoder(settings, data, source)
    if main:
        run_folder.begin(out, record, settings, table)
    accelerator.wait_for_everyone()

    # Where to go on. The main process chooses, so that all agree.
    found = [checkpoint.newest_checkpoint(out / "checkpoints") if main else None]
    newest: Path | None = broadcast_object_list(found)[0] if processes > 1 else found[0]
    tensors, state = checkpoint.load_checkpoint(newest) if newest else ({}, {"images": 0})
    # Measured once: another device or batch would measure other last digits.
    data.whiten(source, settings.override, state.get("whitening"), accelerator)
    if newest:
        run_folder.check_same(out, record, state["run"])
        checkpoint.load_trained(denoiser, tensors["model"], names)
        if main:
            logger.info("Going on at %s images.", f"{state['images']:,}")
    denoiser.to(device)
    if settings.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    emas = {width: Ema(denoiser) for width in settings.ema.widths()}
    ema = emas[settings.ema.relative_width]
    optimizer = build_optimizer([p for p in denoiser.parameters() if p.requires_grad], settings)
    if newest:
        for width, each in emas.items():
            checkpoint.load_trained(each.module, tensors[ema_file(width, settings)], names)
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], names)
    del tensors
    if settings.compile:
        ddp.compile_whole(settings.checkpoint_activations, processes)
        denoiser.unet.compile()
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    model.train()
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])

    watch = Watch(settings, data, autoencoder, objective, accelerator, state)

    batch, total = settings.global_batch, settings.total_images
    share = batch // processes
    largest = min(settings.device_batch or share, share)
    steps = range(state["images"] // batch, total // batch)
    dropping = run_folder.drops(settings, source)

    def prepared(step: int) -> Batch:
        made = data.batch(step, batch, settings.seed, objective.timesteps, settings.dropout, rank, processes)
        return made.pinned() if device.type == "cuda" else made

    def save(images: int) -> None:
        checkpoint.save_checkpoint(
            out / "checkpoints",
            images,
            {
                "model": checkpoint.trained_tensors(denoiser, names),
                "optimizer": checkpoint.optimizer_tensors(optimizer, names),
                **{
                    ema_file(width, settings): checkpoint.trained_tensors(each.module, names)
                    for width, each in emas.items()
                },
            },
            {
                "run": record,
                **watch.state(),
                "whitening": [data.shift.tolist(), data.scale.tolist()],
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            },
            settings.keep_checkpoints,
        )

    def idle_pass() -> None:
        part = prepared(steps[0]).parts(largest, device)[0]
        diffusion_loss(model, part.latents, part.noise, part.timesteps, part.conditions, objective).sum().backward()

    if steps:
        ddp.settle(model, optimizer, idle_pass, newest is not None, -(-share // largest))
    # The next batches while the device works on this one.
    with listening() as notice, made_ahead(prepared, steps, threads_for(data, device), device) as batches:
        for step in progress(steps, desc="training", unit="step") if main else steps:
            seen, images = step * batch, (step + 1) * batch
            last = images == total
            rate = learning_rate(
                seen, settings.lr, total, settings.total_warmup_images, settings.schedule, settings.decay_images
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            # The network's own dropout must not depend on what ran before.
            if dropping:
                torch.manual_seed(run_folder.dropout_seed(settings.seed, step, rank))

            # Forward and backward, in parts that fit the device. Processes average their gradients in the last part.
            parts = next(batches).parts(largest, device)
            loss = torch.zeros((), device=device)
            for i, part in enumerate(parts):
                with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext():
                    loss_of = diffusion_loss(
                        model, part.latents, part.noise, part.timesteps, part.conditions, objective
                    )
                    part_loss = loss_of.sum() / share
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
                watch.table.add(loss_of, part.timesteps, part.conditions)

            # Update and running averages. A step that fp16's loss scaler skips leaves the averages alone.
            norm = clip_gradients(accelerator, list(model.parameters()), settings.grad_clip)
            optimizer.step()
            ddp.clear(model, optimizer, len(parts))
            # The scaler skips exactly the updates whose gradients are not finite. The device alone looks at that.
            made = None if accelerator.scaler is None else norm.isfinite()
            for width, averaged in emas.items():
                averaged.update(denoiser, ema_decay(images, batch, settings.ema, width), made)
            watch.take(loss, norm)

            # Look at the losses, log and save. Nothing is saved before its losses were seen to be finite.
            stopping = not last and notice.agreed(accelerator, step)
            logging = last or crossed(images, batch, settings.log_every_images)
            saving = last or stopping or crossed(images, batch, settings.checkpoint_every_images)
            if logging or saving or watch.waiting >= _LOOK_EVERY:
                watch.look(step, denoiser)
            if logging:
                watch.report(images, rate)
            keeping = settings.ema.also or settings.ema.snapshot_every_images
            if main and keeping and (last or crossed(images, batch, settings.ema.snapshot_every_images)):
                posthoc_ema.save_snapshots(out, images, {w: each.module.state_dict() for w, each in emas.items()})
            if main and saving:
                save(images)
            if last or crossed(images, batch, settings.preview_every_images):  # once all that matters is safe
                watch.preview(images, ema.module)
            if stopping:
                accelerator.wait_for_everyone()
                raise Preempted(
                    f"{notice.given or 'another process was told to stop'} at {images:,} of {total:,} images; "
                    "saved, the same command continues"
                )

    if main:
        run_folder.finish(settings, record, data, autoencoder, objective.settings, total, ema.module, source)
    accelerator.wait_for_everyone()
    watch.finish()
    return out / run_folder.product(settings)


def ema_file(width: float, settings: TrainSettings) -> str:
    """Name of an average's file in a checkpoint, without its ending."""
    return "ema" if width == settings.ema.relative_width else f"ema-{width:.4f}"


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
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"The launcher's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}, which would "
            "scale the gradients.",
            "Leave it out: accumulation follows from global_batch, device_batch and the number of processes.",
        )
    if settings.global_batch % accelerator.num_processes:
        raise UserError(
            f"{accelerator.num_processes} processes cannot share a global_batch of {settings.global_batch} equally.",
            "Choose a multiple; the number of processes must not change what is trained.",
        )
