"""The folder of a run: what identifies the run, the check that a folder holds no other run, and the finished model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from latent_medi.core.agreement import Declared, flat
from latent_medi.core.checksums import verify_checksums
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, refuse_foreign, write_sealed, write_text
from latent_medi.core.json_types import check_types
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.core.typed import written
from latent_medi.diffusion.adapters import add_lora, save_adapter
from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder
from latent_medi.latents.networks import latents_fit
from latent_medi.metadata.tables import write_for_people
from latent_medi.metadata.training_record import merge_records
from latent_medi.training.batch_randomness import batch_seed
from latent_medi.training.checkpoint import checkpoint_folders, load_state, newest_checkpoint, remove_unfinished
from latent_medi.training.data import TrainingData
from latent_medi.training.finetune.parameter_groups import added_values, folded, freeze_others
from latent_medi.training.finetune.transfer import Source, describe_table, transfer, with_adapter
from latent_medi.training.posthoc_ema import reconstruct
from latent_medi.training.prolonged import LENGTH, planned_images, set_aside
from latent_medi.training.settings import LORA_TARGETS, AverageSettings, TrainSettings

logger = get_logger("training")

RUN_FILE = "run.json"
PRODUCTS = ("model", "adapter")
"""Possible names of a run's result."""

# What does not identify a run. Data and source are compared by their content, the latents' views and the like included.
FREE = {"data", "latents", "autoencoder", "init_from", "out"}  # where things are
FREE |= {"resident", "stream", "device_batch", "channels_last", "compile", "checkpoint_activations"}  # speed and memory
FREE |= {"checkpoint_every_images", "keep_checkpoints", "log_every_images", "trackers"}
FREE |= {"preview_every_images", "preview_images", "preview_steps", "preview_encoder", "preview_weights"}

# A compiled network, or one in another memory layout, draws other dropout masks, so with dropout these change more than
# rounding. Runs of earlier versions did not record them.
MASKING = ("compile", "channels_last")


def plain(value: Any) -> Any:
    """Settings as nested JSON-able values."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def describe(settings: TrainSettings, data: TrainingData, source: Source | None) -> dict[str, Any]:
    """What identifies a run: its settings without paths and speed, and the content of its data and source."""
    free = FREE - set(MASKING) if drops(settings, source) else FREE
    kept = {key: value for key, value in plain(asdict(settings)).items() if key not in free}
    if not settings.only:  # as in the records of versions without it
        del kept["only"]
    if not settings.mixture:
        del kept["mixture"]
    if source is None or settings.new_fields_lr == 1.0:
        del kept["new_fields_lr"]
    return {"settings": kept, "data": data.fingerprint(), "source": source.hash if source else ""}


def drops(settings: TrainSettings, source: Source | None) -> bool:
    """Whether the network or its adapter uses dropout in training."""
    own = settings.model.dropout if source is None else source.unet.config["dropout"]
    return bool(own or (settings.lora is not None and settings.lora.dropout))


def declare(declared: Declared, settings: Any, data: TrainingData) -> None:
    """Report to the other processes what this one will train on, and how. Settings of memory alone may differ.

    Args:
        declared: The report.
        settings: Of a model's or a classifier's training.
        data: Its rows.
    """
    declared.add_input("data", settings.data, data.table_hash)
    declared.add_input("latents", settings.latents, data.latents_hash)
    own = {"data", "latents", "autoencoder", "init_from", "model", "device_batch", "resident", "stream"}
    own |= {"preview_weights"}
    declared.add_settings(plain(asdict(settings)), without=own)


def check_same(out: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run. The same run may be longer than it was.

    Raises:
        UserError: Lists every setting that differs.
    """
    a, b = flat(theirs), flat(ours)
    unsaid = {f"settings.{name}" for name in MASKING} - set(a)
    changed = [key for key in sorted({*a, *b} - unsaid) if a.get(key) != b.get(key)]
    if not changed or (set(changed) <= LENGTH and planned_images(ours) >= planned_images(theirs)):
        return
    words = {"data": "the training data", "source": "the model in init_from"}
    changes = [
        f"{words[key]} changed"
        if key in words
        else f"{key.removeprefix('settings.')} was {a.get(key)!r} and is {b.get(key)!r}"
        for key in changed
    ]
    raise UserError(
        f"{out} holds a run with other settings: {'; '.join(changes)}.",
        "Choose another out, or repeat the command with the settings in its settings.yaml.",
    )


