"""From a plan and a model to a dataset folder of synthetic patches.

Shards are the unit of work, of distribution and of resume. An image is a pure function of the model, the sampler's
settings, its condition and its own seed: it does not matter which process makes it, after how many kills, or next to
which others.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.preemption import Notice, listening
from latent_medi.core.progress import get_logger, progress
from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import make_sampler
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.planning.plan import Sample, check_plan, read_plan, sample_at
from latent_medi.sampling.grids import check_picture, samples_sheet, save_sheet
from latent_medi.sampling.image_sampler import Maker
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.writing.background_writer import write_behind
from latent_medi.shards.writing.writer import Patch, finish_dataset, finished_shards, write_shard

logger = get_logger("synthesis")

_WIDTH, _LINES = 16, 24


def generate(settings: GenerateSettings, accelerator: Accelerator | None = None) -> PatchDataset | None:
    """Generate what the settings say; see :func:`generate_plan`. ``None`` if only a picture was asked for.

    Raises:
        UserError: Plan, model or out is not given; or as for :func:`generate_plan`.
        Preempted: SIGTERM or SIGUSR1 came; finished shards are kept.
    """
    plan: pd.DataFrame | str = settings.plan
    if settings.n:
        if settings.plan:
            raise UserError("A plan is given and n too.", "Leave out n, or the plan.")
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
            f"A picture alone holds {_WIDTH * _LINES} patches, not {settings.n}.", "Give out: they are kept there."
        )
    if settings.grid:
        check_picture(settings.grid)
    accelerator = accelerator or make_accelerator(patient=True)
    if not settings.out and accelerator.num_processes > 1:  # each would make it in a folder of its own
        raise UserError("A picture alone is made by one process.", "Give out too, or start one process.")
    if settings.out:
        dataset = generate_plan(plan, settings.model, settings.out, settings, accelerator)
        if settings.grid and accelerator.is_main_process:
            save_grid(dataset, settings.grid)
        return dataset
    with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:  # made and kept in one way, with or without out
        whole = replace(settings, patches_per_shard=max(settings.n, 1), name="grid")
        save_grid(generate_plan(plan, settings.model, Path(folder) / "grid", whole, accelerator), settings.grid)
    return None


def save_grid(dataset: PatchDataset, path: str | Path) -> None:
    """Write a picture: a line of 16 patches for each of the plan's first 24 rows, or 24 lines of its only one."""
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
    with output_lock(out, accelerator):
        return _generate(plan, model, out, settings, accelerator)


