"""Settings of an autoencoder's training; imports no torch."""

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
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.training.settings import EmaSettings, TrainSettings


@dataclass
class NewNetworkSettings(Settings):
    """The network of an autoencoder that begins with random weights.

    Args:
        kind: "AutoencoderKL" (with a posterior, as of Stable Diffusion), "AutoencoderTiny" or "AutoencoderTAEF2" (both
            deterministic, small and fast).
        channels: Channels of each stage, the first at full resolution; each further stage halves the size.
            AutoencoderTiny and AutoencoderTAEF2 have the first number in all stages, TAEF2 always four of them.
        layers: Residual blocks per stage.
        latent_channels: Channels of a latent.
        norm_groups: For AutoencoderKL: groups of its normalisation, a divisor of every entry of channels.
    """

    kind: Literal["AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2"] = "AutoencoderKL"
    channels: list[PositiveInt] = dataclasses.field(default_factory=lambda: [128, 256, 512])
    layers: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_groups: PositiveInt = 32


@dataclass
class PerceptualSettings(Settings):
    """The distance of a reconstruction to its patch in the features of a frozen network.

    Args:
        weight: Of the term; 0 leaves it out.
        network: "squeezenet"; the name of a convolutional network of timm, such as "vgg16": several of its layers, each
            normalised at every position, as in LPIPS without its learned weights. Or any encoder as in `evaluate`: its
            features alone.
        weights: Weight file or folder; empty: those of the package, or the hub's cache.
    """

    weight: NonNegativeFloat = 0.0
    network: str = "squeezenet"
    weights: PathText = ""


@dataclass
class AuxiliarySettings(Settings):
    """A classifier of images, whose cross-entropy on reconstructions of labelled patches is a term of the loss.

    It trains the autoencoder to keep what the classifier needs.

    Args:
        weight: Of the term; 0 leaves it out.
        model: Folder of an image classifier that is trained already, and stays as it is. Empty: it is trained along on
            the labelled patches.
        network: Without model: name of a network of timm. Batch normalisation is replaced by group normalisation, or
            refused.
        field: Without model: the field to classify; empty: the class. Patches without a value take part in the other
            terms only.
        rate: Without model: its learning rate as a multiple of lr.
    """

    weight: NonNegativeFloat = 0.0
    model: PathText = ""
    network: str = "resnet18"
    field: str = ""
    rate: PositiveFloat = 1.0


@dataclass
class AdversarialSettings(Settings):
    """A patch discriminator that is trained along with a hinge loss.

    Args:
        weight: Of the term; 0 leaves it out. It is multiplied by the adaptive weight: the gradient's norm of the
            pixels' terms over that of this one, at the last layer of the decoder, in the update before.
        start_images: Images seen at which it begins.
        channels: Channels of its first layer.
        layers: Layers that halve the size.
        rate: Its learning rate as a multiple of lr.
    """

    weight: NonNegativeFloat = 0.0
    start_images: NonNegativeInt = 0
    channels: PositiveInt = 64
    layers: PositiveInt = 3
    rate: PositiveFloat = 1.0