def product(settings: TrainSettings) -> str:
    """Name in ``out`` of a run's result: "model", or "adapter" with ``lora``."""
    return "adapter" if settings.lora else "model"


def finished(out: Path, record: Mapping[str, Any], products: Sequence[str] = PRODUCTS) -> bool:
    """Whether ``out`` holds the result of this run, at its length.

    Args:
        out: The run's folder.
        record: What identifies the run.
        products: Possible names of the result.

    Raises:
        UserError: It holds the result or checkpoints of another run, a result of unknown origin, the user's own files,
            which would be replaced, or the result of a shorter run without a checkpoint to continue from.
    """
    made = next((name for name in products if (out / name).exists()), "")
    if not made and not checkpoint_folders(out / "checkpoints"):
        check_can_continue(out, planned_images(record), products)
        refuse_foreign(out, {RUN_FILE: "run"}, [RUN_FILE, "settings.yaml", "*.csv"])
        return False
    if not (out / RUN_FILE).exists():
        held = f"a finished {made}" if made else "checkpoints"
        raise UserError(f"{out} holds {held} but no {RUN_FILE}, which records its settings.", "Choose another out.")
    before = _record_in(out)
    check_same(out, record, before)
    if planned_images(record) > planned_images(before):
        check_can_continue(out, planned_images(record), products)
        return False
    if made:
        check_product(out / made)
    return bool(made)


def check_can_continue(out: Path, images: int, products: Sequence[str] = PRODUCTS) -> None:
    """Refuse to prolong a finished run of which no checkpoint is left: it would begin again.

    Args:
        out: The run's folder, which may not exist.
        images: Length of the run now, in images.
        products: Possible names of the result.

    Raises:
        UserError: Says what can be done.
    """
    made = [out / name for name in products if (out / name).is_dir()]
    shorter = [path for name in products for path in sorted(out.glob(f"{name}-images-*")) if path.is_dir()]
    if not made + shorter or (made and planned_images(_record_in(out)) >= images):
        return
    if newest_checkpoint(out / "checkpoints") is None:
        result = (made + shorter)[-1]
        raise UserError(
            f"{out} holds {result.name}, the result of a run that is to be prolonged to {images:,} images, and no "
            "whole checkpoint to continue from.",
            f"Restore {out / 'checkpoints'}, keep the length that the run had, or choose another out"
            + (f": a new run that starts from the result has init_from={result}." if "model" in result.name else "."),
        )


def check_product(folder: Path) -> None:
    """Compare the result of a finished run with its checksums, if it has any.

    Raises:
        UserError: It is damaged; it can be written again from the checkpoints.
    """
    try:
        verify_checksums(folder, "")
    except UserError as error:
        raise UserError(
            error.message,
            f"Restore {folder} from a copy. Or remove it and repeat the command, which writes it again from the last "
            "checkpoint.",
        ) from None


def read_record(out: Path) -> dict[str, Any]:
    """What identifies the run in ``out``, from its run.json.

    Raises:
        UserError: It is absent or damaged.
    """
    remedy = "Restore it from a copy, or choose another out."
    content, _ = read_sealed(out / RUN_FILE, remedy)
    check_types(content, {"run": dict}, out / RUN_FILE, remedy)
    return content["run"]


def _record_in(out: Path) -> dict[str, Any]:
    """What identifies the run in ``out``, from run.json or, if that is damaged, from the newest checkpoint."""
    try:
        return read_record(out)
    except UserError as error:
        if (newest := newest_checkpoint(out / "checkpoints")) is None:
            raise
        logger.warning("%s The settings of the run are read from the checkpoint %s.", error.message, newest)
        return load_state(newest)["run"]


