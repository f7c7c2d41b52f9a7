"""Real patches under another hospital's conditions, or another value of any field: structure kept, look changed.

A translated patch is a pure function of the model, the settings and its source patch: as in generation, shards are the
unit of work, of distribution and of resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger, progress
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import lay_out
from latent_medi.diffusion.inversion import first_step_of, translate_latents
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.features.cache import content_hash
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.sampling.generate import finished_as, load_adapters
from latent_medi.sampling.settings import GenerateSettings, TranslateSettings
from latent_medi.sampling.translation_baselines import compare, stain_mappings, structural_similarity, write_sheet
from latent_medi.sampling.translation_request import Request, choose, ddim_of, fields_of, part_of, some_patches
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.background_writer import write_behind
from latent_medi.shards.writing.writer import Patch, finish_dataset, finished_shards, write_shard

logger = get_logger("synthesis")


@dataclass(frozen=True)
class Translation:
    """What came out.

    Args:
        dataset: The translated patches.
        measures: See :func:`~latent_medi.sampling.translation_baselines.compare`; empty in processes other than the
            main one.
        unchanged: Selected patches that already had the target's values, and were left out.
    """

    dataset: PatchDataset
    measures: dict[str, Any]
    unchanged: int


def translate(
    settings: TranslateSettings, model: MediPipeline | None = None, accelerator: Accelerator | None = None
) -> Translation:
    """Translate what the settings say, or go on where a killed run left off; then measure and draw.

    Args:
        settings: What, to what, how; ``data``, ``to`` and ``out`` are needed.
        model: A pipeline; by default the settings' model folder.
        accelerator: Devices; by default made from the launcher's environment. Its processes share the shards.

    Returns:
        The dataset, with origin "synthetic", the fields of model and source dataset together, patient
        ``synthetic:<model hash>:<source patient>``, and the columns ``translated_from`` (the source's key),
        ``from_patient`` and ``from_<field>`` for each field of ``to``. Measures and figure, if asked for, are the main
        process's.

    Raises:
        UserError: Something needed is not given; a field or value that the model does not know; patches of another
            size; an unconditional model; nothing to translate, or nothing that would change; synthetic patches,
            unless asked for; steps or guidance that the model does not support; no torchmetrics to measure with; a
            folder with another dataset.
    """
    needed = [name for name in ("data", "to", "out") if not getattr(settings, name)]
    if needed or not (settings.model or model):
        raise UserError(
            f"Translation needs {' and '.join([*needed, *([] if settings.model or model else ['model'])])}."
        )
    for name, least in (("device_batch", 1), ("patches_per_shard", 1), ("limit", 0), ("refinements", 0),
                        ("measured", 0), ("figure_rows", 1)):  # fmt: skip
        if getattr(settings, name) < least:
            raise UserError(f"{name} must be at least {least}, not {getattr(settings, name)}.")
    first_step_of(settings.strength, settings.steps)
    if settings.measured:
        structural_similarity()  # better missed now than after the last patch
    accelerator = accelerator or make_accelerator(patient=True)
    with output_lock(settings.out, accelerator):
        return _translate(settings, model, accelerator)


def _translate(settings: TranslateSettings, model: MediPipeline | None, accelerator: Accelerator) -> Translation:
    with agreed(accelerator) as told:
        pipeline = model or MediPipeline.from_pretrained(settings.model)
        load_adapters(
            pipeline,
            GenerateSettings(adapters=settings.adapters, adapter_scales=settings.adapter_scales),
            loaded=model is not None,
        )
        pipeline.to(accelerator.device)
        asked = choose(settings, pipeline)
        schema = Schema.merge(pipeline.schema, asked.data.schema)
        model_hash, mpp = pipeline.model_hash, float(asked.data.info["mpp"])
        folder, name = Path(settings.out), settings.name or Path(settings.out).name
        provenance = describe(asked, pipeline, settings, model_hash)
        done = finished_as(folder, name, provenance)
        told.reads("model", settings.model, lambda: model_hash)
        told.reads("data", settings.data, lambda: content_hash(asked.data))
        told.does(settings, but=("data", "model", "adapters"))
        told.does(provenance, but=("model", "source"))
        told.does({"finished": done is not None})
    if done is None:
        token = _digest(provenance)
        shards = range(-(-len(asked.rows) // settings.patches_per_shard))
        whole = {number for number, record in finished_shards(folder).items() if record.token == token}
        mine = [n for n in shards if n not in whole and n % accelerator.num_processes == accelerator.process_index]

        def patches(number: int) -> Iterator[Patch]:
            first = number * settings.patches_per_shard
            positions = np.arange(first, min(first + settings.patches_per_shard, len(asked.rows)))
            return patches_of(asked, positions, schema, pipeline, settings, model_hash)

        def write(number: int, its: Iterator[Patch]) -> None:
            write_shard(folder, number, its, settings.codec, token)

        shown = progress(mine, desc="translating", unit="shard") if accelerator.is_main_process else mine
        write_behind(((number, patches(number)) for number in shown), write, 2 * settings.device_batch)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_dataset(folder, name, schema, pipeline.patch_size, mpp, settings.codec, provenance, shards=shards)
        accelerator.wait_for_everyone()
        done = PatchDataset.open(folder)
    measures = show(done, asked, pipeline, settings) if accelerator.is_main_process else {}
    return Translation(done, measures, asked.unchanged)


def translate_images(
    images: np.ndarray,
    source: Conditions | None,
    target: Conditions | None,
    pipeline: MediPipeline,
    settings: TranslateSettings,
) -> np.ndarray:
    """Patches under other conditions, in batches that are filled up to ``device_batch``, all in fp32.

    Args:
        images: uint8 [N, H, W, 3].
        source: What they are, of N samples.
        target: What they are to become.
        pipeline: The model, on its device.
        settings: Strength, steps, refinements, guidance and batch.

    Returns:
        uint8 [N, H, W, 3].
    """
    device, size, made = pipeline.unet.device, settings.device_batch, []
    pipeline.denoiser.eval()
    lay_out(pipeline.unet, half=False)
    for start in range(0, len(images), size):
        index = torch.arange(start, start + size).clamp(max=len(images) - 1)
        latents = translate_latents(
            pipeline.denoiser,
            None if source is None else source.rows(index).to(device),
            None if target is None else target.rows(index).to(device),
            pipeline.encode(images[index.numpy()]).to(device),
            ddim_of(pipeline, settings),
            settings.strength,
            settings.refinements,
            settings.guidance,
        )
        made.append(pipeline.decode(latents)[: len(images) - start])
    return np.concatenate(made) if made else images


def round_trip(images: np.ndarray, pipeline: MediPipeline, batch: int) -> np.ndarray:
    """Patches through the autoencoder and back, uint8 [N, H, W, 3]: what is lost before anything is translated."""
    device = pipeline.unet.device
    parts = [pipeline.decode(pipeline.encode(images[i : i + batch]).to(device)) for i in range(0, len(images), batch)]
    return np.concatenate(parts) if parts else images


def patches_of(
    asked: Request,
    positions: np.ndarray,
    schema: Schema,
    pipeline: MediPipeline,
    settings: TranslateSettings,
    model_hash: str,
) -> Iterator[Patch]:
    """Translate some of the patches asked for, batch by batch."""
    how = {"model": model_hash, **_how(settings)}
    for start in range(0, len(positions), settings.device_batch):
        part = positions[start : start + settings.device_batch]
        rows = asked.data.index.iloc[asked.rows[part]]
        target = [asked.target[i] for i in part]
        images = translate_images(
            asked.data.read(asked.rows[part]),
            pipeline.conditions([asked.source[i] for i in part]),
            pipeline.conditions(target),
            pipeline,
            settings,
        )
        everything = fields_of(rows, schema)
        for image, row, old, new in zip(images, rows.to_dict("records"), everything, target, strict=True):
            values = {**old, **new}
            who = f"synthetic:{model_hash[:12]}"
            yield Patch(
                key=f"translated-{model_hash[:8]}-{_digest({**how, 'key': row['key']})[:20]}",
                image=image,
                patient=f"{who}:{row['patient']}",
                slide=f"{who}:{row['slide']}",
                x=int(row["x"]),
                y=int(row["y"]),
                source_mpp=float(row["source_mpp"]),
                fields={f.name: values.get(f.name, UNKNOWN_WORD) for f in schema.fields},
                origin="synthetic",
                extra={
                    "translated_from": str(row["key"]),
                    "from_patient": str(row["patient"]),
                    **{f"from_{n}": str(old.get(n, UNKNOWN_WORD)) for n in settings.to},
                },
            )


def _how(settings: TranslateSettings) -> dict[str, Any]:
    plain = {name: getattr(settings, name) for name in ("to", "strength", "steps", "refinements")}
    return json.loads(json.dumps({**plain, "guidance": asdict(settings.guidance)}))


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def describe(asked: Request, pipeline: MediPipeline, settings: TranslateSettings, model_hash: str) -> dict[str, Any]:
    """Everything that the images depend on, JSON-able."""
    stacked = [{"hash": digest, "scale": scale} for digest, scale in pipeline.adapters]
    shards = [shard["sha256"] for shard in asked.data.info["shards"]]
    keys = asked.data.index["key"].iloc[asked.rows].tolist()
    selection = {"where": dict(settings.where), **part_of(settings, settings.split_value)}
    return {
        "kind": "synthetic",
        "method": "translated by DDIM inversion",
        "model": model_hash,  # of the model with its adapters
        **({"adapters": stacked} if stacked else {}),
        "autoencoder": pipeline.autoencoder.hash,
        "trained_on": pipeline.provenance.get("name", ""),
        **({"seen": seen} if (seen := pipeline.provenance.get("seen")) else {}),
        "source": {
            "name": asked.data.name,
            "sha256": _digest({"shards": shards, "rows": keys, "fields": asked.source}),
            "patches": len(keys),
            "selection": json.loads(json.dumps(selection)),
            "limit": settings.limit,
            "seed": settings.seed if settings.limit else 0,
        },
        **_how(settings),
        "device_batch": settings.device_batch,
        "patches_per_shard": settings.patches_per_shard,
        "codec": settings.codec,
        "precision": "fp32",
    }


def versions(
    asked: Request, chosen: np.ndarray, translated: np.ndarray, pipeline: MediPipeline, settings: TranslateSettings
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some of the patches asked for, and what every way makes of them.

    Args:
        asked: The request.
        chosen: Positions among its rows, [n].
        translated: Their translations, uint8 [n, H, W, 3].
        pipeline: The model.
        settings: How to translate.

    Returns:
        The originals, uint8 [n, H, W, 3], and by name as many of "round_trip" (through the autoencoder), "no_op"
        (translated to what they are), "reinhard" and "macenko" (where a stain mapping means something), "translated".
    """
    rows, source = asked.rows[chosen], pipeline.conditions([asked.source[i] for i in chosen])
    images = asked.data.read(rows)
    return images, {
        "round_trip": round_trip(images, pipeline, settings.device_batch),
        "no_op": translate_images(images, source, source, pipeline, replace(settings, guidance=GuidanceSettings())),
        **stain_mapped(asked, rows, images, settings),
        "translated": translated,
    }


def show(done: PatchDataset, asked: Request, pipeline: MediPipeline, settings: TranslateSettings) -> dict[str, Any]:
    """Measure some of the translations beside the other ways, and draw fewer of them.

    Returns:
        See :func:`~latent_medi.sampling.translation_baselines.compare`; nothing if no measures are asked for.
    """
    drawn = settings.figure_rows if settings.figure else 0
    count = min(max(settings.measured, drawn), len(asked.rows))
    if not count:
        return {}
    patients = asked.data.index["patient"].to_numpy(str)[asked.rows]
    chosen = some_patches(patients, count, settings.seed)
    images, ways = versions(asked, chosen, done.read(chosen), pipeline, settings)
    if settings.figure:
        shown = some_patches(patients[chosen], min(drawn, count), settings.seed)
        labels = []
        for i in chosen[shown]:
            was = " × ".join(str(asked.source[i].get(n, UNKNOWN_WORD)) for n in settings.to)
            key = str(asked.data.index["key"].iloc[asked.rows[i]])
            labels.append(f"{key if len(key) <= 24 else '…' + key[-23:]}\n{was}")  # as high as a patch is
        write_sheet(
            settings.figure,
            {"original": images[shown], **{name: ways[name][shown] for name in ways}},
            labels,
            " × ".join(str(v) for v in settings.to.values()),
            f"strength {settings.strength:g}, {settings.steps} steps",
        )
    return compare(images, ways, patients[chosen]) if settings.measured else {}


def stain_mapped(
    asked: Request, rows: np.ndarray, images: np.ndarray, settings: TranslateSettings
) -> dict[str, np.ndarray]:
    """The same patches by Reinhard's and Macenko's mapping, where that means something: all fields of ``to`` are
    categorical (not the class), with real patches on both sides.
    """
    schema = asked.data.schema
    names = [n for n in settings.to if n in schema.names and schema.field(n).kind == "categorical"]
    if len(names) < len(settings.to):
        logger.info("No stain mapping beside: it goes from one categorical value to another, such as site to site.")
        return {}
    pool = asked.data.rows({**part_of(settings, settings.stain_value), "origin": "real"})
    return stain_mappings(asked.data, rows, images, {n: str(settings.to[n]) for n in names}, pool, settings.seed)
