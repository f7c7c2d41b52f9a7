"""Settings of a whole experiment and of the demo; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.core.kinds import PartOf
from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.image_classifier.settings import CompareClassifiersSettings
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.settings import SplitSettings
from latent_medi.planning.settings import PlanSettings
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.selection.settings import SelectSettings
from latent_medi.training.settings import TrainSettings

StageName = Literal[
    "shards",
    "corpus",
    "audit",
    "autoencoder",
    "encode",
    "train",
    "classifier",
    "plan",
    "sample",
    "real_classifier",
    "select",
    "image_classifier",
    "evaluate",
    "report",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""Every kind of stage, in the order in which an experiment runs them."""
OPTIONAL_STAGES = ("corpus", "autoencoder", "classifier", "real_classifier", "select", "image_classifier")
"""Stages that an experiment has only if its settings list them."""


@dataclass
class CorpusSettings(Settings):
    """One source of the unlabelled tissue that a model is pre-trained on.

    Args:
        data: Existing dataset folder.
        recipe: Recipe that makes the dataset folder, in place of ``data``; "demo" is procedural tissue.
        source: Folder that the recipe reads.
        recipe_options: Further options of the recipe by name.
        seed: Seed of the recipe.
        part: Part of the experiment's own split whose patches are taken, such as unlabelled; in place of ``data`` and
            ``recipe``.
        share: Share of the images in training, in any unit; 0 for every source: as many as each has.
    """

    data: PathText = ""
    recipe: str = ""
    source: PathText = ""
    recipe_options: dict[str, str | list[str]] = field(default_factory=dict)
    seed: int = 0
    part: str = ""
    share: NonNegativeFloat = 0.0


@dataclass
class ExperimentModel(Settings):
    """One model of an experiment.

    Args:
        config: Name or path of its training configuration.
        folder: Model folder of a model that is trained already; it is not trained, whatever the other settings say.
        train: Training settings put over the experiment's ``train``.
        init_from: Name of another model of the experiment, which is trained first and whose weights this one starts
            from. A model elsewhere is given as ``train.init_from``.
        data: Dataset folder to train on in place of the experiment's, such as unlabelled tissue; "corpus" is the one
            that the stage "corpus" makes.
        latents: Latent folder of ``data``, encoded if it does not exist; empty means one inside ``out``.
        split: Named split of ``data`` whose part "train" is used; empty means every patch.
        classifier: Name or path of a latent classifier's training configuration. The stage "classifier" trains it on
            the experiment's dataset, and it guides this model's samples.
        classifier_train: Settings put over that configuration, such as max_steps.
        generate: Sampling settings put over the experiment's ``generate``.
        sample: Whether it is sampled and evaluated; false for a model that only others start from.
    """

    RENAMED: ClassVar = {"": "Write models.NAME.folder for a trained model, models.NAME.config for one to train."}

    config: PathText = ""
    folder: PathText = ""
    train: Annotated[dict[str, Any], PartOf(TrainSettings)] = field(default_factory=dict)
    init_from: str = ""
    data: PathText = ""
    latents: PathText = ""
    split: str = ""
    classifier: PathText = ""
    classifier_train: Annotated[dict[str, Any], PartOf(ClassifierSettings)] = field(default_factory=dict)
    generate: Annotated[dict[str, Any], PartOf(GenerateSettings)] = field(default_factory=dict)
    sample: bool = True


def demo_models() -> dict[str, ExperimentModel]:
    """The demo's two models: one knows class and metadata, the other the class alone."""
    return {name: ExperimentModel(config=f"demo/{name}") for name in ("medi", "cls")}


