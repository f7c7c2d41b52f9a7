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

from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.guidance import check_given, check_guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import make_sampler, sample_latents
from latent_medi.errors import UserError
from latent_medi.files import read_json
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.progress import get_logger, progress
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.writer import Patch, finish_dataset, finished_shards, write_shard
from latent_medi.synthesis.plan import Sample, check_plan, read_plan, sample_at
from latent_medi.synthesis.settings import GenerateSettings

logger = get_logger("synthesis")


def generate(
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
        settings: Sampler, guidance, batch and shard sizes.
        accelerator: Devices; by default made from the launcher's environment. Its processes share the shards.

    Returns:
        The dataset: origin "synthetic", patient ``synthetic:<model hash>:<plan row>``, and the columns ``plan_row`` and
        ``sample_seed``. A field that the model was not told is "unknown".

    Raises:
        UserError: A plan that does not fit the model, nothing to generate, guidance or a sampler that the model does not
            support, or a folder with another dataset.
    """
    settings = settings or GenerateSettings()
    for name in ("device_batch", "patches_per_shard"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(settings, name)}.")
    accelerator = accelerator or Accelerator(mixed_precision=settings.precision)
    pipeline = model if isinstance(model, MediPipeline) else MediPipeline.from_pretrained(model)
    pipeline.to(accelerator.device)
    generator = _Generator(pipeline, plan, settings, accelerator)
    folder = Path(out)
    shards = range(generator.shards)

    provenance = generator.provenance()
    if (folder / INFO_FILE).exists():
        done = PatchDataset.open(folder)
        if done.info["provenance"] != provenance:
            raise UserError(f"{folder} holds another dataset.", "Choose another folder, or remove this one first.")
        logger.info("%s is finished.", folder)
        return done
    token = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    finished = {n for n, record in finished_shards(folder).items() if record.token == token}
    mine = [n for n in shards if n not in finished][accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # the others' lists must not depend on what this process writes now
    for number in progress(mine, desc="generating", unit="shard") if accelerator.is_main_process else mine:
        write_shard(folder, number, generator.patches(number), settings.codec, token)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        name, mpp = settings.name or folder.name, generator.mpp
        size = pipeline.patch_size
        finish_dataset(folder, name, generator.schema, size, mpp, settings.codec, provenance, shards=shards)
    accelerator.wait_for_everyone()
    return PatchDataset.open(folder)
