"""From a plan and a model to a dataset folder of synthetic patches.

Shards are the unit of work, of distribution and of resume. An image is a pure function of the model, the sampler's
settings, its condition and its own seed: it does not matter which process makes it, after how many kills, or next to
which others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise, make_sampler
from latent_medi.errors import UserError
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.progress import get_logger, progress
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.writer import Patch, finish_dataset, finished_shards, write_shard
from latent_medi.synthesis.plan import Sample, check_plan, read_plan, sample_at
from latent_medi.synthesis.settings import GenerateSettings

logger = get_logger("synthesis")


def generate(settings: GenerateSettings, accelerator: Accelerator | None = None) -> PatchDataset:
    """Generate what the settings say; see :func:`generate_plan`.

    Raises:
        UserError: Plan, model or out is not given; or as for :func:`generate_plan`.
    """
    if missing := [name for name in ("plan", "model", "out") if not getattr(settings, name)]:
        raise UserError(f"Generation needs {' and '.join(missing)}.")
    return generate_plan(settings.plan, settings.model, settings.out, settings, accelerator)


def generate_plan(
    plan: pd.DataFrame | str | Path,
    model: MediPipeline | str | Path,
    out: str | Path,
    settings: GenerateSettings | None = None,
    accelerator: Accelerator | None = None,
) -> PatchDataset:
    """Generate what a plan asks for, or go on where a killed run left off.

    Args:
        plan: The plan or its file.
        model: A pipeline or its folder.
        out: Dataset folder to write.
        settings: Sampler, guidance, batch and shard sizes; its plan, model and out are not looked at.
        accelerator: Devices; by default made from the launcher's environment. Its processes share the shards.

    Returns:
        The dataset: origin "synthetic", patient ``synthetic:<model hash>:<plan row>``, and the columns ``plan_row`` and
        ``sample_seed``. A field that the model was not told is "unknown".

    Raises:
        UserError: A plan that does not fit the model, nothing to generate, guidance or a sampler that the model does
            not support, or a folder with another dataset.
    """
    settings = settings or GenerateSettings()
    for name in ("device_batch", "patches_per_shard"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(settings, name)}.")
    accelerator = accelerator or make_accelerator(patient=True)
    pipeline = model if isinstance(model, MediPipeline) else MediPipeline.from_pretrained(model)
    load_adapters(pipeline, settings, loaded=isinstance(model, MediPipeline))
    pipeline.to(accelerator.device)
    checked = read_plan(plan) if isinstance(plan, (str, Path)) else plan
    checked = check_plan(checked, pipeline.schema, ignore=settings.ignore)
    ends = np.cumsum(checked["count"].to_numpy(np.int64))
    if not len(ends) or not ends[-1]:
        raise UserError("The plan asks for no image: every count is 0.")
    mpp = settings.mpp or float(pipeline.provenance.get("mpp", 0))
    if not mpp > 0:
        raise UserError("The model does not say how many µm a pixel is.", "Set mpp.")
    check_requests(checked, pipeline, settings)

    folder, name = Path(out), settings.name or Path(out).name
    model_hash = pipeline.model_hash
    provenance = describe(checked, pipeline, settings, model_hash)
    if (folder / INFO_FILE).exists():
        done = PatchDataset.open(folder)
        if done.info["provenance"] != provenance or done.name != name:
            raise UserError(f"{folder} holds another dataset.", "Choose another folder, or remove this one first.")
        logger.info("%s is finished.", folder)
        return done
    token = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    shards = range(-(-int(ends[-1]) // settings.patches_per_shard))
    whole = {number for number, record in finished_shards(folder).items() if record.token == token}
    mine = [n for n in shards if n not in whole and n % accelerator.num_processes == accelerator.process_index]
    for number in progress(mine, desc="generating", unit="shard") if accelerator.is_main_process else mine:
        first = number * settings.patches_per_shard
        positions = range(first, min(first + settings.patches_per_shard, int(ends[-1])))
        samples = [sample_at(checked, pipeline.schema, position, ends) for position in positions]
        write_shard(folder, number, patches_of(samples, pipeline, settings, mpp, model_hash), settings.codec, token)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_dataset(
            folder, name, pipeline.schema, pipeline.patch_size, mpp, settings.codec, provenance, shards=shards
        )
    accelerator.wait_for_everyone()
    return PatchDataset.open(folder)


def load_adapters(pipeline: MediPipeline, settings: GenerateSettings, loaded: bool = False) -> None:
    """Stack the settings' adapters on a model that was just read.

    Args:
        pipeline: The model.
        settings: Names the adapters and their scales.
        loaded: Whether it is a pipeline of the caller's, which is left as it is.

    Raises:
        UserError: Scales that do not match the adapters, adapters for a pipeline of the caller's, or an adapter that
            does not fit.
    """
    folders, scales = settings.adapters, settings.adapter_scales or [1.0] * len(settings.adapters)
    if len(scales) != len(folders):
        raise UserError(f"There are {len(folders)} adapters and {len(scales)} adapter_scales.", "Give one for each.")
    if folders and loaded:
        raise UserError(
            "Adapters are loaded onto a model folder, and a pipeline is given.", "Call its load_adapter() instead."
        )
    for folder, scale in zip(folders, scales, strict=True):
        pipeline.load_adapter(folder, scale)


def patches_of(
    samples: list[Sample], pipeline: MediPipeline, settings: GenerateSettings, mpp: float, model_hash: str
) -> Iterator[Patch]:
    """Generate some samples, batch by batch."""
    for start in range(0, len(samples), settings.device_batch):
        part = samples[start : start + settings.device_batch]
        noise, generators = draw_noise([sample.seed for sample in part], pipeline.latent_shape)
        latents = pipeline.generate_latents(
            pipeline.conditions([sample.fields for sample in part]),
            noise,
            settings.sampler,
            settings.guidance,
            generators,
            batch=settings.device_batch,
            pad=True,
            precision=settings.precision,
        )
        # The decoder, too, is given full batches: a kernel may round differently for another batch size.
        filled = latents[torch.arange(settings.device_batch).clamp(max=len(part) - 1)]
        images = pipeline.decode(filled.to(pipeline.unet.device))[: len(part)]
        for sample, image in zip(part, images, strict=True):
            who = f"synthetic:{model_hash[:12]}:{sample.row}"
            yield Patch(
                key=f"synthetic-{model_hash[:8]}-{sample.row:05d}-{sample.seed:016x}",
                image=image,
                patient=who,
                slide=who,
                x=-1,
                y=-1,
                source_mpp=mpp,
                fields={f.name: sample.fields.get(f.name, UNKNOWN_WORD) for f in pipeline.schema.fields},
                origin="synthetic",
                extra={"plan_row": sample.row, "sample_seed": sample.seed},
            )


def check_requests(plan: pd.DataFrame, pipeline: MediPipeline, settings: GenerateSettings) -> None:
    """Refuse, before anything is generated, a sampler, guidance or condition that the model does not support.

    Raises:
        UserError: Says which and why.
    """
    make_sampler(pipeline.scheduler.config, settings.sampler)
    fields = [f for f in pipeline.schema.fields if f.name in plan.columns]
    rows = plan[plan["count"] > 0]
    # What a continuous cell holds does not matter here, only that it is given.
    given = [
        {f.name: UNKNOWN_WORD if f.continuous else row[f.name] for f in fields if row[f.name]}
        for row in rows.to_dict("records")
    ]
    check_guidance(settings.guidance, pipeline.conditioning, pipeline.conditions(given))


def describe(plan: pd.DataFrame, pipeline: MediPipeline, settings: GenerateSettings, model_hash: str) -> dict[str, Any]:
    """Everything that the images depend on, JSON-able."""
    table = plan.drop(columns="verdict").to_csv(index=False, lineterminator="\n")
    stacked = [{"hash": digest, "scale": scale} for digest, scale in pipeline.adapters]
    return {
        "kind": "synthetic",
        "model": model_hash,  # of the model with its adapters
        **({"adapters": stacked} if stacked else {}),
        "autoencoder": pipeline.autoencoder.hash,
        "trained_on": pipeline.provenance.get("name", ""),
        "plan": {"sha256": hashlib.sha256(table.encode()).hexdigest(), "rows": plan.to_dict("records")},
        "sampler": asdict(settings.sampler),
        "guidance": json.loads(json.dumps(asdict(settings.guidance))),
        "device_batch": settings.device_batch,
        "patches_per_shard": settings.patches_per_shard,
        "codec": settings.codec,
        "precision": settings.precision,
        "ignored": sorted(settings.ignore),
    }
