"""Settings of the encoding; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from latent_medi.core.errors import UserError
from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeInt, PositiveInt, Settings


@dataclass
class ReconstructionSettings(Settings):
    """Measurement of the autoencoder's reconstruction error, a lower bound for models of its latents.

    Args:
        patches: Patches to reconstruct, drawn from the whole dataset; 0 measures nothing. Decoding them takes about as
            long as encoding twice as many.
        encoder: Encoder of the Fréchet distance: "demo" (packaged), "squeezenet", "inception", "uni", "phikon-v2" or a
            folder. It needs at least two patches per feature; with fewer only a kernel distance is measured.
        weights: The encoder's weights, if the package does not include them.
        seed: Seed of the sample.
    """

    patches: NonNegativeInt = 256
    encoder: PathText = "demo"
    weights: PathText = ""
    seed: NonNegativeInt = 0


@dataclass
class EncodeSettings(Settings):
    """Encoding of a dataset folder into a latent folder.

    Args:
        data: Dataset folder, or the URL of one.
        out: Latent folder to write; an unfinished folder is continued.
        autoencoder: "demo", "sd-vae-ft-mse", "taesd", a folder with an autoencoder, or a hub id.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them are encoded, and only
            these can be trained on. Fields that are not named keep all.
        device_batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda"; empty means the launcher's.
        precision: Arithmetic of the autoencoder: "fp32", "bf16" or "fp16".
        workers: Threads that decode images ahead of the autoencoder; 0 decodes in the main thread; ``None`` takes 4, or
            0 where the autoencoder runs on the CPU.
        slicing: Encode patches one by one, independent of device_batch: least memory, slower on a GPU.
        views: 1 encodes each patch as it was cut, 8 under every symmetry of the square (eight times the work and the
            disk); training then draws one per image.
        reconstruction_error: The measurement of the reconstruction error.
    """

    COMMON: ClassVar = "data out autoencoder precision device_batch views only"
    EXAMPLES: ClassVar = (
        "latent-medi encode data=my/data autoencoder=sd-vae-ft-mse out=my/latents precision=bf16",
        "latent-medi encode data=runs/demo/data autoencoder=demo out=runs/demo/latents",
    )

    data: PathText
    out: PathText
    autoencoder: PathText = "sd-vae-ft-mse"
    only: dict[str, list[str]] = field(default_factory=dict)
    device_batch: PositiveInt = 64
    device: str = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: NonNegativeInt | None = None
    slicing: bool = False
    views: int = 1
    reconstruction_error: ReconstructionSettings = field(default_factory=ReconstructionSettings)

    RENAMED: ClassVar = {"floor": "reconstruction_error"}

    def check(self) -> None:
        """Refuse a number of views that is not supported.

        Raises:
            UserError: views is neither 1 nor 8.
        """
        if self.views not in (1, 8):
            raise UserError(f"views must be 1 or 8, not {self.views}.")