def build(settings: TrainSettings, data: TrainingData, source: Source | None) -> tuple[Denoiser, pd.DataFrame | None]:
    """The denoiser before training, fp32 on the CPU, and the table of transferred tensors if it starts from a model.

    Initial weights are drawn from ``settings.seed``, without changing the caller's random state.
    """
    channels, height, width = data.store.shape
    if height != width:
        raise UserError(f"Latents are square; these are {height}×{width}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if source is not None:
            denoiser, table = transfer(source, data.schema, settings.model, settings.dropout, (channels, height, width))
            table = freeze_others(denoiser, table, source, settings)
            if settings.lora is not None:
                lora, before = settings.lora, {name for name, _ in denoiser.named_parameters()}
                targets = [end for name in lora.targets for end in LORA_TARGETS[name]]
                add_lora(denoiser.unet, lora.rank, lora.alpha or lora.rank, targets, lora.dropout)
                table = with_adapter(table, denoiser, before)
            logger.info("Starting from %s: %s.", source.folder, describe_table(table))
        else:
            conditioner = None
            unet = build_unet(settings.model, channels, height, conditional=data.schema is not None)
            if data.schema is not None:
                model, patterns = settings.model, asdict(settings.dropout)
                conditioner = MetadataConditioner(
                    data.schema.to_dict(), model.embed_dim, None, model.fusion, model.widths, patterns
                )
            denoiser, table = Denoiser(unet, conditioner), None
    if settings.checkpoint_activations:
        denoiser.unet.enable_gradient_checkpointing()
    return denoiser, table


def begin(
    out: Path,
    record: Mapping[str, Any],
    settings: Any,
    table: pd.DataFrame | None = None,
    products: Sequence[str] = PRODUCTS,
) -> None:
    """Write run.json, settings.yaml and, when fine-tuning, transfer.csv; remove what a killed process left.

    The result of a shorter run that is prolonged gets another name first, so that it is never taken for the longer's.
    """
    made = [name for name in products if (out / name).exists()]
    if made and (before := planned_images(_record_in(out))) < planned_images(record):
        set_aside(out, made, before)
    write_sealed(out / RUN_FILE, {"run": record})
    remove_unfinished(out)
    remove_unfinished(out / "checkpoints")
    kept = written(type(settings), plain(asdict(settings)))
    write_text(out / "settings.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    if table is not None:
        write_for_people(table, out / "transfer.csv")


def find_autoencoder(settings: TrainSettings, data: TrainingData, source: Source | None) -> Autoencoder:
    """The autoencoder of the latents, loaded before training because a finished run stores it with the model.

    Raises:
        UserError: It is absent, or is not the one that encoded the latents.
    """
    known = data.store.info["autoencoder"]
    inside = source.folder / "autoencoder" if source else None
    where = settings.autoencoder or (str(inside) if inside and inside.is_dir() else known["source"])
    autoencoder = load_autoencoder(where)
    if not latents_fit(autoencoder.description, known["hash"]):
        raise UserError(
            f"The latents in {settings.latents} were encoded by {known['source']} ({known['hash'][:12]}), and the "
            f"autoencoder {where} ({autoencoder.hash[:12]}) is another one.",
            "Set autoencoder to the name or folder of the right one.",
        )
    return autoencoder


def write_product(
    folder: Path,
    images: int,
    facts: Mapping[str, Any],
    *,
    settings: TrainSettings,
    record: Mapping[str, Any],
    data: TrainingData,
    autoencoder: Autoencoder,
    objective: ObjectiveSettings,
    averaged: Denoiser,
    source: Source | None,
) -> None:
    """Write a folder with the averaged weights, a model or an adapter, at once or not at all.

    Args:
        folder: Its path.
        images: Images seen.
        facts: What else its provenance has.
        settings, record, data, autoencoder, objective, source: The run's.
        averaged: The averaged denoiser; it stays as it is.
    """
    provenance = {**data.info, "training_patches": len(data), "images_seen": images, **record, **facts}
    if source is not None:
        provenance["seen"] = merge_records(data.info["seen"], source.seen)
    averaged = folded(averaged)
    if settings.lora is not None and source is not None:
        save_adapter(folder, averaged, source.model_hash, added_values(source, averaged), provenance)
        return
    MediPipeline.from_parts(averaged, objective, autoencoder, data.shift, data.scale, provenance).save_pretrained(
        folder
    )


def write_average(settings: AverageSettings) -> Path:
    """Write the model of a finished run with its weights averaged over another length.

    Returns:
        The model folder.

    Raises:
        UserError: The run is not finished, kept too few averages, or the folder exists.
    """
    run, out = Path(settings.run), Path(settings.out)
    if not (run / "model").is_dir():
        raise UserError(f"{run} holds no finished model.", "Finish the run first.")
    with output_lock(out, next_to=True):
        return _write_average(run, out, settings)


def _write_average(run: Path, out: Path, settings: AverageSettings) -> Path:
    if out.exists():
        raise UserError(f"{out} exists already.", "Choose another out.")
    tensors, made = reconstruct(run, settings.width, settings.images)
    pipeline = MediPipeline.from_pretrained(run / "model")
    pipeline.denoiser.load_state_dict(tensors)
    pipeline.provenance["average"] = made
    pipeline.provenance["images_seen"] = made["images"]
    pipeline.save_pretrained(out)
    return out


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the network's own dropout for one update in one process."""
    return batch_seed(seed ^ (rank + 1), step)
