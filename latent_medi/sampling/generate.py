"""Generate a dataset folder of synthetic patches from a plan and a model.

Shards are the unit of work, of distribution and of resume. An image depends on the model, the sampler's settings, its
condition and its own seed alone, whichever process generates it, after however many kills, and in whichever batch.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.model_folder import known_fields
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import make_sampler
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.planning.plan import Sample, check_plan, read_plan, sample_at
from latent_medi.sampling.grids import check_picture, samples_sheet, save_sheet
from latent_medi.sampling.image_sampler import ImageSampler
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.sampling.synthetic_dataset import SyntheticDataset, load_adapters, model_provenance
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.finish import Description
from latent_medi.shards.writing.writer import Patch

logger = get_logger("sampling")

_WIDTH, _LINES = 16, 24


def generate(settings: GenerateSettings, accelerator: Accelerator | None = None) -> PatchDataset | None:
    """Generate a dataset folder, a picture, or both; see :func:`generate_plan`. ``None`` for a picture alone.

    Raises:
        UserError: Plan, model or out is not given; or as for :func:`generate_plan`.
        Preempted: SIGTERM or SIGUSR1 came; finished shards are kept.
    """
    plan: pd.DataFrame | str = settings.plan
    if settings.n:
        if settings.plan:
            raise UserError("Both plan and n are given.", "Leave out one.")
        plan = pd.DataFrame([{**settings.fields, "count": settings.n, "seed": settings.seed}])
    elif settings.fields:
        raise UserError("Fields are given, but not how many images.", "Add n=16, or write a plan.")
    wanted = {"plan (or n)": settings.plan or settings.n, "model": settings.model, "out": settings.out or settings.grid}
    if missing := [name for name, given in wanted.items() if not given]:
        raise UserError(f"Generation needs {' and '.join(missing)}.")
    if not settings.out and not settings.n:
        raise UserError("A plan's images need a folder.", "Give out; grid alone goes with n.")
    if not settings.out and settings.n > _WIDTH * _LINES:
        raise UserError(
            f"A picture alone holds {_WIDTH * _LINES} patches, not {settings.n}.", "Give out, a folder to keep them in."
        )
    if settings.grid:
        check_picture(settings.grid)
    accelerator = accelerator or make_accelerator(patient=True)
    if not settings.out and accelerator.num_processes > 1:
        raise UserError("A picture without out is drawn by one process.", "Give out too, or start one process.")
    if settings.out:
        dataset = generate_plan(plan, settings.model, settings.out, settings, accelerator)
        if settings.grid and accelerator.is_main_process:
            save_grid(dataset, settings.grid)
        return dataset
    with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
        whole = replace(settings, patches_per_shard=max(settings.n, 1), name="grid")
        save_grid(generate_plan(plan, settings.model, Path(folder) / "grid", whole, accelerator), settings.grid)
    return None


def save_grid(dataset: PatchDataset, path: str | Path) -> None:
    """Write a picture: a line of 16 patches for each of the plan's first 24 rows, or 24 lines of its only row."""
    rows = dataset.index["plan_row"].to_numpy()
    numbers = np.unique(rows)
    each = _WIDTH if len(numbers) > 1 else _WIDTH * _LINES
    plan = dataset.info["provenance"]["plan"]["rows"]
    labels = {i: " × ".join(str(plan[i][f]) for f in dataset.schema.names if plan[i].get(f)) for i in range(len(plan))}
    first = np.concatenate([np.flatnonzero(rows == number)[:each] for number in numbers[:_LINES]])
    save_sheet(samples_sheet(dataset.read(first), rows[first], labels, _WIDTH), path)


def generate_plan(
    plan: pd.DataFrame | str | Path,
    model: MediPipeline | str | Path,
    out: str | Path,
    settings: GenerateSettings | None = None,
    accelerator: Accelerator | None = None,
) -> PatchDataset:
    """Generate the images of a plan into a dataset folder, or complete the folder of a killed run.

    A finished folder whose plan is the beginning of this one is continued: rows can be added at the end of a plan.

    Args:
        plan: The plan or its file.
        model: A pipeline or its folder.
        out: Dataset folder to write.
        settings: Sampler, guidance, batch and shard sizes; its plan, model and out are ignored.
        accelerator: Devices; by default made from the launcher's environment. Its processes share the shards.

    Returns:
        The dataset: origin "synthetic", patient ``synthetic:<model hash>:<plan row>``, and the columns ``plan_row`` and
        ``sample_seed``. A field that an image was not conditioned on is "unknown".

    Raises:
        UserError: A plan that does not fit the model, nothing to generate, guidance or a sampler that the model does
            not support, or a folder with another dataset.
    """
    settings = settings or GenerateSettings()
    accelerator = accelerator or make_accelerator(patient=True)
    with output_lock(out, accelerator):
        return _generate(plan, model, out, settings, accelerator)


