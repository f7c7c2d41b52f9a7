"""Settings of training; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from latent_medi.diffusion.settings import DropoutSettings, ModelSettings, ObjectiveSettings
from latent_medi.errors import UserError


@dataclass
class EmaSettings:
    """The running average of the weights, which is what a finished model holds.

    Args:
        kind: "power": the window is a fixed share of the run so far; "constant": the usual fixed decay with a short
            warm-up.
        relative_width: For "power": standard deviation of the window as a share of the run, above 0 and below 0.28.
        decay: For "constant": decay per update, 0 to 1.
    """

    kind: Literal["power", "constant"] = "power"
    relative_width: float = 0.10
    decay: float = 0.9999


@dataclass
class TrainSettings:
    """How a model is trained. Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder (metadata and splits).
        latents: Latent folder encoded from it.
        out: Folder of the run: checkpoints, log.csv, settings.yaml and, when finished, model.
        split: Named split of the dataset; empty trains on every row.
        split_value: The part of the split to train on.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; caps memory and leaves the update the same. Unset:
            no cap.
        seed: Seed of initial weights, order, noise, timesteps and condition dropout.
        precision: Arithmetic inside the denoiser: "fp32", "bf16" or "fp16". Everything else is fp32 always.
        lr: Highest learning rate.
        betas: AdamW's two betas.
        weight_decay: AdamW's weight decay.
        warmup_images: Images over which the learning rate rises linearly from 0; 0 means warmup_fraction of the run.
        warmup_fraction: Share of the run, 0 to 1, used if warmup_images is 0.
        schedule: "cosine" falls to 0 at the end of the run; "constant" stays.
        grad_clip: Largest gradient norm; 0 does not clip.
        ema: The running average of the weights.
        model: The denoiser. With init_from, only fields, fusion and widths count.
        objective: What is predicted and how it is weighted. With init_from, the source's unless named in override.
        dropout: How often conditions are left out, so that they can be guided later.
        balance: Fields whose combinations are balanced by drawing rare ones more often (with replacement); empty
            visits each patch once per epoch.
        balance_temperature: 0 keeps the data's frequencies, 1 draws every combination equally often.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv.
        init_from: Model folder (ours, or of a diffusers UNet2DModel) to start from; its autoencoder scaling and
            objective are inherited.
        override: With init_from, parts taken from these settings or data instead: any of "prediction", "schedule",
            "weighting", "scaling". The run then no longer starts exactly at the source.
        autoencoder: Where the model's autoencoder is found (name or folder); empty means where the latents' encoder
            was.
        channels_last: Memory layout of the network; faster on GPUs with bf16.
        compile: Compile the network; a slower start and faster steps.
        checkpoint_activations: Recompute residual blocks in the backward pass: about half the memory, about a quarter
            slower.
    """

    data: str
    latents: str
    out: str
    split: str = "main"
    split_value: str = "train"
    max_images: int = 0
    max_steps: int = 0
    global_batch: int = 64
    device_batch: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_images: int = 0
    warmup_fraction: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float = 1.0
    ema: EmaSettings = field(default_factory=EmaSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    dropout: DropoutSettings = field(default_factory=DropoutSettings)
    balance: list[str] = field(default_factory=list)
    balance_temperature: float = 1.0
    checkpoint_every_images: int = 100_000
    keep_checkpoints: int = 2
    log_every_images: int = 3_200
    init_from: str = ""
    override: list[str] = field(default_factory=list)
    autoencoder: str = ""
    channels_last: bool = False
    compile: bool = False
    checkpoint_activations: bool = False

    @property
    def total_images(self) -> int:
        """Length of the run in images, a whole number of global batches."""
        return self.max_steps * self.global_batch or math.ceil(self.max_images / self.global_batch) * self.global_batch

    @property
    def total_warmup_images(self) -> float:
        """Images over which the learning rate rises."""
        return self.warmup_images or self.warmup_fraction * self.total_images

    def check(self) -> None:
        """Refuse settings that no run can follow.

        Raises:
            UserError: Lists every problem.
        """
        problems = []
        if (self.max_images > 0) == (self.max_steps > 0) or min(self.max_images, self.max_steps) < 0:
            problems.append(
                f"give max_images or max_steps, one of them above 0 (they are {self.max_images} and {self.max_steps})"
            )
        for name in ("global_batch", "keep_checkpoints", "log_every_images"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.device_batch is not None and self.device_batch < 1:
            problems.append(f"device_batch must be at least 1 or unset, not {self.device_batch}")
        for name in (
            "seed",
            "warmup_images",
            "checkpoint_every_images",
            "weight_decay",
            "grad_clip",
            "balance_temperature",
        ):
            if not getattr(self, name) >= 0:
                problems.append(f"{name} must not be negative, but it is {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            problems.append(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.warmup_fraction <= 1:
            problems.append(f"warmup_fraction is a share from 0 to 1, not {self.warmup_fraction}")
        if not 0 < self.ema.relative_width < 0.28:
            problems.append(f"ema.relative_width must lie between 0 and 0.28, not {self.ema.relative_width}")
        if not 0 <= self.ema.decay < 1:
            problems.append(f"ema.decay must be at least 0 and below 1, not {self.ema.decay}")
        if self.override and not self.init_from:
            problems.append("override says what not to inherit from init_from, which is empty")
        if unknown := set(self.override) - {"prediction", "schedule", "weighting", "scaling"}:
            problems.append(
                f"override knows prediction, schedule, weighting and scaling, not {', '.join(sorted(unknown))}"
            )
        if problems:
            raise UserError("The training settings cannot be followed: " + "; ".join(problems) + ".")


@dataclass
class EstimateSettings(TrainSettings):
    """A run whose memory and speed are to be told before it starts. Data need not be there; see the other settings in
    `latent-medi train --help`.

    Args:
        data: Dataset folder, whose fields are used if it is there.
        latents: Latent folder, whose shape is used if it is there.
        out: Not used.
        latent_shape: Channels, height and width of a latent where there are none: (4, 32, 32) are Stable Diffusion's of
            256 px.
        stand_in_fields: Fields to be conditioned on where neither data nor model.fields say.
        stand_in_values: Values of each field where there are no data.
        processes: Devices that share the global batch.
        card: GPU to estimate the speed of, such as "rtx4090"; empty: the one here, or the smallest that is large
            enough.
        card_gib: Its memory in GiB; 0: as known.
        card_tflops: Its dense bf16 matrix products in 10^12 operations per second; 0: as known.
        device_share: Share of that which training is expected to reach, above 0 and up to 1.
        measure_steps: On a machine with a GPU, updates that are really made and timed.
    """

    data: str = ""
    latents: str = ""
    out: str = ""
    latent_shape: tuple[int, int, int] = (4, 32, 32)
    stand_in_fields: int = 5
    stand_in_values: int = 64
    processes: int = 1
    card: str = ""
    card_gib: float = 0.0
    card_tflops: float = 0.0
    device_share: float = 0.35
    measure_steps: int = 10

    def check(self) -> None:
        """As for a run, whose length need not be given.

        Raises:
            UserError: Lists every problem.
        """
        length = replace(self, max_steps=self.max_steps or 1) if not self.max_images else self
        super(EstimateSettings, length).check()
        if not 0 < self.device_share <= 1:
            raise UserError(f"device_share must be above 0 and at most 1, not {self.device_share}.")
        if self.measure_steps < 1:
            raise UserError(f"measure_steps must be at least 1, not {self.measure_steps}.")