@dataclass
class ExperimentSettings(Settings):
    """One whole experiment: a list of stages over any number of named models.

    Args:
        out: Folder of the experiment, which holds everything that it writes.
        title: Heading of the report.
        stages: Stages to run, in the order shards, corpus, audit, autoencoder, encode, train, classifier, plan, sample,
            real_classifier, select, image_classifier, evaluate, report; each needs the results of some of those before
            it. By default shards, audit, encode, train, plan, sample, evaluate and report.
        models: The models by name. Model NAME is trained in ``out``/NAME, and its samples are the synthetic set NAME.
        recipe: Recipe that makes the dataset folder; "demo" is procedural tissue.
        source: Folder that the recipe reads.
        metadata: Clinical table that the recipe joins, for recipes that take one (``--metadata``).
        codes: Table of site codes that the recipe joins, for recipes that take one (``--codes``).
        recipe_options: Further options of the recipe by name, such as {scheme: external}.
        data: Existing dataset folder, in place of one that the recipe makes.
        latents: Latent folder of that dataset, encoded if it does not exist; empty means one inside ``out``.
        split: Named split of the dataset.
        split_settings: Settings of `latent-medi split`, such as {hold_out_fields: [class, site]}: how that split is
            made where the dataset folder lacks it. One that is there must be the same.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches of the experiment's dataset with one of them
            are encoded, trained on, planned for and evaluated. Fields that are not named keep all.
        corpus: Sources of the unlabelled tissue by name, which the stage "corpus" joins in ``out``/corpus. Patients of
            the experiment's dataset, and whoever has one of their pictures, are left out, but those of ``part``.
        patch_size: Width and height of a patch, pixels.
        seed: Seed of data, training, plan and evaluation.
        autoencoder: Name or folder of the frozen autoencoder.
        autoencoder_train: Settings of the stage "autoencoder", which adapts that autoencoder to the split's part train
            before anything is encoded, such as {train: decoder, max_images: 50000}.
        encode: Encoding settings, such as precision; ``device_batch`` is 16 here unless it is given.
        encoders: Names or folders of the image encoders of selection and evaluation; the first gives the headline, and
            evaluates the autoencoder's reconstructions.
        weights: Weight file or folder by encoder name, for encoders that need one.
        site_field: Field that names the hospital; empty if the data have none.
        held_out: Combinations without a training patch; or the word "split": those that the split holds out, of which
            those that cannot be evaluated are listed.
        train: Training settings put over the configuration of every model, such as max_steps.
        plan_fields: Class and categorical fields whose combinations are generated; empty means all.
        seen_per_cell: Patches to generate per combination that training has seen.
        unseen_per_cell: Patches to generate per combination without a training patch; training sets add half at most.
        plan_unseen: Which combinations without a training patch are generated: "all" of them, or those of "held_out".
        draw_from: Whose values of a continuous field, such as age, are drawn for a combination: "cell", its own
            training patients', else its class's; or "all", where they depend on neither.
        plan: Planning settings put over these, such as {goal: all_sites_of_classes, ratio: 1}; with a goal,
            seen_per_cell, unseen_per_cell and plan_unseen do not count.
        generate: Sampler, guidance and batch.
        select: Selection settings, such as {name: best, share: 0.5}; the evaluation takes the selected patches. With
            {encoder: image_classifier} they are compared in the features of the first classifier that the stage
            "real_classifier" trains.
        select_rounds: Rounds of sampling at most, until as many patches are selected as per_cell or percent of
            ``select`` ask for: each further round generates what is missing, by the share that was accepted so far.
        image_classifier: Name or path of an image classifier's training configuration. The stage "real_classifier"
            trains it on the labelled patches alone, "image_classifier" on these and growing shares of each model's
            samples; ``out``/image_classifiers holds the classifiers and their comparison.
        image_classifier_train: Settings put over that configuration, such as {seeds: 3, percents: [50, 100, 300]}.
        evaluate: Evaluation settings put over the derived ones, such as repeats.
        launch_processes: Processes of encoding, of each model's training and sampling, and of the embedding of
            selection and evaluation, on each node; 0 means one per GPU, and one on a machine without.
        parallel: Models that are trained or sampled at the same time, where each takes one process; 0 chooses 2 on a
            machine without a GPU, otherwise 1. With several processes, one model after the other takes them all.
        processes: Processes for rendering and importing; 0 means one per core.
        dry_run: Print what the experiment will take (images, GB, hours, weights, what is missing), and run nothing.
        card: GPU that dry_run gives the hours of, such as "h100", instead of this machine.
        max_hours: Most hours that may be left when it starts, as far as they are measured; 0 for no limit.
        max_images: Most images that may be generated for a model. Without it a plan of more images than there are
            training patches is refused, if these are more than 10,000.
        report_cells: Example patches per combination in the report.
        replace: Remove latents, models and samples in ``out`` that were made from other settings, data or split than
            these, instead of stopping.
    """

    COMMON: ClassVar = "data out split held_out models autoencoder encoders only stages launch_processes dry_run"
    EXAMPLES: ClassVar = (
        "latent-medi run --config own/experiment data=my/data held_out=split out=my/experiment dry_run=true",
        "latent-medi run --config demo/experiment out=runs/demo train.max_steps=400",
    )

    RENAMED: ClassVar = {"medi": "models.medi.config", "cls": "models.cls.config"}

    out: PathText = "runs/experiment"
    title: str = "latent-medi"
    stages: list[StageName] = field(default_factory=lambda: [s for s in STAGES if s not in OPTIONAL_STAGES])
    models: dict[str, ExperimentModel] = field(default_factory=demo_models)
    recipe: str = "demo"
    source: PathText = ""
    metadata: PathText = ""
    codes: PathText = ""
    recipe_options: dict[str, str | list[str]] = field(default_factory=dict)
    data: PathText = ""
    latents: PathText = ""
    split: str = "main"
    split_settings: Annotated[dict[str, Any], PartOf(SplitSettings)] = field(default_factory=dict)
    only: dict[str, list[str]] = field(default_factory=dict)
    corpus: dict[str, CorpusSettings] = field(default_factory=dict)
    patch_size: PositiveInt = 64
    seed: int = 0
    autoencoder: PathText = "demo"
    autoencoder_train: Annotated[dict[str, Any], PartOf(AutoencoderSettings)] = field(default_factory=dict)
    encode: Annotated[dict[str, Any], PartOf(EncodeSettings)] = field(default_factory=dict)
    encoders: list[PathText] = field(default_factory=lambda: ["demo"])
    weights: dict[str, PathText] = field(default_factory=dict)
    site_field: str = "site"
    held_out: Literal["split"] | list[dict[str, str]] = field(default_factory=list)
    train: Annotated[dict[str, Any], PartOf(TrainSettings)] = field(default_factory=dict)
    plan_fields: list[str] = field(default_factory=list)
    seen_per_cell: NonNegativeInt = 30
    unseen_per_cell: NonNegativeInt = 90
    plan_unseen: Literal["all", "held_out"] = "all"
    draw_from: Literal["cell", "all"] = "cell"
    plan: Annotated[dict[str, Any], PartOf(PlanSettings)] = field(default_factory=dict)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    select: Annotated[dict[str, Any], PartOf(SelectSettings)] = field(default_factory=dict)
    select_rounds: PositiveInt = 1
    image_classifier: PathText = ""
    image_classifier_train: Annotated[dict[str, Any], PartOf(CompareClassifiersSettings)] = field(default_factory=dict)
    evaluate: Annotated[dict[str, Any], PartOf(EvaluateSettings)] = field(default_factory=dict)
    launch_processes: NonNegativeInt = 0
    parallel: NonNegativeInt = 0
    processes: NonNegativeInt = 0
    dry_run: bool = False
    card: str = ""
    max_hours: NonNegativeFloat = 0.0
    max_images: NonNegativeInt = 0
    report_cells: NonNegativeInt = 6
    replace: bool = False


@dataclass
class DemoSettings(Settings):
    """The demo: the whole pipeline on procedural tissue with known truth, 8 to 15 minutes on two cores.

    Args:
        out: Folder of the run.
        seed: Seed of data, training, plan and evaluation.
        settings: Packaged configuration or path of the experiment.
        replace: Remove what ``out`` holds of another seed or other settings, instead of stopping.
    """

    COMMON: ClassVar = "out seed settings replace"
    EXAMPLES: ClassVar = (
        "latent-medi demo",
        "latent-medi demo --out runs/second seed=1",
    )

    out: PathText = "runs/demo"
    seed: int = 0
    settings: PathText = "demo/experiment"
    replace: bool = False