def _generate(
    plan: pd.DataFrame | str | Path,
    model: MediPipeline | str | Path,
    out: str | Path,
    settings: GenerateSettings,
    accelerator: Accelerator,
) -> PatchDataset:
    with agreed(accelerator) as declared:
        checked = read_plan(plan) if isinstance(plan, (str, Path)) else plan
        is_loaded = isinstance(model, MediPipeline)
        known = None if isinstance(model, MediPipeline) else known_fields(model)
        if known is not None and not settings.adapters and not settings.classifier.model:  # these add values
            check_plan(checked, known, ignore=settings.ignore)
        pipeline = model if isinstance(model, MediPipeline) else MediPipeline.from_pretrained(model)
        load_adapters(pipeline, settings.adapters, settings.adapter_scales, is_loaded)
        pipeline.to(accelerator.device)
        sampler = ImageSampler(pipeline, settings)
        checked = check_plan(checked, sampler.schema, ignore=settings.ignore)
        sampler.check_classifier_values(checked)
        ends = np.cumsum(checked["count"].to_numpy(np.int64))
        if not len(ends) or not ends[-1]:
            raise UserError("The plan asks for no image: every count is 0.")
        mpp = settings.mpp or float(pipeline.provenance.get("mpp", 0))
        if not mpp > 0:
            raise UserError("The model does not say how many µm a pixel is.", "Set mpp.")
        check_conditions(checked, pipeline, settings)
        model_hash = pipeline.model_hash
        provenance = _provenance(checked, sampler, model_hash)
        name = settings.name or Path(out).name
        about = Description(name, sampler.schema, pipeline.patch_size, mpp, settings.codec, provenance)
        synthetic = SyntheticDataset(Path(out), about, int(ends[-1]), settings)
        done = synthetic.finished()
        declared.add_input("model", "" if is_loaded else model, lambda: model_hash)
        declared.add_input("plan", plan if isinstance(plan, (str, Path)) else "", lambda: provenance["plan"]["sha256"])
        declared.add_settings(settings, without=("plan", "model", "adapters", "autoguidance", "classifier"))
        declared.add_settings(provenance, without=("model", "plan"))
        declared.add_settings({"out": str(out), "mpp": mpp, "finished": done is not None})
    if done is not None:
        return done
    if accelerator.is_main_process:
        synthetic.reopen()
        logger.info("%d images: %s", ends[-1], sampler.cost_text())
    accelerator.wait_for_everyone()

    def patches(positions: range) -> Iterator[Patch]:
        samples = [sample_at(checked, sampler.schema, position, ends) for position in positions]
        return _patches(samples, sampler, mpp, model_hash)

    return synthetic.write(patches, accelerator, "generating")


def _patches(samples: list[Sample], sampler: ImageSampler, mpp: float, model_hash: str) -> Iterator[Patch]:
    for sample, image in sampler.images(samples):
        patient = f"synthetic:{model_hash[:12]}:{sample.row}"
        yield Patch(
            key=f"synthetic-{model_hash[:8]}-{sample.row:05d}-{sample.seed:016x}",
            image=image,
            patient=patient,
            slide=patient,
            x=-1,
            y=-1,
            source_mpp=mpp,
            fields={name: sample.fields.get(name, UNKNOWN_WORD) for name in sampler.schema.names},
            origin="synthetic",
            extra={"plan_row": sample.row, "sample_seed": sample.seed},
        )


def check_conditions(plan: pd.DataFrame, pipeline: MediPipeline, settings: GenerateSettings) -> None:
    """Check, before anything is generated, that the model supports the sampler, the guidance and every condition.

    Raises:
        UserError: Names what it does not support, and why.
    """
    make_sampler(pipeline.scheduler.config, settings.sampler)
    fields = [f for f in pipeline.schema.fields if f.name in plan.columns]
    # Of a continuous field only matters whether it is given, not its value.
    given = [
        {f.name: UNKNOWN_WORD if f.continuous else row[f.name] for f in fields if row[f.name]}
        for row in plan[plan["count"] > 0].to_dict("records")
    ]
    check_guidance(settings.guidance, pipeline.conditioning, pipeline.conditions(given))


def _provenance(plan: pd.DataFrame, sampler: ImageSampler, model_hash: str) -> dict[str, Any]:
    """Everything that the images depend on, JSON-able."""
    settings = sampler.settings
    table = plan.drop(columns="verdict").to_csv(index=False, lineterminator="\n")
    return {
        "kind": "synthetic",
        **model_provenance(sampler.pipeline, model_hash, sampler.seen if sampler.seen["parts"] else None),
        "plan": {"sha256": hashlib.sha256(table.encode()).hexdigest(), "rows": plan.to_dict("records")},
        **sampler.description(),
        "device_batch": settings.device_batch,
        "patches_per_shard": settings.patches_per_shard,
        "codec": settings.codec,
        "precision": settings.precision,
        "ignored": sorted(settings.ignore),
    }
