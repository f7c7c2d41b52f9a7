"""What a training run writes: the files with weights, whose sizes are known before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from latent_medi.core.tensor_files import tensor_file_bytes
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.training.settings import TrainSettings

_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
_SEAL = {"sha256": "0" * 64}


@dataclass(frozen=True)
class RunFiles:
    """Bytes of the files with weights in a finished run's folder; its JSON and CSV files are small next to them.

    Args:
        checkpoints: Of the checkpoints that are kept. While one is written there is one more.
        averages: Of the kept averages in ``out/averages``.
        model: Of the model folder, with the autoencoder if it is stored there.
    """

    checkpoints: int
    averages: int
    model: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.checkpoints + self.averages + self.model


def run_files(settings: TrainSettings, denoiser: Denoiser, autoencoder: nn.Module | None = None) -> RunFiles:
    """What a run of a whole model leaves on the disk, with the optimizer "adamw".

    Args:
        settings: The run.
        denoiser: Its network, on any device, such as torch's "meta".
        autoencoder: The autoencoder whose weights the model folder will hold; ``None`` if it only names it.
    """
    weights = [(name, _KINDS[tensor.dtype], tensor.shape) for name, tensor in denoiser.state_dict().items()]
    moments = [
        (f"{name}/{entry}", "F32", shape)
        for name, parameter in denoiser.named_parameters()
        for entry, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape))
    ]
    widths = len(settings.ema.widths())
    checkpoint = (1 + widths) * tensor_file_bytes(weights) + tensor_file_bytes(moments)
    every, total = settings.checkpoint_every_images, settings.total_images
    written = len(_crossings(every, total, settings.global_batch))
    ema, snapshots = settings.ema, 0
    if ema.also or ema.snapshot_every_images:
        snapshots = len(_crossings(ema.snapshot_every_images, total, settings.global_batch))
    parts = [part for part in (denoiser.unet, denoiser.conditioner) if part is not None]
    model = sum(_saved(part) for part in parts) + (_saved(autoencoder) if autoencoder is not None else 0)
    return RunFiles(
        min(written, settings.keep_checkpoints) * checkpoint,
        snapshots * widths * tensor_file_bytes(weights, _SEAL),
        model,
    )


def _crossings(every: int, total: int, batch: int) -> set[int]:
    """Images seen at each update that passes a multiple of ``every`` images, and at the end."""
    passed: Iterable[int] = range(every, total + 1, every) if every else ()
    return {-(-images // batch) * batch for images in passed} | {total}


def _saved(module: nn.Module) -> int:
    """Bytes of a module as diffusers writes it."""
    tensors = [(name, _KINDS[tensor.dtype], tensor.shape) for name, tensor in module.state_dict().items()]
    return tensor_file_bytes(tensors, {"format": "pt"})
