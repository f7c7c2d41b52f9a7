"""Settings of a whole experiment and of the demo; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from latent_medi.core.kinds import PartOf
from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.latents.settings import EncodeSettings
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.settings import TrainSettings


@dataclass
class ExperimentSettings(Settings):
    """One whole experiment.

    Args:
        out: Folder of the experiment; everything it writes lies there.
        title: Heading of the report.
        recipe: Recipe that makes the dataset folder; "demo" is procedural tissue.
        source: Folder that the recipe reads.
        data: Dataset folder that is there already, instead of one that the recipe makes.
        latents: Latent folder of that dataset, encoded if it is not there; empty means one inside ``out``.
        split: Named split of the dataset.
        patch_size: Width and height of a patch, pixels.
        seed: Seed of data, training, plan and evaluation.
        autoencoder: Name or folder of the frozen autoencoder.
        encode: Encoding settings, such as precision; ``device_batch`` is 16 here unless it is given.
        encoders: Names or folders of the image encoders that judge; the first gives the headline.
        weights: Weight file or folder by encoder name, for encoders that need one.
        site_field: Field that names the hospital.
        held_out: Combinations without a training patch.
        medi: Training configuration (name or path) of the model that knows class and metadata.
        cls: Training configuration (name or path) of the model that knows the class alone.
        models: Model folder by arm ("medi", "cls") of those that are trained already; the others are trained.
        train: Training settings put over both, such as max_steps.
        plan_fields: Class and categorical fields whose combinations are generated; empty means all.
        seen_per_cell: Patches to generate per combination that training has seen.
        unseen_per_cell: Patches to generate per combination without a training patch.
        draw_from: Whose values of a continuous field, such as age, are drawn for a combination: "cell", its own
            training patients', else its class's; or "all", where they depend on neither.
        generate: Sampler, guidance and batch.
        evaluate: Evaluation settings put over the derived ones, such as repeats.
        parallel: Commands that run side by side in training and sampling; 0 chooses 2 on a machine without a GPU,
            otherwise 1.
        processes: Processes for rendering and importing; 0 means one per core.
        report_cells: Example patches per combination in the report.
        replace: Remove latents, models and samples in ``out`` that were made from other settings, data or split than
            these, instead of stopping.
    """

    out: PathText = "runs/experiment"
    title: str = "latent-medi"
    recipe: str = "demo"
    source: PathText = ""
    data: PathText = ""
    latents: PathText = ""
    split: str = "main"
    patch_size: int = 64
    seed: int = 0
    autoencoder: PathText = "demo"
    encode: Annotated[dict[str, Any], PartOf(EncodeSettings)] = field(default_factory=dict)
    encoders: list[PathText] = field(default_factory=lambda: ["demo"])
    weights: dict[str, PathText] = field(default_factory=dict)
    site_field: str = "site"
    held_out: list[dict[str, str]] = field(default_factory=list)
    medi: PathText = "demo/medi"
    cls: PathText = "demo/cls"
    models: dict[str, PathText] = field(default_factory=dict)
    train: Annotated[dict[str, Any], PartOf(TrainSettings)] = field(default_factory=dict)
    plan_fields: list[str] = field(default_factory=list)
    seen_per_cell: int = 30
    unseen_per_cell: int = 90
    draw_from: Literal["cell", "all"] = "cell"
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    evaluate: Annotated[dict[str, Any], PartOf(EvaluateSettings)] = field(default_factory=dict)
    parallel: int = 0
    processes: int = 0
    report_cells: int = 6
    replace: bool = False


@dataclass
class DemoSettings(Settings):
    """The demo: the whole pipeline on procedural tissue with known truth, about ten minutes on two cores.

    Args:
        out: Folder of the run.
        seed: Seed of data, training, plan and evaluation.
        settings: Packaged configuration or path of the experiment.
        replace: Remove what ``out`` holds of another seed or other settings, instead of stopping.
    """

    out: PathText = "runs/demo"
    seed: int = 0
    settings: PathText = "demo/experiment"
    replace: bool = False
