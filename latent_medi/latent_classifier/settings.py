"""Settings of the latent classifier's training; imports no torch."""

from __future__ import annotations

import dataclasses  # a setting is named `field`
from dataclasses import dataclass
from typing import Literal

from latent_medi.core.errors import UserError
from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings
from latent_medi.diffusion.settings import ModelSettings, ObjectiveSettings
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.training.settings import StreamSettings, TrainSettings


@dataclass
class ClassifierSettings(Settings):
    """How a classifier of noisy latents is trained, which guides a model to a class that the model does not know.
    Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder (metadata and splits), or the URL of one.
        out: Folder of the run: checkpoints, log.csv, evaluation.csv, settings.yaml and, when finished, classifier.
        model: Folder of the model to guide, whose noise schedule and whitening of latents are then used, so that the
            two fit. Empty: objective, and the whitening measured over the training rows.
        field: The field to tell values of apart; empty: the class.
        values: The values; empty: all of the field. Rows with another value, or an unknown one, are left out.
        latents: Latent folder encoded from the data; empty encodes the patches while training, which needs
            autoencoder.
        autoencoder: Name or folder of the autoencoder to encode with.
        resident: Where latents are held: "device", "ram", "mmap" or "auto", as in `train`.
        stream: Without latents: how patches are encoded while training.
        split: Named split of the dataset; empty trains on every row, and evaluates on none.
        split_value: The part of the split to train on.
        validation_value: The part, of other patients, that scores by noise level are measured on; nothing is chosen by
            them. Empty: none are measured.
        validation_patches: Most patches to measure on, drawn once; 0 for all.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; caps memory and leaves the update the same. Unset:
            no cap.
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
            field itself, so that no value is favoured where noise hides which one it is; an empty list visits each
            patch once per epoch.
        balance_temperature: 0 keeps the data's frequencies, 1 draws every combination equally often.
        network: The network.
        objective: Without model: the noise schedule; prediction and weighting do not matter here.
        evaluate_every_images: Images between measurements; 0 for one at the end only.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv.
    """

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
    validation_value: str = "test"
    validation_patches: int = 4096
    max_images: int = 0
    max_steps: int = 0
    global_batch: int = 32
    device_batch: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    warmup_images: int = 0
    warmup_fraction: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float = 1.0
    balance: list[str] | None = None
    balance_temperature: float = 1.0
    network: EncoderSettings = dataclasses.field(default_factory=EncoderSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    evaluate_every_images: int = 0
    checkpoint_every_images: int = 100_000
    keep_checkpoints: int = 2
    log_every_images: int = 3_200

    def training(self) -> TrainSettings:
        """What this run has in common with a model's: length, batches, optimizer and so on."""
        names = (
            "data", "out", "latents", "autoencoder", "resident", "stream", "split", "split_value", "max_images",
            "max_steps", "global_batch", "device_batch", "seed", "precision", "lr", "betas", "weight_decay",
            "warmup_images", "warmup_fraction", "schedule", "grad_clip", "balance_temperature", "objective",
            "checkpoint_every_images", "keep_checkpoints", "log_every_images",
        )  # fmt: skip
        common = {name: getattr(self, name) for name in names}
        return TrainSettings(**common, balance=self.balance or [], model=ModelSettings(fields=[]))

    def check(self) -> None:
        """Refuse settings that no run can follow.

        Raises:
            UserError: Lists the problems.
        """
        self.training().check()
        problems = [
            f"{name} must not be negative, but it is {getattr(self, name)}"
            for name in ("evaluate_every_images", "validation_patches")
            if getattr(self, name) < 0
        ]
        if len(set(self.values)) < len(self.values):
            problems.append(f"values repeats one: {', '.join(self.values)}")
        if self.split and self.validation_value == self.split_value:
            problems.append(
                f"split_value and validation_value are both {self.split_value!r}: "
                "scores on training patches say nothing"
            )
        if problems:
            raise UserError("The classifier's settings cannot be followed: " + "; ".join(problems) + ".")
