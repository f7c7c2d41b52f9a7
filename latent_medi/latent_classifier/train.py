"""Training of the noise-aware latent classifier, to be read from top to bottom.

    latent-medi classifier --config demo/classifier model=runs/demo/uncond/model out=runs/demo/classifier
    accelerate launch --num_processes 8 -m latent_medi.cli classifier --config …      (same result, faster)

As in the loop of the model, order, noise, timesteps and learning rate are pure functions of (settings, images seen), so
that the same command goes on with a run that was cut off, and gives the unbroken run's numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.preemption import listening
from latent_medi.core.progress import get_logger, progress
from latent_medi.diffusion.objective import Objective, settings_of
from latent_medi.diffusion.settings import DropoutSettings, ObjectiveSettings
from latent_medi.latent_classifier.data import open_model, open_parts
from latent_medi.latent_classifier.network import LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.scores import COLUMNS as SCORE_COLUMNS
from latent_medi.latent_classifier.scores import Validation, score, score_text
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import Field
from latent_medi.training import checkpoint, ddp, run_folder
from latent_medi.training.data import Batch, TrainingData
from latent_medi.training.finetune.transfer import Source
from latent_medi.training.log import CsvLog, read_log
from latent_medi.training.loop import ACCELERATE_PRECISION, check_strategy, clip_gradients, crossed, learning_rate
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.prefetch import made_ahead, threads_for

logger = get_logger("training")

PRODUCT = "classifier"
LOG_COLUMNS = ("images", "loss", "accuracy", "lr", "grad_norm", "images_per_s")

_EVERYTHING_KEPT = DropoutSettings(keep_all=1.0, all_null=0.0, metadata_null=0.0, independent=0.0)
_LOOK_EVERY = 100  # updates after which measures are fetched from the device at the latest

# Where things are, and what changes speed, memory and rounding only; data and model are told apart by their content.
FREE = {
    "data", "latents", "resident", "stream", "out", "autoencoder", "model", "device_batch", "checkpoint_every_images",
    "keep_checkpoints", "log_every_images",
}  # fmt: skip


def train_classifier(settings: ClassifierSettings, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Train a latent classifier, or go on with a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes or on ``device_batch``, but for
            rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        "classifier": its folder, ``out/classifier``; "field", "values", "patches" and "patients" trained on; "scores":
        the last rows of evaluation.csv (none without a validation part).

    Raises:
        UserError: Settings that cannot be followed, data or a model that do not fit, a folder with another run or that
            another job writes, or a loss that is not finite.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
    """
    accelerator = accelerator or make_accelerator(
        mixed_precision=ACCELERATE_PRECISION[settings.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    with output_lock(settings.out, accelerator):
        return _train_classifier(settings, accelerator)


def _train_classifier(settings: ClassifierSettings, accelerator: Accelerator) -> dict[str, Any]:
    rank, processes = accelerator.process_index, accelerator.num_processes
    main, device = accelerator.is_main_process, accelerator.device
    out = Path(settings.out)

    # What to learn from, and whose noisy latents to judge.
    with agreed(accelerator) as declared:
        settings.check()
        common = settings.training()
        check_strategy(accelerator, common)
        source = open_model(settings.model) if settings.model else None
        objective = Objective(settings_of(source.scheduler) if source else settings.objective)
        data, validation, field, values = open_parts(settings, source, device)
        record = describe(settings, data, validation, source, objective.settings, values)
        finished = run_folder.finished(out, record, (PRODUCT,))
        run_folder.declare(declared, settings, data)
        declared.add_input("data's validation part", settings.data, validation.fingerprint)
        declared.add_input("model", settings.model, lambda: source.model_hash if source else "")
        declared.add_settings({"finished": finished})
    lookup = torch.full((field.n_codes,), -1, dtype=torch.long)
    lookup[[field.code(value) for value in values]] = torch.arange(len(values))
    if finished:
        logger.info("%s is finished.", out / PRODUCT)
        return result(out, data, field, values)
    if main:
        run_folder.begin(out, record, settings)
    accelerator.wait_for_everyone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = LatentEncoder(settings.network, data.store.shape[0], data.store.shape[1], len(values))
    names = [name for name, _ in network.named_parameters()]

    # Where to go on. The main process chooses, so that all agree.
    newest = [checkpoint.newest_checkpoint(out / "checkpoints") if main else None]
    at: Path | None = broadcast_object_list(newest)[0] if processes > 1 else newest[0]
    tensors, state = checkpoint.load_checkpoint(at) if at else ({}, {"images": 0})
    data.whiten(source, [], state.get("whitening"), accelerator)
    if at:
        run_folder.check_same(out, record, state["run"])
        checkpoint.load_trained(network, tensors["model"], names)
        if main:
            logger.info("Going on at %s images.", f"{state['images']:,}")
    network.to(device)
    lookup = lookup.to(device)
    optimizer = build_optimizer(network.parameters(), common)
    if at:
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], names)
    del tensors
    model, optimizer = accelerator.prepare(network, optimizer)
    model.train()
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    log = CsvLog(out / "log.csv", LOG_COLUMNS, state["images"]) if main else None
    scores = CsvLog(out / "evaluation.csv", SCORE_COLUMNS, state["images"]) if main else None

    batch, total = settings.global_batch, common.total_images
    share = batch // processes
    largest = min(settings.device_batch or share, share)
    steps = range(state["images"] // batch, total // batch)
    window: list[list[Any]] = list(state.get("window", []))  # loss, accuracy and norm of updates since the last row
    pending: list[torch.Tensor] = []  # the same, still on the device
    clock = [time.monotonic(), state["images"]]

    def prepared(step: int) -> Batch:
        made = data.batch(step, batch, settings.seed, objective.timesteps, _EVERYTHING_KEPT, rank, processes)
        return made.pinned() if device.type == "cuda" else made

    def logits_and_labels(part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        assert part.conditions is not None  # the field is always one of them
        labels = lookup[part.conditions.codes[:, 0]]
        return model(objective.add_noise(part.latents, part.noise, part.timesteps), part.timesteps).float(), labels

    def look(step: int) -> None:
        measured = accelerator.reduce(torch.stack(pending), "mean").tolist()
        pending.clear()
        for i, (loss, _, norm) in enumerate(measured):
            # Under fp16 a gradient beyond its range is normal: the scaler skips that update.
            if not (math.isfinite(loss) and (accelerator.scaler is not None or math.isfinite(norm))):
                bad = step - len(measured) + 1 + i
                keys = ", ".join(str(key) for key in data.keys[data.at(bad, batch, settings.seed)])
                raise UserError(
                    f"The loss of update {bad + 1} is {loss}, its gradient norm {norm}. Its patches: {keys}.",
                    "No checkpoint was written since. Look at the latents of these patches; else lower lr, or use bf16 "
                    "instead of fp16.",
                )
        window.extend([*row[:2], row[2] if math.isfinite(row[2]) else None] for row in measured)

    def report(images: int, rate: float) -> None:
        now = time.monotonic()
        loss, accuracy = (float(np.mean([row[i] for row in window])) for i in (0, 1))
        norms = [row[2] for row in window if row[2] is not None]
        speed = round((images - clock[1]) / (now - clock[0]), 1)
        norm = float(np.mean(norms)) if norms else float("nan")
        if log is not None:
            log.write([(images, *map(repr, (loss, accuracy, rate, norm, speed)))])
        clock[:] = [now, images]
        window.clear()

    def evaluate(images: int) -> None:
        network.eval()
        rows = score(
            network, len(values), validation, (data.shift, data.scale), objective, accelerator, settings.seed,
            settings.validation_patches, settings.device_batch or 256,
        )  # fmt: skip
        model.train()
        if scores is not None:
            scores.write([(images, *(row[name] for name in SCORE_COLUMNS[1:])) for row in rows])
            logger.info("%s", score_text(rows, field.name, validation))

    def save(images: int) -> None:
        checkpoint.save_checkpoint(
            out / "checkpoints",
            images,
            {"model": network.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer, names)},
            {
                "run": record,
                "window": window,
                "whitening": [data.shift.tolist(), data.scale.tolist()],
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            },
            settings.keep_checkpoints,
        )

    def idle_pass() -> None:
        logits_and_labels(prepared(steps[0]).parts(largest, device)[0])[0].sum().backward()

    if steps:
        ddp.settle(model, optimizer, idle_pass, at is not None, -(-share // largest))
    # The next batches while the device works on this one.
    with listening() as notice, made_ahead(prepared, steps, threads_for(data, device), device) as batches:
        for step in progress(steps, desc="classifier", unit="step") if main else steps:
            seen, images = step * batch, (step + 1) * batch
            last = images == total
            rate = learning_rate(seen, settings.lr, total, common.total_warmup_images, settings.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if settings.network.dropout:  # must not depend on what ran before
                torch.manual_seed(run_folder.dropout_seed(settings.seed, step, rank))

            # Forward and backward, in parts that fit the device. Processes average their gradients in the last part.
            parts = next(batches).parts(largest, device)
            measures = torch.zeros(2, device=device)
            for i, part in enumerate(parts):
                with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext():
                    logits, labels = logits_and_labels(part)
                    part_loss = F.cross_entropy(logits, labels, reduction="sum") / share
                    accelerator.backward(part_loss)
                right = (logits.detach().argmax(1) == labels).sum() / share
                measures += torch.stack([part_loss.detach(), right])
            norm = clip_gradients(accelerator, list(model.parameters()), settings.grad_clip)
            optimizer.step()
            ddp.clear(model, optimizer, len(parts))
            pending.append(torch.cat([measures, norm.detach().reshape(1).to(measures)]))

            # Look at the losses, log and save. Nothing is saved before its losses were seen to be finite.
            stopping = not last and notice.agreed(accelerator, step)
            logging = last or crossed(images, batch, settings.log_every_images)
            saving = last or stopping or crossed(images, batch, settings.checkpoint_every_images)
            evaluating = last or crossed(images, batch, settings.evaluate_every_images)
            if logging or saving or evaluating or len(pending) >= _LOOK_EVERY:
                look(step)
            if logging:
                report(images, rate)
            if evaluating and len(validation):
                evaluate(images)
            if main and saving:
                save(images)
            if stopping:
                accelerator.wait_for_everyone()
                raise Preempted(
                    f"{notice.given or 'another process was told to stop'} at {images:,} of {total:,} images; "
                    "saved, the same command continues"
                )

    if main:
        provenance = {
            **data.info, "training_patches": len(data), "images_seen": total, "scores": last_scores(out), **record,
            "guides": source.model_hash if source else "",
        }  # fmt: skip
        LatentClassifier(
            network, settings.network, data.store.shape, field.name, values, objective.settings,
            data.shift, data.scale, data.store.info["autoencoder"]["hash"], provenance,
        ).save_pretrained(out / PRODUCT)  # fmt: skip
    accelerator.wait_for_everyone()
    return result(out, data, field, values)


def describe(
    settings: ClassifierSettings, data: TrainingData, validation: Validation, source: Source | None,
    objective: ObjectiveSettings, values: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What makes this run this run: its settings, but for paths and speed, and the content of data and model."""
    effective = replace(settings, objective=objective, values=list(values))
    kept = {key: value for key, value in run_folder.plain(asdict(effective)).items() if key not in FREE}
    inherited: dict[str, Any] = {}
    if source is not None and source.autoencoder is not None:
        inherited = {name: source.autoencoder[name] for name in ("shift", "scale")}
    return {
        "settings": kept, "data": data.fingerprint(), "validation_data": validation.fingerprint(), "model": inherited,
    }  # fmt: skip


def last_scores(out: Path) -> list[dict[str, Any]]:
    """The rows of the last measurement in evaluation.csv."""
    rows = read_log(out / "evaluation.csv")
    return [
        {key: value if key == "timesteps" else int(value) if key in ("images", "n") else float(value)
         for key, value in row.items()}
        for row in rows
        if row["images"] == rows[-1]["images"]
    ]  # fmt: skip


def result(out: Path, data: TrainingData, field: Field, values: Sequence[str]) -> dict[str, Any]:
    """What a finished run tells."""
    return {
        "classifier": str(out / PRODUCT), "field": field.name, "values": list(values), "patches": len(data),
        "patients": data.info["training_patients"], "scores": last_scores(out),
    }  # fmt: skip
