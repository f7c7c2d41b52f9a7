"""Translate real patches to another hospital's conditions, or another value of any field: the structure is kept.

A translated patch depends on the model, the settings and its source patch alone. As in generation, shards are the unit
of work, of distribution and of resume.
"""

from __future__ import annotations

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
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import lay_out
from latent_medi.diffusion.inversion import first_step_of, translate_latents
from latent_medi.diffusion.model_folder import known_fields
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.features.cache import content_hash
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.sampling.settings import TranslateSettings
from latent_medi.sampling.synthetic_dataset import SyntheticDataset, digest, load_adapters, model_provenance
from latent_medi.sampling.translation_baselines import compare, stain_mappings, structural_similarity, write_sheet
from latent_medi.sampling.translation_request import (
    Request,
    ddim_sampler,
    fields_of,
    make_request,
    some_patches,
    split_filter,
    wanted_values,
)
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.finish import Description
from latent_medi.shards.writing.writer import Patch

logger = get_logger("sampling")


@dataclass(frozen=True)
class Translation:
    """The result of :func:`translate`.

    Args:
        dataset: The translated patches.
        measures: See :func:`~latent_medi.sampling.translation_baselines.compare`; empty in processes other than the
            main one.
        unchanged: Selected patches that already had the target's values and were left out.
    """

    dataset: PatchDataset
    measures: dict[str, Any]
    unchanged: int


def translate(
    settings: TranslateSettings, model: MediPipeline | None = None, accelerator: Accelerator | None = None
) -> Translation:
    """Translate patches into a new dataset folder, or complete that of a killed run; then measure and draw.

    Args:
        settings: Which patches, to which values, and how; ``data``, ``to`` and ``out`` are required.
        model: A pipeline; by default the settings' model folder.
        accelerator: Devices; by default made from the launcher's environment. Its processes share the shards.

    Returns:
        The dataset, with origin "synthetic", the fields of model and source dataset together, patient
        ``synthetic:<model hash>:<source patient>``, and the columns ``translated_from`` (the source's key),
        ``from_patient`` and ``from_<field>`` for each field of ``to``. Measures and figure are the main
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
    first_step_of(settings.strength, settings.steps)
    if settings.measured:
        structural_similarity()  # fail now rather than after the last patch if it is not installed
    accelerator = accelerator or make_accelerator(patient=True)
    with output_lock(settings.out, accelerator):
        return _translate(settings, model, accelerator)


def _translate(settings: TranslateSettings, model: MediPipeline | None, accelerator: Accelerator) -> Translation:
    with agreed(accelerator) as declared:
        # What is wrong with the folder or the wanted values is said before the model is loaded.
        PatchDataset.open(settings.data)
        if model is None and not settings.adapters and (known := known_fields(settings.model)) is not None:
            wanted_values(known, settings.to)
        pipeline = model or MediPipeline.from_pretrained(settings.model)
        load_adapters(pipeline, settings.adapters, settings.adapter_scales, is_loaded=model is not None)
        pipeline.to(accelerator.device)
        request = make_request(settings, pipeline)
        model_hash = pipeline.model_hash
        schema, mpp = Schema.merge(pipeline.schema, request.data.schema), float(request.data.info["mpp"])
        provenance = _provenance(request, pipeline, settings, model_hash)
        name = settings.name or Path(settings.out).name
        about = Description(name, schema, pipeline.patch_size, mpp, settings.codec, provenance)
        synthetic = SyntheticDataset(Path(settings.out), about, len(request.rows), settings)
        done = synthetic.finished()
        declared.add_input("model", settings.model, lambda: model_hash)
        declared.add_input("data", settings.data, lambda: content_hash(request.data))
        declared.add_settings(settings, without=("data", "model", "adapters"))
        declared.add_settings(provenance, without=("model", "source"))
        declared.add_settings({"finished": done is not None})
    if done is None:

        def patches(positions: range) -> Iterator[Patch]:
            return _patches(request, positions, schema, pipeline, settings, model_hash)

        done = synthetic.write(patches, accelerator, "translating")
    measures = _measured(done, request, pipeline, settings) if accelerator.is_main_process else {}
    return Translation(done, measures, request.unchanged)


def translate_images(
    images: np.ndarray,
    source: Conditions | None,
    target: Conditions | None,
    pipeline: MediPipeline,
    settings: TranslateSettings,
) -> np.ndarray:
    """Translate patches in fp32, in batches that are padded to ``device_batch``.

    Args:
        images: uint8 [N, H, W, 3].
        source: Conditions of the patches, N.
        target: Conditions to translate them to, N.
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
            ddim_sampler(pipeline, settings),
            settings.strength,
            settings.refinements,
            settings.guidance,
        )
        made.append(pipeline.decode(latents)[: len(images) - start])
    return np.concatenate(made) if made else images


def round_trip(images: np.ndarray, pipeline: MediPipeline, batch: int) -> np.ndarray:
    """Patches encoded and decoded, uint8 [N, H, W, 3]: what the autoencoder alone changes."""
    device = pipeline.unet.device
    parts = [pipeline.decode(pipeline.encode(images[i : i + batch]).to(device)) for i in range(0, len(images), batch)]
    return np.concatenate(parts) if parts else images