def _generate(
    plan: pd.DataFrame | str | Path, model: MediPipeline | str | Path, out: str | Path, settings: GenerateSettings,
    accelerator: Accelerator,
) -> PatchDataset:  # fmt: skip
    with agreed(accelerator) as told:
        pipeline = model if isinstance(model, MediPipeline) else MediPipeline.from_pretrained(model)
        load_adapters(pipeline, settings, loaded=isinstance(model, MediPipeline))
        pipeline.to(accelerator.device)
        maker = Maker(pipeline, settings)
        checked = read_plan(plan) if isinstance(plan, (str, Path)) else plan
        checked = check_plan(checked, maker.schema, ignore=settings.ignore)
        maker.check_wanted(checked)
        ends = np.cumsum(checked["count"].to_numpy(np.int64))
        if not len(ends) or not ends[-1]:
            raise UserError("The plan asks for no image: every count is 0.")
        mpp = settings.mpp or float(pipeline.provenance.get("mpp", 0))
        if not mpp > 0:
            raise UserError("The model does not say how many µm a pixel is.", "Set mpp.")
        check_requests(checked, pipeline, settings)
        folder, name = Path(out), settings.name or Path(out).name
        model_hash = pipeline.model_hash
        provenance = describe(checked, maker, model_hash)
        done = finished_as(folder, name, provenance)
        told.reads("model", "" if isinstance(model, MediPipeline) else model, lambda: model_hash)
        told.reads("plan", plan if isinstance(plan, (str, Path)) else "", lambda: provenance["plan"]["sha256"])
        told.does(settings, but=("plan", "model", "adapters", "autoguidance", "classifier"))
        told.does(provenance, but=("model", "plan"))
        told.does({"out": str(out), "mpp": mpp, "finished": done is not None})
    if done is not None:
        return done
    token = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    size = settings.patches_per_shard
    shards = range(-(-int(ends[-1]) // size))
    whole = {number for number, record in finished_shards(folder).items() if record.token == token}
    mine = [n for n in shards if n not in whole and n % accelerator.num_processes == accelerator.process_index]
    positions = {n: range(n * size, min((n + 1) * size, int(ends[-1]))) for n in mine}
    count, start = sum(map(len, positions.values())), time.monotonic()
    first = accelerator.is_main_process
    ticks = iter(progress(range(count), desc="generating", unit="image") if first else range(count))
    if first and count:
        logger.info("%d of %d images here: %s", count, ends[-1], maker.told())
    with listening() as notice:

        def patches(number: int) -> Iterator[Patch]:
            samples = [sample_at(checked, maker.schema, position, ends) for position in positions[number]]
            return observed(patches_of(samples, maker, mpp, model_hash), ticks, notice)

        def write(number: int, its: Iterator[Patch]) -> None:
            write_shard(folder, number, its, settings.codec, token)

        write_behind(((number, patches(number)) for number in mine), write, 2 * settings.device_batch)
    if first and count:
        logger.info("%.3g images/s in each process", count / (time.monotonic() - start))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_dataset(folder, name, maker.schema, pipeline.patch_size, mpp, settings.codec, provenance, shards=shards)
    accelerator.wait_for_everyone()
    return PatchDataset.open(folder)


def finished_as(folder: Path, name: str, provenance: dict[str, Any]) -> PatchDataset | None:
    """The dataset in a folder if it is finished and the one that is to be made there; ``None`` if there is none.

    Raises:
        UserError: The folder holds another dataset.
    """
    if not (folder / INFO_FILE).exists():
        return None
    done = PatchDataset.open(folder)
    if done.info["provenance"] != provenance or done.name != name:
        raise UserError(f"{folder} holds another dataset.", "Choose another folder, or remove this one first.")
    logger.info("%s is finished.", folder)
    return done


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


def patches_of(samples: list[Sample], maker: Maker, mpp: float, model_hash: str) -> Iterator[Patch]:
    """The patches of some samples."""
    fields = maker.schema.fields
    for sample, image in maker.images(samples):
        who = f"synthetic:{model_hash[:12]}:{sample.row}"
        yield Patch(
            key=f"synthetic-{model_hash[:8]}-{sample.row:05d}-{sample.seed:016x}",
            image=image,
            patient=who,
            slide=who,
            x=-1,
            y=-1,
            source_mpp=mpp,
            fields={f.name: sample.fields.get(f.name, UNKNOWN_WORD) for f in fields},
            origin="synthetic",
            extra={"plan_row": sample.row, "sample_seed": sample.seed},
        )


def observed(patches: Iterator[Patch], ticks: Iterator[int], notice: Notice) -> Iterator[Patch]:
    """The same patches, with progress; ended by a notice.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came; the shard that is being written is given up.
    """
    for patch in patches:
        if notice.given:
            raise Preempted(
                f"{notice.given}: the shards that were finished are kept; the same command makes the others."
            )
        next(ticks, None)
        yield patch


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


def describe(plan: pd.DataFrame, maker: Maker, model_hash: str) -> dict[str, Any]:
    """Everything that the images depend on, JSON-able."""
    pipeline, settings = maker.pipeline, maker.settings
    table = plan.drop(columns="verdict").to_csv(index=False, lineterminator="\n")
    stacked = [{"hash": digest, "scale": scale} for digest, scale in pipeline.adapters]
    return {
        "kind": "synthetic",
        "model": model_hash,  # of the model with its adapters
        **({"adapters": stacked} if stacked else {}),
        "autoencoder": pipeline.autoencoder.hash,
        "trained_on": pipeline.provenance.get("name", ""),
        **({"seen": maker.seen} if maker.seen["parts"] else {}),
        "plan": {"sha256": hashlib.sha256(table.encode()).hexdigest(), "rows": plan.to_dict("records")},
        **maker.description(),
        "device_batch": settings.device_batch,
        "patches_per_shard": settings.patches_per_shard,
        "codec": settings.codec,
        "precision": settings.precision,
        "ignored": sorted(settings.ignore),
    }
