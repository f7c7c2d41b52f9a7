"""Settings of the encoding; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class EncodeSettings:
    """How a dataset folder becomes a latent folder.

    Args:
        data: Dataset folder.
        out: Latent folder to write; a folder that was cut off is continued.
        autoencoder: "demo", "sd-vae-ft-mse", "taesd", a folder with an autoencoder, or a hub id.
        device_batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda"; empty means the launcher's.
        precision: Arithmetic of the autoencoder: "fp32", "bf16" or "fp16".
        workers: Threads that decode images; 0 decodes in the main one.
    """

    data: str
    out: str
    autoencoder: str = "sd-vae-ft-mse"
    device_batch: int = 64
    device: str = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = 0