def _patches(
    request: Request,
    positions: range,
    schema: Schema,
    pipeline: MediPipeline,
    settings: TranslateSettings,
    model_hash: str,
) -> Iterator[Patch]:
    """Translate some of the patches of a request, batch by batch."""
    method = {"model": model_hash, **_method(settings)}
    for start in range(positions.start, positions.stop, settings.device_batch):
        part = np.arange(start, min(start + settings.device_batch, positions.stop))
        rows = request.data.index.iloc[request.rows[part]]
        target = [request.target[i] for i in part]
        images = translate_images(
            request.data.read(request.rows[part]),
            pipeline.conditions([request.source[i] for i in part]),
            pipeline.conditions(target),
            pipeline,
            settings,
        )
        source = fields_of(rows, schema)
        for image, row, old, new in zip(images, rows.to_dict("records"), source, target, strict=True):
            values = {**old, **new}
            prefix = f"synthetic:{model_hash[:12]}"
            yield Patch(
                key=f"translated-{model_hash[:8]}-{digest({**method, 'key': row['key']})[:20]}",
                image=image,
                patient=f"{prefix}:{row['patient']}",
                slide=f"{prefix}:{row['slide']}",
                x=int(row["x"]),
                y=int(row["y"]),
                source_mpp=float(row["source_mpp"]),
                fields={name: values.get(name, UNKNOWN_WORD) for name in schema.names},
                origin="synthetic",
                extra={
                    "translated_from": str(row["key"]),
                    "from_patient": str(row["patient"]),
                    **{f"from_{n}": str(old.get(n, UNKNOWN_WORD)) for n in settings.to},
                },
            )


def _method(settings: TranslateSettings) -> dict[str, Any]:
    plain = {name: getattr(settings, name) for name in ("to", "strength", "steps", "refinements")}
    return json.loads(json.dumps({**plain, "guidance": asdict(settings.guidance)}))


def _provenance(
    request: Request, pipeline: MediPipeline, settings: TranslateSettings, model_hash: str
) -> dict[str, Any]:
    """Everything that the images depend on, JSON-able."""
    shards = [shard["sha256"] for shard in request.data.info["shards"]]
    keys = request.data.index["key"].iloc[request.rows].tolist()
    selection = {"where": dict(settings.where), **split_filter(settings, settings.split_value)}
    return {
        "kind": "synthetic",
        "method": "translated by DDIM inversion",
        **model_provenance(pipeline, model_hash, pipeline.provenance.get("seen")),
        "source": {
            "name": request.data.name,
            "sha256": digest({"shards": shards, "rows": keys, "fields": request.source}),
            "patches": len(keys),
            "selection": json.loads(json.dumps(selection)),
            "limit": settings.limit,
            "seed": settings.seed if settings.limit else 0,
        },
        **_method(settings),
        "device_batch": settings.device_batch,
        "patches_per_shard": settings.patches_per_shard,
        "codec": settings.codec,
        "precision": "fp32",
    }


def versions(
    request: Request, chosen: np.ndarray, translated: np.ndarray, pipeline: MediPipeline, settings: TranslateSettings
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some patches of a request, and their versions by translation and by every baseline.

    Args:
        request: The request.
        chosen: Positions among its rows, [n].
        translated: Their translations, uint8 [n, H, W, 3].
        pipeline: The model.
        settings: How to translate.

    Returns:
        The originals, uint8 [n, H, W, 3], and as many by name: "round_trip" (encoded and decoded), "no_op" (translated
        to their own conditions), "reinhard" and "macenko" (where a stain mapping is possible), "translated".
    """
    rows, source = request.rows[chosen], pipeline.conditions([request.source[i] for i in chosen])
    images = request.data.read(rows)
    return images, {
        "round_trip": round_trip(images, pipeline, settings.device_batch),
        "no_op": translate_images(images, source, source, pipeline, replace(settings, guidance=GuidanceSettings())),
        **_stain_mapped(request, rows, images, settings),
        "translated": translated,
    }


def _measured(
    done: PatchDataset, request: Request, pipeline: MediPipeline, settings: TranslateSettings
) -> dict[str, Any]:
    """Measure some translations and their baselines, and draw a few of them if there is a figure to write.

    Returns:
        See :func:`~latent_medi.sampling.translation_baselines.compare`; empty if nothing is to be measured.
    """
    drawn = settings.figure_rows if settings.figure else 0
    count = min(max(settings.measured, drawn), len(request.rows))
    if not count:
        return {}
    patients = request.data.index["patient"].to_numpy(str)[request.rows]
    chosen = some_patches(patients, count, settings.seed)
    images, found = versions(request, chosen, done.read(chosen), pipeline, settings)
    if settings.figure:
        shown = some_patches(patients[chosen], min(drawn, count), settings.seed)
        labels = []
        for i in chosen[shown]:
            source = " × ".join(str(request.source[i].get(n, UNKNOWN_WORD)) for n in settings.to)
            key = str(request.data.index["key"].iloc[request.rows[i]])
            labels.append(f"{key if len(key) <= 24 else '…' + key[-23:]}\n{source}")  # no longer than a patch is high
        write_sheet(
            settings.figure,
            {"original": images[shown], **{name: version[shown] for name, version in found.items()}},
            labels,
            " × ".join(str(v) for v in settings.to.values()),
            f"strength {settings.strength:g}, {settings.steps} steps",
        )
    return compare(images, found, patients[chosen]) if settings.measured else {}


def _stain_mapped(
    request: Request, rows: np.ndarray, images: np.ndarray, settings: TranslateSettings
) -> dict[str, np.ndarray]:
    """The same patches mapped by Reinhard's and Macenko's methods.

    Empty unless all fields of ``to`` are categorical and there are real patches with the old and the new values.
    """
    schema = request.data.schema
    names = [n for n in settings.to if n in schema.names and schema.field(n).kind == "categorical"]
    if len(names) < len(settings.to):
        logger.info("Stain mappings are left out: they need categorical fields in `to`, such as the site.")
        return {}
    pool = request.data.rows({**split_filter(settings, settings.stain_value), "origin": "real"})
    return stain_mappings(request.data, rows, images, {n: str(settings.to[n]) for n in names}, pool, settings.seed)
