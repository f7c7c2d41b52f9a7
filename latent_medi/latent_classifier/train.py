"""Training of the latent classifier, to be read from top to bottom.

    latent-medi classifier --config demo/classifier model=runs/demo/uncond/model out=runs/demo/classifier
    accelerate launch --num_processes 8 -m latent_medi.cli classifier --config …      (same result, faster)

The updates are those of `training/updates.py`: the same command continues a run that was cut off, and gives the numbers
of an unbroken run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from latent_medi.core.agreement import agreed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.objective import Objective, settings_of
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latent_classifier.data import open_model, open_parts
from latent_medi.latent_classifier.monitor import ClassifierMonitor
from latent_medi.latent_classifier.network import LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.scores import Validation
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.metadata.schema import Field
from latent_medi.training import run_folder
from latent_medi.training.data import Batch, TrainingData
from latent_medi.training.finetune.transfer import Source
from latent_medi.training.log import read_log
from latent_medi.training.start import check_strategy, find_start, training_accelerator
from latent_medi.training.updates import Run

logger = get_logger("training")

PRODUCT = "classifier"

# What does not identify a run; a model is compared by its content.
FREE = run_folder.FREE | {"model"}


def train_classifier(settings: ClassifierSettings, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Train a latent classifier, or continue a run that was cut off, or return at once if it is finished.

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
    accelerator = accelerator or training_accelerator(settings.training())
    with output_lock(settings.out, accelerator):
        return _train_classifier(settings, accelerator)


def _train_classifier(settings: ClassifierSettings, accelerator: Accelerator) -> dict[str, Any]:
    out, main, device = Path(settings.out), accelerator.is_main_process, accelerator.device

    # The data, and the model to guide, whose noise schedule and whitening are used.
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
    if finished:
        logger.info("%s is finished.", out / PRODUCT)
        return result(out, data, field, values)
    if main:
        run_folder.begin(out, record, settings, products=(PRODUCT,))
    accelerator.wait_for_everyone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = LatentEncoder(settings.network, data.store.shape[0], data.store.shape[1], len(values))

    start = find_start(out, record, common, accelerator)
    data.whiten(source, [], start.state.get("whitening"), accelerator)
    drops = settings.network.dropout > 0
    run = Run(network, common, data, objective.timesteps, start, record, accelerator, drops)
    monitor = ClassifierMonitor(run, settings, validation, field.name, objective)
    label_of = torch.full((field.n_codes,), -1, dtype=torch.long)
    label_of[[field.code(value) for value in values]] = torch.arange(len(values))
    label_of = label_of.to(device)

    def losses(part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        assert part.conditions is not None  # the field is always one of them
        labels = label_of[part.conditions.codes[:, 0]]
        noisy, timesteps = part.latents, torch.zeros_like(part.timesteps)
        if settings.noise_aware:
            noisy, timesteps = objective.add_noise(part.latents, part.noise, part.timesteps), part.timesteps
        logits = run.model(noisy, timesteps).float()
        right = (logits.detach().argmax(1) == labels).sum() / run.share
        return F.cross_entropy(logits, labels, reduction="sum") / run.share, right

    run.train(losses, monitor, "classifier")

    if main:
        provenance = {
            **data.info,
            "training_patches": len(data),
            "images_seen": common.total_images,
            "scores": last_scores(out),
            **record,
            "guides": source.model_hash if source else "",
        }
        LatentClassifier(
            network,
            settings.network,
            data.store.shape,
            field.name,
            values,
            objective.settings,
            data.shift,
            data.scale,
            data.store.info["autoencoder"]["hash"],
            provenance,
        ).save_pretrained(out / PRODUCT)
    accelerator.wait_for_everyone()
    return result(out, data, field, values)


def describe(
    settings: ClassifierSettings,
    data: TrainingData,
    validation: Validation,
    source: Source | None,
    objective: ObjectiveSettings,
    values: Sequence[str],
) -> dict[str, Any]:
    """What identifies a run: its settings, but for paths and speed, and the content of its data and model."""
    effective = replace(settings, objective=objective, values=list(values))
    kept = {key: value for key, value in run_folder.plain(asdict(effective)).items() if key not in FREE}
    # As in the records of versions without these settings.
    if not settings.only:
        del kept["only"]
    if settings.noise_aware:
        del kept["noise_aware"]
    inherited: dict[str, Any] = {}
    if source is not None and source.autoencoder is not None:
        inherited = {name: source.autoencoder[name] for name in ("shift", "scale")}
    fingerprints = {"data": data.fingerprint(), "validation_data": validation.fingerprint()}
    return {"settings": kept, **fingerprints, "model": inherited}


def last_scores(out: Path) -> list[dict[str, Any]]:
    """The rows of the last measurement in evaluation.csv."""
    rows = read_log(out / "evaluation.csv")
    kinds = {"images": int, "n": int, "timesteps": str}
    last = [row for row in rows if row["images"] == rows[-1]["images"]]
    return [{name: kinds.get(name, float)(value) for name, value in row.items()} for row in last]


def result(out: Path, data: TrainingData, field: Field, values: Sequence[str]) -> dict[str, Any]:
    """What :func:`train_classifier` returns."""
    return {
        "classifier": str(out / PRODUCT),
        "field": field.name,
        "values": list(values),
        "patches": len(data),
        "patients": data.info["training_patients"],
        "scores": last_scores(out),
    }
