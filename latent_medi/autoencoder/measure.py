"""What an autoencoder's training reports: log.csv by term, evaluation.csv, and pictures of reconstructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn

from latent_medi.autoencoder.data import MeasuredPart
from latent_medi.autoencoder.losses import TERMS, TrainedAutoencoder
from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.core.counting import counted
from latent_medi.core.device import exact_fp32
from latent_medi.core.files import atomic_path
from latent_medi.core.progress import get_logger, progress
from latent_medi.features.cache import warn_if_demo_encoder
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.latents.networks import moments_of, pixels_of, to_images
from latent_medi.latents.reconstruction_error import paired_kid, psnr
from latent_medi.statistics.distances import frechet_distance, full_rank, pca_basis, pca_dims
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text
from latent_medi.training.log import read_log
from latent_medi.training.preview_distance import gathered
from latent_medi.training.updates import Monitor, Run, crossed

logger = get_logger("training")

COLUMNS = ("images", "part", "encoder", "kid", "fd", "fd_dims", "psnr", "l1", "n")
FOLDER = "reconstructions"
_SHOWN = 8
_BATCH = 32


@torch.no_grad()
@exact_fp32()
def reconstructed(model: nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Reconstructions of images uint8 [n, H, W, 3] from the means of their posteriors, of the same type and shape.

    Args:
        model: A network of a supported kind, on the device, in fp32.
        images: The images.
        device: The device.
    """
    training, parts = model.training, []
    model.eval()
    for start in progress(range(0, len(images), _BATCH), len(images), "reconstructions", "patches", _BATCH):
        x = torch.from_numpy(np.array(images[start : start + _BATCH])).to(device).permute(0, 3, 1, 2).float() / 255
        parts.append(to_images(pixels_of(model, moments_of(model, x)[0])))
    model.train(training)
    return np.concatenate(parts) if parts else images


@dataclass(frozen=True)
class Measured:
    """How far the reconstructions of some patches are from them, in one feature space.

    Args:
        encoder: Name of the encoder; empty without one.
        kid: Kernel distance of features, pairs of a patch and its own reconstruction left out; ``None`` without one.
        fd: Fréchet distance, after a projection on the patches' first principal directions where they are few;
            ``None`` without an encoder.
        fd_dims: Dimensions of the Fréchet distance.
        psnr: Mean peak signal-to-noise ratio in dB.
        l1: Mean absolute error of pixels in [0, 1].
        n: Patches.
    """

    encoder: str
    kid: float | None
    fd: float | None
    fd_dims: int
    psnr: float
    l1: float
    n: int

    def row(self, images: int, part: str) -> tuple[Any, ...]:
        """A row of evaluation.csv, in the order of :data:`COLUMNS`."""
        kid, fd = ("" if value is None else repr(value) for value in (self.kid, self.fd))
        return (images, part, self.encoder, kid, fd, self.fd_dims, repr(self.psnr), repr(self.l1), self.n)

    def text(self) -> str:
        """In words."""
        seen = f"{self.psnr:.2f} dB"
        seen += "" if self.kid is None else f", {KID_UNIT} {kid_text(self.kid)} ({self.encoder})"
        return f"{seen}, {counted(self.n, 'patch')}"


def distances(real: np.ndarray, made: np.ndarray) -> tuple[float, float, int]:
    """Kernel distance, Fréchet distance and its dimensions, of features [n, d] whose rows belong together, n ≥ 2."""
    n, dims = real.shape
    kid, a, b = paired_kid(real, made), real, made
    if not full_rank(n, dims):
        dims = pca_dims(n, dims)
        basis = pca_basis(real)
        a, b = basis.project(real, dims), basis.project(made, dims)
    return kid, frechet_distance(a, b), dims


