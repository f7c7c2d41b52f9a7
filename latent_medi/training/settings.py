"""Settings of training; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
from latent_medi.diffusion.settings import DropoutSettings, ModelSettings, ObjectiveSettings

Width = Annotated[float, Range(0, 0.28, above=True, below=True)]
"""Relative width of an average; wider profiles do not exist."""

ParameterGroup = Literal["conditioning", "attention", "time", "down", "mid", "up", "new"]


@dataclass
class EmaSettings(Settings):
    """The running average of the weights, which a finished model holds.

    Args:
        kind: "power": the window is a fixed share of the run so far; "constant": the usual fixed decay with a short
            warm-up.
        relative_width: For "power": standard deviation of the window as a share of the run, above 0 and below 0.28.
        decay: For "constant": decay per update, at least 0 and below 1.
        also: For "power": further relative widths to average, 4 bytes per parameter each, so that the length can be
            chosen after training with `latent-medi average`; [0.05] in addition to 0.10 gives 0.045 to 0.065 and 0.08
            to 0.11, with eight snapshots 0.04 to 0.17.
        snapshot_every_images: Images between snapshots of all averages in out/averages; 0 keeps those at the end only.
    """

    kind: Literal["power", "constant"] = "power"
    relative_width: Width = 0.10
    decay: Annotated[float, Range(0, 1, below=True)] = 0.9999
    also: list[Width] = field(default_factory=list)
    snapshot_every_images: NonNegativeInt = 0

    def widths(self) -> list[float]:
        """Every relative width that is averaged, the model's own first."""
        return [self.relative_width, *self.also]


@dataclass
class StreamSettings(Settings):
    """Training from images with the frozen autoencoder in the loop; used only without latents.

    Args:
        views: 1 encodes patches as they were cut, 8 draws one of the symmetries of the square for each.
        statistics_patches: Number of training patches, drawn once, from which shift and scale of the latents are
            measured.
        precision: Arithmetic of the autoencoder: "fp32", "bf16" or "fp16".
        device_batch: Most patches per forward pass of the autoencoder; limits memory.
        workers: Threads per process that read and decode patches ahead; 0 reads in the main thread; ``None`` takes 4,
            or 0 where the autoencoder runs on the CPU.
        slicing: Encode patches one by one: least memory, slower on a GPU.
    """

    views: int = 1
    statistics_patches: PositiveInt = 2048
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device_batch: PositiveInt = 64
    workers: NonNegativeInt | None = None
    slicing: bool = False


PARAMETER_GROUPS: dict[ParameterGroup, str] = {
    "conditioning": "the embeddings of all fields",
    "attention": "self-attention blocks",
    "time": "the timestep embedding and each residual block's projection of it, through which conditions act",
    "down": "input layer and blocks on the way down",
    "mid": "the middle block",
    "up": "blocks on the way up and output layer",
    "new": "only what the source does not have: vectors of new values and fields",
}
"""Groups of parameters that train_parts takes; a parameter may be in several."""

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "time": ("time_emb_proj",),
    "residual": ("conv1", "conv2"),
}
"""Groups of layers that an adapter can change, and the ends of their names in the network."""


