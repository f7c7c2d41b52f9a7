"""Settings of the shift benchmark; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings


@dataclass
class ShiftSettings(Settings):
    """The accuracy of a classifier, and what each remedy gains, as class and site become associated in training.

    Args:
        data: Dataset folder. It gains a split per level, and loses nothing.
        out: Folder of the benchmark, with one experiment per level.
        latents: Latent folder of the dataset, encoded if it does not exist; empty means one inside ``out``.
        split: Named split whose training part levels draw from; its parts ``probe`` and ``test`` stay.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them take part. Fields that are
            not named keep all.
        levels: Association of class and site, from 0 (targets are as frequent as other combinations) to 1 (they are
            absent).
        held_out: The targets; empty takes rotating ones.
        rotation: Which rotating targets, 0 and up.
        per_site: Classes that each site lacks, of rotating targets.
        class_field: Class column.
        site_field: Site column.
        seed: Seed of the order in which patients are drawn, of training, plan and evaluation.
        experiment: Packaged configuration or path of the experiment that each level runs.
        models: Model folder by name of models that are trained already, without the targets; then the only level is 1.
        mean: Folders of finished benchmarks to average, which differ in their seeds, instead of running one; goes with
            ``out`` alone.
        replace: Remove a level's latents, models and samples that were made from other data or settings than these,
            instead of stopping.
        changes: Settings put over that experiment's, such as ``{train: {max_steps: 400}}``.
    """

    COMMON: ClassVar = "data out latents levels held_out experiment seed"
    EXAMPLES: ClassVar = (
        "latent-medi benchmark-shift data=my/data out=my/shift levels='[0, 0.8, 1]'",
        "latent-medi benchmark-shift --mean my/shift0 my/shift1 my/shift2 out=my/shift",
    )

    data: PathText = ""
    out: PathText = "runs/shift"
    latents: PathText = ""
    split: str = "main"
    only: dict[str, list[str]] = field(default_factory=dict)
    levels: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.8, 1.0])
    held_out: list[dict[str, str]] = field(default_factory=list)
    rotation: int = 0
    per_site: int = 1
    class_field: str = "class"
    site_field: str = "site"
    seed: int = 0
    experiment: PathText = "demo/shift"
    models: dict[str, PathText] = field(default_factory=dict)
    mean: list[PathText] = field(default_factory=list)
    replace: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
