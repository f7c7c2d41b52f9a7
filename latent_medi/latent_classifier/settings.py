"""Settings of the latent classifier's training; imports no torch."""

from __future__ import annotations

import dataclasses  # a setting is named `field`
from dataclasses import dataclass
from typing import ClassVar, Literal

from latent_medi.core.errors import UserError
from latent_medi.core.paths import PathText
from latent_medi.core.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    UnitInterval,
)
from latent_medi.diffusion.settings import DropoutSettings, ModelSettings, ObjectiveSettings
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.training.settings import StreamSettings, TrainSettings


@dataclass
class ClassifierSettings(Settings):
    """Training of a classifier of noisy latents, which guides a model to values of a field that it need not have.

    Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder (metadata and splits), or the URL of one.
        out: Folder of the run: checkpoints, log.csv, evaluation.csv, settings.yaml and, when finished, classifier.
        model: Folder of the model to guide, whose noise schedule and whitening are used. Empty: objective, and the
            whitening measured over the training rows.
        field: The field to classify; empty: the class.
        values: The values to classify; empty: all of the field. Rows with other or unknown values are left out.
        latents: Latent folder encoded from the data; empty encodes the patches while training, which needs
            autoencoder.
        autoencoder: Name or folder of the autoencoder to encode with.
        resident: Where latents are held: "device", "ram", "mmap" or "auto", as in `train`.
        stream: Without latents: how patches are encoded while training.
        split: Named split of the dataset; empty trains on every row, and evaluates on none.
        split_value: Value of the split to train on.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them take part. Fields that are
            not named keep all.
        validation_value: Value of the split, of other patients, to score on by noise level; nothing is selected by
            these scores. Empty: no scores.
        validation_patches: Most patches to score, drawn once; 0 for all.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; limits memory and does not change the update. Unset:
            no limit.
        seed: Seed of initial weights, order, noise and timesteps.
        precision: Arithmetic inside the network: "fp32", "bf16" or "fp16". Everything else is fp32 always.
        lr: Highest learning rate.
        betas: AdamW's two betas.
        weight_decay: AdamW's weight decay.
        warmup_images: Images over which the learning rate rises linearly from 0; 0 means warmup_fraction of the run.
        warmup_fraction: Share of the run, 0 to 1, used if warmup_images is 0.
        schedule: "cosine" falls to 0 at the end of the run; "constant" stays.
        grad_clip: Largest gradient norm; 0 does not clip.
        balance: Fields whose combinations are balanced by drawing rare ones more often (with replacement); unset: the
            field itself, so that no value is favoured at high noise; an empty list visits each patch once per epoch.
        balance_temperature: 0 keeps the data's frequencies, 1 draws every combination equally often.
        network: The network.
        noise_aware: Train on latents of every noise level, which guidance shows it. False trains on clean latents at
            timestep 0 alone, as HistoDiffusion's released code does: its gradient on noisy latents is then a guess.
        objective: Without model: the noise schedule; prediction and weighting are not used.
        evaluate_every_images: Images between scores; 0 scores once at the end.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv.
    """

    COMMON: ClassVar = "data out model latents field max_images global_batch precision validation_value"
    EXAMPLES: ClassVar = (
        "latent-medi classifier data=my/data latents=my/latents model=my/run/model max_steps=9_000 out=my/guide",
        "latent-medi classifier --config histodiffusion/latent_classifier data=my/data latents=my/latents out=guide",
    )

    data: PathText
    out: PathText
    model: PathText = ""
    field: str = ""
    values: list[str] = dataclasses.field(default_factory=list)
    latents: PathText = ""
    autoencoder: PathText = ""
    resident: Literal["auto", "mmap", "ram", "device"] = "auto"
    stream: StreamSettings = dataclasses.field(default_factory=StreamSettings)
    split: str = "main"
    split_value: str = "train"
    only: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    validation_value: str = "test"
    validation_patches: NonNegativeInt = 4096
    max_images: NonNegativeInt = 0
    max_steps: NonNegativeInt = 0
    global_batch: PositiveInt = 32
    device_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: PositiveFloat = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05
    warmup_images: NonNegativeInt = 0
    warmup_fraction: UnitInterval = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: NonNegativeFloat = 1.0
    balance: list[str] | None = None
    balance_temperature: NonNegativeFloat = 1.0
    network: EncoderSettings = dataclasses.field(default_factory=EncoderSettings)
    noise_aware: bool = True
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    evaluate_every_images: NonNegativeInt = 0
    checkpoint_every_images: NonNegativeInt = 100_000
    keep_checkpoints: PositiveInt = 2
    log_every_images: PositiveInt = 3_200

    def training(self) -> TrainSettings:
        """The settings that this training shares with a model's: length, batches, optimizer and so on."""
        names = {field.name for field in dataclasses.fields(TrainSettings)} - {"model", "balance"}
        common = {name: value for name, value in vars(self).items() if name in names}
        everything = DropoutSettings(keep_all=1.0, all_null=0.0, metadata_null=0.0, independent=0.0)
        return TrainSettings(**common, balance=self.balance or [], model=ModelSettings(fields=[]), dropout=everything)

    def check(self) -> None:
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Lists the problems.
        """
        self.training().check()
        problems = []
        if len(set(self.values)) < len(self.values):
            problems.append(f"values repeats one: {', '.join(self.values)}")
        if self.split and self.validation_value == self.split_value:
            problems.append(
                f"split_value and validation_value are both {self.split_value!r}, but scores need other patients"
            )
        if problems:
            raise UserError("The classifier's settings contradict each other: " + "; ".join(problems) + ".")
