"""Settings of sampling, its pictures and translation; import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import field as dataclass_field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.kinds import Range
from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings
from latent_medi.diffusion.settings import (
    AutoguidanceSettings,
    ClassifierGuidanceSettings,
    GuidanceSettings,
    SamplerSettings,
)


@dataclass
class GenerateSettings(Settings):
    """How a plan becomes a dataset folder.

    Args:
        plan: The plan, .csv or .parquet.
        model: Model folder.
        out: Dataset folder to write.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        sampler: The sampler and its steps.
        guidance: Guidance scales per field.
        autoguidance: Guidance by a weaker version of the model.
        classifier: Guidance by a classifier of noisy latents.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes. It is halved, with a warning, when the device's memory is full.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact), "jpg" or "webp"; that of the real patches, where both are compared.
        precision: Arithmetic inside the denoiser: "fp32", "bf16" or "fp16".
        ignore: Columns of the plan that the model does not know and that are left out knowingly, such as the site for
            a class-only model.
        name: The dataset's name; empty means the folder's name.
        mpp: µm per pixel of the patches; 0 means what the model was trained on.
        n: Without a plan: images of the one combination in ``fields``.
        fields: Without a plan: the condition, value by field; on the command line also --class VALUE and so on.
        seed: Without a plan: seed of the images.
        grid: PNG to write, a line of up to 16 patches for each of the plan's first 24 rows. With n, up to 384 patches
            in lines of 16; out may then be left out.
    """

    COMMON: ClassVar = "model plan out n fields seed grid device_batch precision"
    EXAMPLES: ClassVar = (
        "latent-medi sample model=my/run/model plan=plan.csv out=my/samples",
        "latent-medi sample model=my/run/model --class gleason4 --site north --n 16 out=my/samples grid=samples.png",
    )

    plan: PathText = ""
    model: PathText = ""
    out: PathText = ""
    adapters: list[PathText] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    autoguidance: AutoguidanceSettings = field(default_factory=AutoguidanceSettings)
    classifier: ClassifierGuidanceSettings = field(default_factory=ClassifierGuidanceSettings)
    device_batch: PositiveInt = 64
    patches_per_shard: PositiveInt = 512
    codec: Literal["png", "jpg", "webp"] = "png"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ignore: list[str] = field(default_factory=list)
    name: str = ""
    mpp: NonNegativeFloat = 0.0
    n: NonNegativeInt = 0
    fields: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    grid: PathText = ""


@dataclass
class GridSettings(Settings):
    """A picture of generated patches.

    Args:
        model: Model folder.
        out: PNG to write.
        kind: "cells": a cell per pair of values of ``rows`` × ``columns``; "blend": from ``start`` to ``stop`` of a
            field in equal steps; "trajectory": the denoising trajectory of samples.
        n: Patches per cell, or rows of a blend or trajectory; each from its own seed.
        seed: Seed of the first; the same seeds in every cell.
        rows: Field down the side of "cells".
        columns: Field across the top of "cells".
        field: Field that "blend" changes.
        start: Its first value.
        stop: Its last value.
        steps: Columns of "blend" and "trajectory".
        fields: Values of the other fields that the model is conditioned on.
        sampler: The sampler and its steps.
        guidance: Guidance scales per field.
        device_batch: Images per forward pass.
    """

    COMMON: ClassVar = "model out kind rows columns n field start stop steps"
    EXAMPLES: ClassVar = (
        "latent-medi grid model=my/run/model out=grid.png",
        "latent-medi grid model=my/run/model kind=blend start=north stop=south --class gleason4 out=blend.png",
    )

    model: PathText
    out: PathText
    kind: Literal["cells", "blend", "trajectory"] = "cells"
    n: PositiveInt = 1
    seed: int = 0
    rows: str = "class"
    columns: str = "site"
    field: str = "site"
    start: str = ""
    stop: str = ""
    steps: Annotated[int, Range(2)] = 8
    fields: dict[str, str] = dataclass_field(default_factory=dict)
    sampler: SamplerSettings = dataclass_field(default_factory=SamplerSettings)
    guidance: GuidanceSettings = dataclass_field(default_factory=GuidanceSettings)
    device_batch: PositiveInt = 16

    def problems(self) -> list[str]:
        """Settings that contradict each other, in words."""
        found = []
        if self.kind == "cells" and self.rows == self.columns:
            found.append(f"rows and columns are both {self.rows!r}")
        if self.kind == "blend" and not (self.start and self.stop):
            found.append("a blend needs start and stop")
        twice = {"cells": {self.rows, self.columns}, "blend": {self.field}}.get(self.kind, set()) & set(self.fields)
        if twice:
            found.append(f"fields gives {', '.join(sorted(twice))}, which the picture varies")
        return found


@dataclass
class TranslateSettings(Settings):
    """Translate real patches to another hospital, or to another value of any field.

    Args:
        data: Dataset folder with the patches to translate.
        model: Model folder.
        out: Dataset folder to write.
        to: New value by field, as in ``--to site=radboud``; the other fields do not change.
        where: Value, or list of values, by field or column of the index, of the patches to translate. Empty means all.
        split: Named split to choose patches by; empty means every row. A training set for a study may only hold
            translations of its training patients.
        split_value: The part of the split to translate.
        stain_value: The part of the split on whose patches stains are measured, for the stain-mapping baselines.
        limit: Patches to translate at most, patients in turn; 0 means all.
        seed: Seed of the choice of patches under a limit, and of those for measures and figure.
        synthetic: Whether synthetic patches may be translated too.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        strength: Share of the noise schedule that is inverted, above 0 and up to 1: how much may change.
        steps: DDIM steps of the whole schedule, a divisor of the training timesteps; strength × steps of them are
            taken in each direction.
        refinements: Further network evaluations per inversion step, which bring the round trip closer to the input.
        guidance: Guidance of denoising; inversion uses none.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact), "jpg" or "webp"; that of the real patches, where both are compared.
        name: The dataset's name; empty means the folder's name.
        measured: Patches at most whose structure is compared with that of the baselines at the end; 0 for none.
        figure: PNG to write, with a row per patch: original, round trip, no-op, stain mappings, translated.
        figure_rows: Patches in the figure, of different patients as far as possible.
    """

    COMMON: ClassVar = "data model out to where split strength limit figure"
    EXAMPLES: ClassVar = (
        "latent-medi translate data=my/data model=my/run/model --to site=north out=my/translated",
        "latent-medi translate data=my/data model=my/run/model --to site=north limit=100 figure=new.png out=my/some",
    )

    data: PathText = ""
    model: PathText = ""
    out: PathText = ""
    to: dict[str, str | float] = field(default_factory=dict)
    where: dict[str, str | list[str]] = field(default_factory=dict)
    split: str = "main"
    split_value: str = "train"
    stain_value: str = "train"
    limit: NonNegativeInt = 0
    seed: int = 0
    synthetic: bool = False
    adapters: list[PathText] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    strength: float = 1.0
    steps: int = 20
    refinements: NonNegativeInt = 1
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    device_batch: PositiveInt = 64
    patches_per_shard: PositiveInt = 512
    codec: Literal["png", "jpg", "webp"] = "png"
    name: str = ""
    measured: NonNegativeInt = 256
    figure: PathText = ""
    figure_rows: PositiveInt = 8
