"""Settings of planning and generation; import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings


@dataclass
class PlanSettings:
    """What to generate.

    Args:
        data: Dataset folder whose gaps are to be filled.
        out: The plan's file, .csv or .parquet.
        goal: "fill_unseen" plans combinations without a patch, "balance" tops every combination up to the same number,
            "each" plans all alike.
        per_cell: Patches per combination; for "balance" the number to reach, 0 meaning that of the largest combination.
        fields: Class and categorical fields to combine; empty means all.
        split: Named split that defines what the model has seen; empty means every row.
        split_value: The part of the split.
        thin_patients: Combinations with fewer patients are called thin.
        seed: Seed of the whole plan.
    """

    data: str
    out: str
    goal: Literal["fill_unseen", "balance", "each"] = "fill_unseen"
    per_cell: int = 0
    fields: list[str] = field(default_factory=list)
    split: str = "main"
    split_value: str = "train"
    thin_patients: int = 10
    seed: int = 0


@dataclass
class GenerateSettings:
    """How a plan becomes a dataset folder.

    Args:
        plan: The plan, .csv or .parquet.
        model: Model folder.
        out: Dataset folder to write.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        sampler: The sampler and its steps.
        guidance: Guidance scales per field.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact) or "jpg".
        precision: Arithmetic inside the denoiser: "fp32", "bf16" or "fp16".
        ignore: Columns of the plan that the model does not know and that are left out knowingly, such as the site for
            a class-only model.
        name: The dataset's name; empty means the folder's name.
        mpp: µm per pixel of the patches; 0 means what the model was trained on.
    """

    plan: str = ""
    model: str = ""
    out: str = ""
    adapters: list[str] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    device_batch: int = 64
    patches_per_shard: int = 512
    codec: Literal["png", "jpg"] = "png"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ignore: list[str] = field(default_factory=list)
    name: str = ""
    mpp: float = 0.0


@dataclass
class TranslateSettings:
    """Real patches as another hospital (or another value of any field) would have made them.

    Args:
        data: Dataset folder with the patches to translate.
        model: Model folder.
        out: Dataset folder to write.
        to: New value by field, as in ``--to site=radboud``; the other fields stay what they are.
        where: Value, or list of values, by field or column of the index: which patches. Empty means all.
        split: Named split to choose patches by; empty means every row. A training set for a study may only hold
            translations of its training patients.
        split_value: The part of the split to translate.
        stain_value: The part of the split whose patches say what each site's stain is, for the mappings shown beside.
        limit: Patches to translate at most, patients in equal parts; 0 means all.
        seed: Seed of the choice when there is a limit, and of the choices for measures and figure.
        synthetic: Whether synthetic patches may be translated too.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        strength: Share of the noise schedule to go back, above 0 and up to 1: how much may change.
        steps: DDIM steps of the whole schedule, dividing the training timesteps; strength × steps of them are taken
            back and forth.
        refinements: Further network evaluations per step back, which bring the round trip closer to the input.
        guidance: Guidance on the way forth.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact) or "jpg".
        name: The dataset's name; empty means the folder's name.
        measured: Patches at most whose structure is measured beside the rivals' when all is done; 0 measures nothing.
        figure: PNG to write, with a row per patch: original, round trip, no-op, stain mappings, translated.
        figure_rows: Patches in the figure, of different patients as far as possible.
    """

    data: str = ""
    model: str = ""
    out: str = ""
    to: dict[str, str | float] = field(default_factory=dict)
    where: dict[str, str | float | list[str]] = field(default_factory=dict)
    split: str = "main"
    split_value: str = "train"
    stain_value: str = "train"
    limit: int = 0
    seed: int = 0
    synthetic: bool = False
    adapters: list[str] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    strength: float = 1.0
    steps: int = 20
    refinements: int = 1
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    device_batch: int = 64
    patches_per_shard: int = 512
    codec: Literal["png", "jpg"] = "png"
    name: str = ""
    measured: int = 256
    figure: str = ""
    figure_rows: int = 8
