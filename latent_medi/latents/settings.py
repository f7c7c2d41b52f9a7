"""Settings of the encoding; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latent_medi.core.errors import UserError
from latent_medi.core.paths import PathText
from latent_medi.core.settings import Settings


@dataclass
class FloorSettings(Settings):
    """The autoencoder's own reconstruction floor: what no model of its latents can surpass.

    Args:
        patches: Patches to reconstruct, drawn over the whole dataset; 0 measures nothing. Decoding them takes about as
            long as encoding twice as many.
        encoder: Encoder of the Fréchet distance: "demo" (packaged), "squeezenet", "inception", "uni", "phikon-v2" or a
            folder. It needs at least two patches per feature; with fewer there is a kernel distance instead.
        weights: The encoder's weights, where they do not come with the package.
        seed: Seed of the sample.
    """

    patches: int = 256
    encoder: PathText = "demo"
    weights: PathText = ""
    seed: int = 0


@dataclass
class EncodeSettings(Settings):
    """How a dataset folder becomes a latent folder.

    Args:
        data: Dataset folder, or the URL of one.
        out: Latent folder to write; a folder that was cut off is continued.
        autoencoder: "demo", "sd-vae-ft-mse", "taesd", a folder with an autoencoder, or a hub id.
        device_batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda"; empty means the launcher's.
        precision: Arithmetic of the autoencoder: "fp32", "bf16" or "fp16".
        workers: Threads that decode images ahead of the autoencoder; 0 decodes in the main one, in between; ``None``
            takes 4, or 0 where the autoencoder runs on the CPU that they would take from it.
        slicing: Patch by patch through the autoencoder, whatever the batch: least memory, slower on a GPU.
        views: 1 encodes each patch as it was cut, 8 under every symmetry of the square (eight times the work and the
            disk); training then draws one per image.
        floor: The reconstruction floor to measure and print.
    """

    data: PathText
    out: PathText
    autoencoder: PathText = "sd-vae-ft-mse"
    device_batch: int = 64
    device: str = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int | None = None
    slicing: bool = False
    views: int = 1
    floor: FloorSettings = field(default_factory=FloorSettings)

    def check(self) -> None:
        """Refuse settings that cannot be followed.

        Raises:
            UserError: Lists every problem.
        """
        problems = []
        if self.views not in (1, 8):
            problems.append(f"views is 1 or 8, not {self.views}")
        if self.device_batch < 1:
            problems.append(f"device_batch must be at least 1, not {self.device_batch}")
        for name, value in (
            ("workers", self.workers or 0),
            ("floor.patches", self.floor.patches),
            ("floor.seed", self.floor.seed),
        ):
            if value < 0:
                problems.append(f"{name} must not be negative, but it is {value}")
        if problems:
            raise UserError("The encoding settings cannot be followed: " + "; ".join(problems) + ".")