@dataclass
class AutoencoderSettings(Settings):
    """Training of an autoencoder, from an existing one or from random weights.

    Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder, or the URL of one; patches need no labels without classifier.weight.
        out: Folder of the run: checkpoints, log.csv, evaluation.csv, reconstructions, settings.yaml and, when finished,
            autoencoder.
        init: The autoencoder to start from, as in `encode`; empty: random weights of network.
        network: Without init: the network.
        train: "both": encoder and decoder, so that all patches have to be encoded again; "decoder": the latents stay
            valid.
        split: Named split of the dataset; empty trains on every row.
        split_value: Value of the split to train on.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them take part. Fields that are
            not named keep all.
        crop: Edge in pixels of a square cut at random from each patch; 0 takes whole patches. A multiple of the
            autoencoder's factor.
        symmetries: Whether each patch is shown under a random one of the eight symmetries of the square.
        l1: Weight of the mean absolute error over pixels in [0, 1].
        l2: Weight of the mean squared error.
        kl: Weight of the posterior's divergence from the normal distribution, in nats per value of a pixel; for
            autoencoders that have one and whose encoder is trained. Latent diffusion's 1e-6 is 5e-7 here, since its
            pixels are in [-1, 1].
        perceptual: The perceptual term.
        classifier: The term of a classifier of reconstructions.
        adversarial: The term of a discriminator.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; limits memory and does not change the update. Unset:
            no limit.
        seed: Seed of initial weights, order, crops, symmetries and posterior samples.
        precision: Arithmetic inside the networks: "fp32" or "bf16". Everything else is fp32 always.
        lr: Highest learning rate.
        betas: AdamW's two betas.
        weight_decay: AdamW's weight decay.
        warmup_images: Images over which the learning rate rises linearly from 0; 0 means warmup_fraction of the run.
        warmup_fraction: Share of the run, 0 to 1, used if warmup_images is 0.
        schedule: "cosine" falls to 0 at the end of the run; "constant" stays.
        grad_clip: Largest gradient norm, of the autoencoder, the classifier and the discriminator apart; 0 does not
            clip.
        average_width: Width of the running average of the weights, which the product then holds, relative to the run;
            0: no average.
        measure: Values of the split, and further ones by name in others, whose reconstructions are drawn and measured.
            Nothing is selected by these numbers. Without a split: the training rows.
        others: Dataset folder by name to measure as well: what the training costs on other tissue.
        measure_patches: Most patches of each to measure, drawn once.
        measure_every_images: Images between measurements; 0 measures at the beginning and at the end.
        encoders: Encoders of the distances, as in `evaluate`; the first is also used without colour.
        weights: Weight file or folder by encoder.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv.
    """

    COMMON: ClassVar = "data out init train max_images global_batch device_batch precision lr crop others"
    EXAMPLES: ClassVar = (
        "latent-medi autoencoder data=my/data init=sd-vae-ft-mse train=decoder max_images=50_000 out=my/autoencoder",
        "latent-medi autoencoder data=my/data max_images=1_000_000 out=my/autoencoder",
    )

    data: PathText
    out: PathText
    init: PathText = "sd-vae-ft-mse"
    network: NewNetworkSettings = dataclasses.field(default_factory=NewNetworkSettings)
    train: Literal["both", "decoder"] = "both"
    split: str = "main"
    split_value: str = "train"
    only: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    crop: NonNegativeInt = 0
    symmetries: bool = True
    l1: NonNegativeFloat = 1.0
    l2: NonNegativeFloat = 0.0
    kl: NonNegativeFloat = 1e-6
    perceptual: PerceptualSettings = dataclasses.field(default_factory=PerceptualSettings)
    classifier: AuxiliarySettings = dataclasses.field(default_factory=AuxiliarySettings)
    adversarial: AdversarialSettings = dataclasses.field(default_factory=AdversarialSettings)
    max_images: NonNegativeInt = 0
    max_steps: NonNegativeInt = 0
    global_batch: PositiveInt = 16
    device_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    warmup_images: NonNegativeInt = 0
    warmup_fraction: UnitInterval = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: NonNegativeFloat = 1.0
    average_width: Annotated[float, Range(0, 0.28, below=True)] = 0.0
    measure: list[str] = dataclasses.field(default_factory=lambda: ["train", "test"])
    others: dict[str, PathText] = dataclasses.field(default_factory=dict)
    measure_patches: PositiveInt = 256
    measure_every_images: NonNegativeInt = 0
    encoders: list[str] = dataclasses.field(default_factory=lambda: ["demo"])
    weights: dict[str, PathText] = dataclasses.field(default_factory=dict)
    checkpoint_every_images: NonNegativeInt = 100_000
    keep_checkpoints: PositiveInt = 2
    log_every_images: PositiveInt = 3_200

    def training(self) -> TrainSettings:
        """The settings that this training shares with a model's: length, batches, optimizer and so on."""
        names = {field.name for field in dataclasses.fields(TrainSettings)} - {"lora"}
        common = {name: value for name, value in vars(self).items() if name in names}
        average = EmaSettings(relative_width=self.average_width) if self.average_width else EmaSettings()
        name = self.init or self.network.kind
        return TrainSettings(**common, ema=average, model=ModelSettings(fields=[]), autoencoder=name)

    def check(self) -> None:
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Lists the problems.
        """
        self.training().check()
        problems = []
        if not self.init and self.train == "decoder":
            problems.append("train=decoder needs an autoencoder to start from in init, which is empty")
        terms = [self.l1, self.l2, self.perceptual.weight, self.classifier.weight]
        if not any(terms):
            problems.append("no term compares reconstructions with patches: all weights are 0")
        if self.adversarial.weight and not any(terms[:3]):
            problems.append("adversarial.weight is relative to the gradient of l1, l2 or perceptual.weight, all 0")
        if twice := {value for value in self.measure if value in self.others}:
            problems.append(f"measure and others both name {', '.join(sorted(twice))}")
        if problems:
            raise UserError("The autoencoder's settings contradict each other: " + "; ".join(problems) + ".")
