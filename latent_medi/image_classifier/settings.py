"""Settings of an image classifier's training and of its use; imports no torch."""

from __future__ import annotations

import dataclasses  # a setting is named `field`
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from latent_medi.core.errors import UserError
from latent_medi.core.kinds import Range
from latent_medi.core.paths import PathText
from latent_medi.core.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    UnitInterval,
)
from latent_medi.training.settings import EmaSettings, TrainSettings

Share = Annotated[float, Range(0, 1, below=True)]
REAL = "real"
"""Training set of the real patches alone."""


@dataclass
class AugmentSettings(Settings):
    """Changes of the training patches, all by timm. The defaults are those of HistoDiffusion's evaluation.

    Args:
        crop_scale: Smallest and largest share of a patch's area that is cut out and resized, above 0 to 1.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        rand_augment: RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; empty for none.
        color_jitter: Strength of changes of brightness, contrast and saturation; timm applies them only without
            rand_augment.
        erase: Probability of erasing a rectangle (random erasing).
        mixup: Parameter of the beta distribution of mixup's weights; 0 for none.
        cutmix: The same for cutmix. With both, each update takes one of them.
        smoothing: Label smoothing.
        repeats: Times that a patch occurs in succession, each time augmented otherwise (repeated augmentation).
    """

    crop_scale: tuple[UnitInterval, UnitInterval] = (0.08, 1.0)
    hflip: UnitInterval = 0.5
    vflip: UnitInterval = 0.0
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: NonNegativeFloat = 0.0
    erase: UnitInterval = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    smoothing: Share = 0.1
    repeats: PositiveInt = 1

    @property
    def mixes(self) -> bool:
        """Whether patches are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class ImageClassifierSettings(Settings):
    """Training of a classifier of patches' pixels, on real patches and perhaps on synthetic ones.

    Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder (metadata and splits).
        out: Folder of the run: checkpoints, log.csv, evaluation.csv, settings.yaml and, when finished, model and
            scores.json.
        field: The field to classify; empty: the class.
        values: The values to classify; empty: all of the field. Rows with other or unknown values are left out.
        split: Named split of the dataset.
        split_value: Value of the split to train on.
        validation_value: Value of the split, of other patients, by which the best weights are chosen: those with the
            highest balanced accuracy. Empty: the last weights are kept.
        test_value: Value of the split, of other patients again, on which the finished classifier is scored once. Empty:
            no scores.
        only: Values by field, such as {site: [A, B]}: only real patches with one of them take part. Fields that are not
            named keep all.
        synthetic: Folders of synthetic datasets by name, whose patches are added to the training patches.
        percent: Synthetic patches of each class, from each folder, as a percentage of the real training patches of that
            class. Where a folder has too few, all are taken, and the log says so.
        selection: Name of a selection of the synthetic datasets; empty: patches are drawn from all.
        choice: With a selection: "selected" takes its patches, best first; "random" as many of its control.
        network: Name of a network in timm, such as vit_small_patch16_224 or resnet50.
        image_size: Edge of the network's input in pixels; patches are resized to it.
        drop_path: Share of residual branches dropped while training.
        dropout: Share of the last features dropped while training.
        weights: File or folder with weights to start from, all but the last layer; "pretrained": timm's own, from the
            hub; empty: random.
        augment: Changes of the training patches.
        balance: Draw every class equally often (with replacement) instead of each patch once per epoch.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; limits memory. Batch normalisation is over these
            images. Unset: no limit.
        seed: Seed of initial weights, order, augmentation and the draw of synthetic patches.
        precision: Arithmetic inside the network: "fp32", "bf16" or "fp16".
        lr: Highest learning rate.
        betas: AdamW's two betas.
        weight_decay: AdamW's weight decay; not of biases, normalisations and position embeddings.
        warmup_images: Images over which the learning rate rises linearly from 0; 0 means warmup_fraction of the run.
        warmup_fraction: Share of the run, 0 to 1, used if warmup_images is 0.
        schedule: "cosine" falls to 0 at the end of the run; "constant" stays.
        grad_clip: Largest gradient norm; 0 does not clip.
        ema: A running average of the weights, which is then validated and kept. Unset: none.
        channels_last: Memory layout of the network; faster for convolutions on GPUs.
        workers: Helper processes per process that read and augment patches; 0: none; unset: none on a CPU, else one
            less than there are cores for each process, at most 16.
        evaluate_every_images: Images between scores on the validation patches; 0 scores once at the end.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv.
    """

    COMMON: ClassVar = "data out field network weights synthetic percent selection max_images precision"
    EXAMPLES: ClassVar = (
        "latent-medi image-classifier data=my/data network=resnet50 weights=pretrained max_images=90_000 out=resnet",
        "latent-medi image-classifier --config histodiffusion/vit data=my/data synthetic.s=samples out=vit",
    )

    data: PathText
    out: PathText
    field: str = ""
    values: list[str] = dataclasses.field(default_factory=list)
    split: str = "main"
    split_value: str = "train"
    validation_value: str = "val"
    test_value: str = "test"
    only: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    synthetic: dict[str, PathText] = dataclasses.field(default_factory=dict)
    percent: NonNegativeFloat = 100.0
    selection: str = ""
    choice: Literal["selected", "random"] = "selected"
    network: str = "vit_small_patch16_224"
    image_size: PositiveInt = 224
    drop_path: Share = 0.0
    dropout: Share = 0.0
    weights: PathText = ""
    augment: AugmentSettings = dataclasses.field(default_factory=AugmentSettings)
    balance: bool = False
    max_images: NonNegativeInt = 0
    max_steps: NonNegativeInt = 0
    global_batch: PositiveInt = 256
    device_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: PositiveFloat = 2.5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05
    warmup_images: NonNegativeInt = 0
    warmup_fraction: UnitInterval = 0.02
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: NonNegativeFloat = 1.0
    ema: EmaSettings | None = None
    channels_last: bool = False
    workers: NonNegativeInt | None = None
    evaluate_every_images: NonNegativeInt = 10_000
    checkpoint_every_images: NonNegativeInt = 100_000
    keep_checkpoints: PositiveInt = 2
    log_every_images: PositiveInt = 3_200

    def training(self) -> TrainSettings:
        """The settings that this training shares with a model's: length, batches, optimizer and so on."""
        names = {field.name for field in dataclasses.fields(TrainSettings)} - {"ema", "balance", "dropout"}
        common = {name: value for name, value in vars(self).items() if name in names}
        return TrainSettings(**common, ema=self.ema or EmaSettings(), latents="none")

    def check(self) -> None:
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Lists the problems.
        """
        self.training().check()
        problems = []
        if len(set(self.values)) < len(self.values):
            problems.append(f"values repeats one: {', '.join(self.values)}")
        if not self.split:
            problems.append("split is empty, but a classifier is trained on some patients and scored on others")
        parts = {"split_value": self.split_value, "validation_value": self.validation_value}
        parts["test_value"] = self.test_value
        given = [value for value in parts.values() if value]
        if len(set(given)) < len(given):
            named = ", ".join(f"{name} is {value!r}" for name, value in parts.items())
            problems.append(
                f"{named}, but the best weights are chosen and scored on other patients than those of the training"
            )
        if self.augment.mixes and self.global_batch % 2:
            problems.append(f"mixup and cutmix need an even global_batch, not {self.global_batch}")
        low, high = self.augment.crop_scale
        if not 0 < low <= high:
            problems.append(f"augment.crop_scale is {low} to {high}; it rises, from above 0")
        if self.selection and not self.synthetic:
            problems.append("selection needs synthetic, which is empty")
        if problems:
            raise UserError("The image classifier's settings contradict each other: " + "; ".join(problems) + ".")


@dataclass
class CompareClassifiersSettings(ImageClassifierSettings):
    """The same image classifier trained on real patches alone and on real and synthetic ones, in growing shares.

    Every training has the same length, start and augmentation. Settings of a single training are those of
    `latent-medi image-classifier`; the comparison sets its ``percent``, ``choice`` and ``seed``.

    Args:
        percents: Synthetic patches per 100 real ones of the same class.
        choices: Which synthetic patches: "selected", the best of the selection; "random", as many of its control.
        seeds: Trainings of each kind, with seeds from ``seed`` on: of initial weights, order, augmentation and the
            random choice.
    """

    COMMON: ClassVar = "data out synthetic percents choices seeds selection network weights max_images"
    EXAMPLES: ClassVar = (
        "latent-medi compare-classifiers data=my/data synthetic.s=my/samples max_images=90_000 out=my/compared",
        "latent-medi compare-classifiers --config histodiffusion/vit data=my/data synthetic.s=my/samples out=compared",
    )

    percents: list[NonNegativeFloat] = dataclasses.field(default_factory=lambda: [50.0, 100.0, 300.0])
    choices: list[Literal["selected", "random"]] = dataclasses.field(default_factory=lambda: ["random", "selected"])
    seeds: PositiveInt = 3

    def check(self) -> None:
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Lists the problems.
        """
        super().check()
        problems = []
        if not self.test_value:
            problems.append("test_value is empty, but classifiers are compared on test patches")
        if REAL in self.synthetic:
            problems.append(f"synthetic names {REAL!r}, which stands for real patches alone")
        if self.synthetic and not self.selection and self.choices != ["random"]:
            problems.append("choices has selected, and selection is empty")
        if self.synthetic and not (self.percents and self.choices):
            problems.append("synthetic needs percents and choices")
        if problems:
            raise UserError("The comparison's settings contradict each other: " + "; ".join(problems) + ".")


@dataclass
class ClassifySettings(Settings):
    """Application of an image classifier to patches.

    Args:
        model: Folder of the classifier, out/model of `latent-medi image-classifier`.
        data: Dataset folder, or a folder of images.
        out: Table to write: .csv, .tsv or .parquet.
        split: Named split of the dataset; empty classifies every row.
        split_value: Value of the split to classify.
        only: Values by field: only patches with one of them are classified.
        by: What a row of the table is: "patch"; or "slide" or "patient", with the mean probability over its patches.
        device_batch: Most images per forward pass.
        precision: Arithmetic inside the network: "fp32", "bf16" or "fp16".
    """

    COMMON: ClassVar = "model data out split by"
    EXAMPLES: ClassVar = (
        "latent-medi classify model=my/resnet/model data=my/data split=main out=test.csv",
        "latent-medi classify model=my/resnet/model data=images/ by=slide out=slides.csv",
    )

    model: PathText
    data: PathText
    out: PathText = "predictions.csv"
    split: str = ""
    split_value: str = "test"
    only: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    by: Literal["patch", "slide", "patient"] = "patch"
    device_batch: PositiveInt = 256
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