@dataclass
class LoraSettings(Settings):
    """A low-rank adapter (LoRA, Hu et al. 2022, arXiv 2106.09685).

    The model is frozen, and an update (alpha / rank)·B·A of the weights of each targeted layer is trained.

    Args:
        rank: Rows of A and columns of B; at least 1.
        alpha: Scale of the update times rank; unset: rank, a scale of 1.
        targets: Layers: any of "attention" (query, key, value and output projections), "time" (projections through
            which timestep and conditions act) and "residual" (convolutions; larger files).
        dropout: Share of the adapter's inputs dropped while training, 0 to 1.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    targets: list[Literal["attention", "time", "residual"]] = field(default_factory=lambda: ["attention", "time"])
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0


@dataclass
class TrainSettings(Settings):
    """How a model is trained. Progress is counted in images seen; the number of processes changes speed only.

    Args:
        data: Dataset folder (metadata and splits), or the URL of one.
        out: Folder of the run: checkpoints, log.csv, settings.yaml and, when finished, model.
        latents: Latent folder encoded from the data; empty encodes the patches while training, which needs
            autoencoder.
        resident: Where latents are held: "device" (all on each GPU), "ram", "mmap" (read from disk), or "auto": the
            first of these of whose free memory they take at most 10 % (device) or 40 % (RAM).
        stream: Without latents: how patches are encoded while training.
        split: Named split of the dataset; empty trains on every row.
        split_value: Value of the split to train on.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them take part. Fields that are
            not named keep all.
        max_images: Length of the run in images seen, rounded up to whole global batches; 0 if max_steps is given. A
            larger one prolongs a run that was made before.
        max_steps: Length of the run in updates; 0 if max_images is given.
        global_batch: Images per update, over all processes.
        device_batch: Most images per forward pass of one process; limits memory and does not change the update. Unset:
            no limit.
        seed: Seed of initial weights, order, noise, timesteps and condition dropout.
        precision: Arithmetic inside the denoiser: "fp32", "bf16" or "fp16". Everything else is fp32 always.
        lr: Highest learning rate.
        betas: AdamW's two betas.
        weight_decay: AdamW's weight decay.
        warmup_images: Images over which the learning rate rises linearly from 0; 0 means warmup_fraction of the run.
        warmup_fraction: Share of the run, 0 to 1, used if warmup_images is 0.
        schedule: "cosine" falls to 0 at the end of the run; "constant" stays; "inverse_sqrt" stays for decay_images and
            then falls with the square root of the images seen, independent of the length of the run.
        decay_images: For "inverse_sqrt": images from which it falls.
        optimizer: "adamw"; or "adamw8bit", which keeps its moments in 8 bits (bitsandbytes).
        grad_clip: Largest gradient norm; 0 does not clip.
        ema: The running average of the weights.
        model: The denoiser. With init_from, only fields, fusion and widths are used.
        objective: The prediction and its weighting. With init_from, the source's unless named in override.
        dropout: How often conditions are dropped, which guidance needs.
        mixture: Shares of the images by name of a joined folder (`shards join`), such as {pannuke: 1, own: 3}; empty:
            as many as each has. Folders that are not named are left out.
        balance: Fields whose combinations are balanced by drawing rare ones more often (with replacement); empty
            visits each patch once per epoch.
        balance_temperature: 0 keeps the data's frequencies, 1 draws every combination equally often.
        checkpoint_every_images: Images between checkpoints; 0 writes one at the end only.
        keep_checkpoints: Newest checkpoints to keep, at least 1.
        log_every_images: Images per row of log.csv and losses.csv.
        trackers: In addition to the CSV files: "tensorboard", "wandb".
        preview_every_images: Images between grids of samples in out/previews, with a light Fréchet distance in
            previews.csv; 0 for none.
        preview_images: Samples of a preview, over all processes.
        preview_steps: Sampler steps of a preview.
        preview_encoder: Encoder, named as in `evaluate`, in whose features the kernel distance (KID) of a preview's
            samples to as many training patches is measured; the model with the smallest is kept in out/best. Choose
            some hundred preview_images. Empty: no such distance.
        preview_weights: Weight file or folder of preview_encoder; empty: the hub's cache.
        init_from: Model folder (ours, or of a diffusers UNet2DModel) or hub id ``owner/name`` to start from; its
            autoencoder scaling and objective are inherited.
        override: With init_from, parts taken from these settings or data instead: any of "prediction", "schedule",
            "weighting", "scaling". The run then no longer starts exactly at the source.
        train_parts: With init_from, the groups of parameters to train; all others stay unchanged bit for bit. Any of
            "conditioning", "attention", "time", "down", "mid", "up" and "new" (only what the source does not have, such
            as the vector of a new hospital, so that all other conditions sample exactly as before). Unset: everything.
        new_fields_lr: With init_from, learning rate of the vectors of fields that the source does not have, over lr.
            They begin at zero and have as far to go as those of a model from scratch, whose values are about 1; an
            update moves a value by about lr.
        lora: With init_from, train a low-rank adapter instead of the model, and save it alone in out/adapter. With
            train_parts=[new] the adapter also holds the vectors of new values. Unset: none.
        autoencoder: Name or folder of the model's autoencoder; empty: the autoencoder that encoded the latents.
        channels_last: Memory layout of the network; faster on GPUs with bf16.
        compile: Compile the network; a slower start and faster steps.
        checkpoint_activations: Recompute residual blocks in the backward pass, which saves about a third of the memory
            of activations for about a fifth more work.
    """

    COMMON: ClassVar = "data out latents max_images global_batch device_batch precision lr only init_from"
    EXAMPLES: ClassVar = (
        "latent-medi train --config demo/medi data=runs/demo/data latents=runs/demo/latents out=runs/demo/medi",
        "latent-medi train --config presets/12gb data=my/data latents=my/latents out=my/run max_images=2_000_000",
    )

    data: PathText
    out: PathText
    latents: PathText = ""
    resident: Literal["auto", "mmap", "ram", "device"] = "auto"
    stream: StreamSettings = field(default_factory=StreamSettings)
    split: str = "main"
    split_value: str = "train"
    only: dict[str, list[str]] = field(default_factory=dict)
    max_images: NonNegativeInt = 0
    max_steps: NonNegativeInt = 0
    global_batch: PositiveInt = 64
    device_batch: PositiveInt | None = None
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    warmup_images: NonNegativeInt = 0
    warmup_fraction: UnitInterval = 0.01
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    decay_images: NonNegativeInt = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    grad_clip: NonNegativeFloat = 1.0
    ema: EmaSettings = field(default_factory=EmaSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    dropout: DropoutSettings = field(default_factory=DropoutSettings)
    mixture: dict[str, NonNegativeFloat] = field(default_factory=dict)
    balance: list[str] = field(default_factory=list)
    balance_temperature: NonNegativeFloat = 1.0
    checkpoint_every_images: NonNegativeInt = 100_000
    keep_checkpoints: PositiveInt = 2
    log_every_images: PositiveInt = 3_200
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    preview_every_images: NonNegativeInt = 0
    preview_images: PositiveInt = 32
    preview_steps: PositiveInt = 12
    preview_encoder: str = ""
    preview_weights: PathText = ""
    init_from: PathText = ""
    override: list[Literal["prediction", "schedule", "weighting", "scaling"]] = field(default_factory=list)
    train_parts: list[ParameterGroup] | None = None
    new_fields_lr: PositiveFloat = 100.0
    lora: LoraSettings | None = None
    autoencoder: PathText = ""
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
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Lists every problem.
        """
        problems = []
        if (self.max_images > 0) == (self.max_steps > 0):
            problems.append(
                f"give max_images or max_steps, one of them above 0 (they are {self.max_images} and {self.max_steps})"
            )
        if not self.latents and not self.autoencoder:
            problems.append("give latents (a folder that `latent-medi encode` wrote), or an autoencoder to stream with")
        if self.stream.views not in (1, 8):
            problems.append(f"stream.views must be 1 or 8, not {self.stream.views}")
        if len({f"{width:.4f}" for width in self.ema.widths()}) < len(self.ema.widths()):
            problems.append(f"ema.also repeats a width: {self.ema.widths()}")
        snapshots = bool(self.ema.also or self.ema.snapshot_every_images)
        if self.ema.kind != "power" and snapshots:
            problems.append("ema.also and ema.snapshot_every_images need ema.kind=power")
        if (self.schedule == "inverse_sqrt") != (self.decay_images > 0):
            problems.append("schedule=inverse_sqrt and decay_images above 0 need each other")
        if self.preview_encoder and not self.preview_every_images:
            problems.append("preview_encoder measures previews, which preview_every_images=0 does not make")
        if self.preview_weights and not self.preview_encoder:
            problems.append("preview_weights needs preview_encoder, which is empty")
        problems += self._fine_tuning_problems(snapshots)
        if problems:
            raise UserError("The training settings contradict each other: " + "; ".join(problems) + ".")

    def _fine_tuning_problems(self, snapshots: bool) -> list[str]:
        """Contradictions in the settings of fine-tuning, as phrases of a message."""
        problems = []
        for name in ("override", "train_parts", "lora"):
            if getattr(self, name) and not self.init_from:
                problems.append(f"{name} needs init_from, which is empty")
        if self.new_fields_lr != TrainSettings.new_fields_lr and not self.init_from:
            problems.append("new_fields_lr needs init_from, which is empty")
        if self.train_parts == [] or (self.lora is not None and not self.lora.targets):
            problems.append("train_parts and lora.targets must not be empty lists")
        kept = sorted(set(self.override) - {"weighting"})
        if self.train_parts == ["new"] and kept:
            problems.append(f"train_parts=[new] keeps what the model knows, so override cannot have {', '.join(kept)}")
        if snapshots and (self.lora is not None or self.train_parts is not None):
            problems.append("ema.also and its snapshots need whole models, without lora and train_parts")
        if self.lora is not None and self.train_parts not in (None, ["new"]):
            problems.append("lora freezes the model, so train_parts must be unset or [new]")
        if self.lora is not None and kept:
            problems.append(f"an adapter uses its model's own {', '.join(kept)}, so override cannot have it")
        return problems


