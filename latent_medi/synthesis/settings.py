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
