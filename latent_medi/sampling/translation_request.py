"""Which patches are translated to which conditions, checked before the first is translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import make_sampler
from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.sampling.settings import TranslateSettings
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.statistics.subsampling import patients_in_turn

logger = get_logger("sampling")

_SAME_MPP = 0.02
"""Relative difference of resolutions that counts as rounding."""


@dataclass(frozen=True)
class Request:
    """Patches to translate and their conditions.

    Args:
        data: Their dataset.
        rows: Their row numbers, ascending, int64 [N].
        source: Their conditions, N values by field of the model; a field that the dataset lacks is left out.
        target: Conditions to translate them to, likewise.
        unchanged: Selected patches that already have the target's conditions, and are left out.
    """

    data: PatchDataset
    rows: np.ndarray
    source: list[dict[str, Any]]
    target: list[dict[str, Any]]
    unchanged: int


def make_request(settings: TranslateSettings, pipeline: MediPipeline) -> Request:
    """The patches that the settings select, with their conditions before and after.

    Raises:
        UserError: As for :func:`~latent_medi.sampling.translate.translate`.
    """
    if pipeline.conditioning is None:
        raise UserError(
            "The model is unconditional: it has no field to change.",
            "Use a model that was trained with the fields of `to`.",
        )
    known = pipeline.schema
    wanted = wanted_values(known, settings.to)
    data = PatchDataset.open(settings.data)
    Schema.merge(known, data.schema)  # refuses a field of another kind or unit
    if data.patch_size != pipeline.patch_size:
        raise UserError(
            f"{data.folder} has patches of {data.patch_size} px, and the model generates {pipeline.patch_size} px.",
            "Cut or convert the patches to the model's size and resolution.",
        )
    mpp, trained = float(data.info["mpp"]), float(pipeline.provenance.get("mpp", 0))
    if trained > 0 and abs(mpp / trained - 1) > _SAME_MPP:
        raise UserError(
            f"{data.folder} has {mpp} µm per pixel, and the model was trained at {trained}.",
            "Cut the patches at the model's resolution.",
        )
    selection: dict[str, Any] = {**split_filter(settings, settings.split_value), **settings.where}
    rows = data.rows(selection)
    if not len(rows):
        raise UserError(f"{data.folder} has no patch with {', '.join(f'{k}={v}' for k, v in selection.items())}.")
    synthetic = int((data.index["origin"].iloc[rows] == "synthetic").sum())
    if synthetic and not settings.synthetic:
        raise UserError(
            f"{synthetic} of the {len(rows)} selected patches of {data.folder} are synthetic.",
            "Select real ones with where.origin=real, or set synthetic=true.",
        )
    source = fields_of(data.index.iloc[rows], known)
    target = [{**row, **wanted} for row in source]
    before, after = pipeline.conditions(source), pipeline.conditions(target)
    assert before is not None
    assert after is not None
    changed = ((before.codes != after.codes) | (before.values != after.values)).any(dim=1).numpy()
    if not changed.any():
        raise UserError(
            f"All {len(rows)} selected patches already are {_text(settings.to)}.", "Choose others with where.<field>."
        )
    if unchanged := int((~changed).sum()):
        logger.info("%d of %d patches already are %s and are left out.", unchanged, len(rows), _text(settings.to))
    kept = np.flatnonzero(changed)
    if 0 < settings.limit < len(kept):
        kept = kept[some_patches(data.index["patient"].to_numpy(str)[rows[kept]], settings.limit, settings.seed)]
    check_guidance(GuidanceSettings(), pipeline.conditioning, before.rows(kept))
    check_guidance(settings.guidance, pipeline.conditioning, after.rows(kept))
    ddim_sampler(pipeline, settings)
    return Request(data, rows[kept], [source[i] for i in kept], [target[i] for i in kept], unchanged)


def wanted_values(known: Schema, to: Mapping[str, Any]) -> dict[str, str | float]:
    """The values to translate to, in the vocabulary's spelling.

    Raises:
        UserError: A field or value that the model does not know.
    """
    for name in to:
        if name not in known.names:
            raise UserError(f"The model does not know the field {name!r}; {nearest(name, known.names)}.")
    return {name: _value(known, name, value) for name, value in to.items()}


def _value(known: Schema, name: str, value: Any) -> str | float:
    """A value in the vocabulary's spelling. An unknown one is refused with the closest ones."""
    field = known.field(name)
    code = field.code(value)
    return field.value(code) if not field.continuous else value


def _text(values: Mapping[str, Any]) -> str:
    return " × ".join(f"{name} {value}" for name, value in values.items())


def some_patches(patients: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Positions of at most ``most`` patches, patients in turn, ascending."""
    return patients_in_turn(patients, most, np.random.default_rng([seed, 13]))


def split_filter(settings: TranslateSettings, value: str) -> dict[str, str]:
    """Selects a part of the split, as :meth:`PatchDataset.rows` takes it."""
    return {SPLIT_PREFIX + settings.split: value} if settings.split else {}


def ddim_sampler(pipeline: MediPipeline, settings: TranslateSettings) -> Any:
    """The DDIM sampler, which runs in both directions."""
    return make_sampler(pipeline.scheduler.config, SamplerSettings("ddim", settings.steps))


def fields_of(index: pd.DataFrame, schema: Schema) -> list[dict[str, Any]]:
    """Values by field of a schema for rows of an index; a continuous one that is missing is "unknown", a field that the
    index lacks is left out.
    """
    names = [n for n in schema.names if n in index.columns]
    return [
        {str(n): UNKNOWN_WORD if isinstance(v, float) and np.isnan(v) else v for n, v in row.items()}
        for row in index[names].to_dict("records")
    ]