@dataclass
class AverageSettings(Settings):
    """Averaging the weights of a finished run over another length.

    Args:
        run: Folder of a run with ema.also and snapshots.
        width: Relative width of the average, above 0 and below 0.28. One that the kept averages miss by more than 25 %
            is refused.
        images: Images seen at one of the snapshots; 0 for the end.
        out: Model folder to write.
    """

    COMMON: ClassVar = "run width out images"
    EXAMPLES: ClassVar = (
        "latent-medi average my/run width=0.05 out=my/run-0.05",
        "latent-medi average my/run width=0.1 images=500_000 out=my/run-half",
    )

    run: PathText
    width: Width
    out: PathText
    images: NonNegativeInt = 0


@dataclass
class EstimateSettings(TrainSettings):
    """Estimating the memory and speed of a run. Data need not exist; `latent-medi train --help` has the other settings.

    Args:
        data: Dataset folder, whose fields are used if it exists.
        latents: Latent folder, whose shape is used if it exists.
        out: Not used.
        latent_shape: Channels, height and width of a latent if there are no latents: (4, 32, 32) are Stable Diffusion's
            of 256 px.
        stand_in_fields: Number of fields to condition on if there are no data and no model.fields.
        stand_in_values: Values per field if there are no data.
        processes: Devices that share the global batch.
        card: GPU to estimate the speed of, such as "rtx4090"; empty: that of this machine, or the smallest with enough
            memory.
        card_gib: Its memory in GiB; 0: from the table of cards.
        card_tflops: Its dense bf16 matrix products in 10^12 operations per second; 0: from the table of cards.
        device_share: Share of that rate which training is expected to reach, above 0 and up to 1.
        measure_steps: On a machine with a GPU, updates to make and time.
    """

    COMMON: ClassVar = "data latents latent_shape processes card global_batch device_batch max_images"
    EXAMPLES: ClassVar = (
        "latent-medi train --estimate --config presets/12gb data=my/data latents=my/latents out=my/run",
        "latent-medi train --estimate --config presets/24gb card=rtx4090 processes=2",
    )

    data: PathText = ""
    latents: PathText = ""
    out: PathText = ""
    latent_shape: tuple[int, int, int] = (4, 32, 32)
    stand_in_fields: NonNegativeInt = 5
    stand_in_values: NonNegativeInt = 64
    processes: PositiveInt = 1
    card: str = ""
    card_gib: NonNegativeFloat = 0.0
    card_tflops: NonNegativeFloat = 0.0
    device_share: Annotated[float, Range(0, 1, above=True)] = 0.35
    measure_steps: PositiveInt = 10

    def check(self) -> None:
        """Refuse what no run can follow; its length need not be given.

        Raises:
            UserError: Lists every problem.
        """
        known = replace(self, max_steps=self.max_steps or (0 if self.max_images else 1), latents=self.latents or "none")
        super(EstimateSettings, known).check()