class Reconstructions:
    """Fixed patches whose reconstructions are measured and drawn; every process takes an equal share.

    Args:
        settings: The run.
        parts: The patches.
        start: The autoencoder that the run starts from, on the CPU.
        accelerator: The processes.
    """

    def __init__(
        self, settings: AutoencoderSettings, parts: Sequence[MeasuredPart], start: nn.Module, accelerator: Accelerator
    ) -> None:
        self._accelerator, self._device = accelerator, accelerator.device
        self.parts, self.out = list(parts), Path(settings.out)
        self._encoders: list[ImageEncoder] = []
        if parts:
            self._encoders = [load_encoder(name, settings.weights.get(name) or None) for name in settings.encoders]
            self._encoders += [colour_free(encoder) for encoder in self._encoders[:1]]
        for part in parts:
            for encoder in self._encoders[:-1]:
                warn_if_demo_encoder(encoder, part.dataset)
        self._images = [self._share(part) for part in self.parts]
        self._real = [[self._features(encoder, images) for encoder in self._encoders] for images in self._images]
        self._shown = [part.read(slice(0, _SHOWN)) for part in self.parts] if accelerator.is_main_process else []
        start.to(self._device)
        self._before = [reconstructed(start, images, self._device) for images in self._shown]
        start.to("cpu")  # makes room for the training

    def _share(self, part: MeasuredPart) -> np.ndarray:
        """This process's patches of a part; the last ones are repeated so that every process has as many."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        count = math.ceil(len(part.rows) / processes)
        mine = np.minimum(np.arange(count) * processes + rank, len(part.rows) - 1)
        return part.read(mine)

    def _all(self, mine: torch.Tensor, count: int) -> np.ndarray:
        return gathered(self._accelerator, mine)[:count].numpy()

    def _features(self, encoder: ImageEncoder, images: np.ndarray) -> np.ndarray:
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        found = encoder.features(batches, self._device)
        encoder.features([], "cpu")  # makes room for the training
        return found

    def measure(self, model: nn.Module) -> list[tuple[str, Measured]]:
        """The name of each part with what its reconstructions are worth, by encoder; every process must call."""
        rows = []
        for part, images, real in zip(self.parts, self._images, self._real, strict=True):
            made, n = reconstructed(model, images, self._device), len(part.rows)
            error = np.abs(made.astype(np.float32) - images).mean((1, 2, 3)) / 255
            pixels = self._all(torch.from_numpy(np.stack([psnr(images, made), error], 1)).float(), n)
            ratio, l1 = pixels.astype(np.float64).mean(0).tolist()
            for encoder, before in zip(self._encoders, real, strict=True):
                after = self._features(encoder, made)
                kid, fd, dims = distances(*(self._all(torch.from_numpy(f), n) for f in (before, after)))
                rows.append((part.name, Measured(encoder.name, kid, fd, dims, ratio, l1, n)))
            if not self._encoders:
                rows.append((part.name, Measured("", None, None, 0, ratio, l1, n)))
        return rows

    def draw(self, model: nn.Module, images: int) -> None:
        """Write a picture per part: patches, their reconstructions at the start, and as they are now."""
        for part, real, before in zip(self.parts, self._shown, self._before, strict=True):
            rows = [real, before, reconstructed(model, real, self._device)]
            edge = real.shape[1]
            grid = np.stack(rows).transpose(0, 2, 1, 3, 4).reshape(3 * edge, -1, 3)
            with atomic_path(self.out / FOLDER / f"{part.name}-images-{images:012d}.png") as path:
                Image.fromarray(grid).save(path, "PNG")


class AutoencoderMonitor(Monitor):
    """The monitor of an autoencoder's training: the terms of the loss, and measurements of reconstructions.

    Args:
        run: The run, at its start.
        settings: The run's.
        network: What is trained.
        averaged: What is measured: the network, or the average of its weights.
        reconstructions: The patches to measure.
    """

    def __init__(
        self,
        run: Run,
        settings: AutoencoderSettings,
        network: TrainedAutoencoder,
        averaged: TrainedAutoencoder,
        reconstructions: Reconstructions,
    ) -> None:
        super().__init__(run, ("loss", *TERMS))
        self._settings, self._network, self._averaged = settings, network, averaged
        self._reconstructions = reconstructions
        self._evaluation = self._csv("evaluation.csv", COLUMNS)

    def add(self, part: Any, loss: torch.Tensor, noted: torch.Tensor) -> None:
        """As :meth:`Monitor.add`; ``noted`` are the terms, each as its share of the update's."""
        self._parts.append(torch.cat([loss[None], noted]))

    def end_update(self, norm: torch.Tensor) -> None:
        """As :meth:`Monitor.end_update`."""
        super().end_update(norm)
        self._network.end_update(self._accelerator)

    def started(self) -> None:
        """Measure the autoencoder that the run starts from, unless that was done."""
        self._network.forget_gradients()
        done = [self._evaluation is not None and bool(read_log(self._evaluation.path))]
        if self._accelerator.num_processes > 1:
            done = broadcast_object_list(done)
        if not done[0] and not int(self._run.state["images"]):
            self._measure(0)

    def before_saving(self, step: int, last: bool) -> None:
        """Measure, where it is time to."""
        batch = self._settings.global_batch
        images = (step + 1) * batch
        if last or crossed(images, batch, self._settings.measure_every_images):
            if self.waiting:
                self.fetch(step)
            self._measure(images)

    def _measure(self, images: int) -> None:
        if not self._reconstructions.parts:
            return
        rows = self._reconstructions.measure(self._averaged.autoencoder)
        if self._evaluation is None:
            return
        self._reconstructions.draw(self._averaged.autoencoder, images)
        self._evaluation.write([found.row(images, part) for part, found in rows])
        for part, found in rows:
            logger.info("%s at %s images: %s", part, f"{images:,}", found.text())


def last_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of the first and the last measurement in evaluation.csv, with numbers as numbers or ``None``."""
    rows = read_log(out / "evaluation.csv")
    kinds = {"part": str, "encoder": str, "images": int, "n": int, "fd_dims": int}
    kept = [row for row in rows if row["images"] in (rows[0]["images"], rows[-1]["images"])]
    return [
        {name: kinds.get(name, float)(value) if value or name == "encoder" else None for name, value in row.items()}
        for row in kept
    ]
