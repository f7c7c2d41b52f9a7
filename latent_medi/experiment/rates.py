"""Images per second of an experiment's stages on this machine, measured in a process of its own.

The runner keeps no memory of a GPU that training needs, and its threads and random numbers stay as they are.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import psutil

from latent_medi.core.errors import UserError
from latent_medi.core.processes import call_tied, safe_helpers
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.schema import Schema
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.settings import EstimateSettings


class Trial(Protocol):
    """Work whose rate is measured."""

    def rate(self, device: str) -> float:
        """Images per second of one process on a device."""


@dataclass(frozen=True)
class EncodeTrial:
    """Patches through the autoencoder, read from the dataset if there is one.

    Args:
        settings: The encoding.
        patch_size: Edge of a patch in pixels.
        has_data: Whether the dataset folder exists.
    """

    settings: EncodeSettings
    patch_size: int
    has_data: bool

    def rate(self, device: str) -> float:
        """See :class:`Trial`."""
        from latent_medi.core.timing import seconds_per_item
        from latent_medi.latents.autoencoder import PRECISIONS, load_autoencoder

        settings = self.settings
        autoencoder = load_autoencoder(settings.autoencoder, device, PRECISIONS[settings.precision])
        read = _patches(settings.data if self.has_data else "", self.patch_size)

        def encode(count: int) -> None:
            images = read(count)
            for _ in range(settings.views):
                autoencoder.encode(images)[0].cpu()

        return 1 / seconds_per_item(encode, settings.device_batch)


@dataclass(frozen=True)
class TrainTrial:
    """Updates of a network.

    Args:
        settings: The run, with the processes that share it.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
    """

    settings: EstimateSettings
    shape: tuple[int, int, int]
    schema: Schema | None

    def rate(self, device: str) -> float:
        """See :class:`Trial`."""
        from latent_medi.training.estimate.rate import training_rate

        return training_rate(self.settings, self.shape, self.schema, device)


@dataclass(frozen=True)
class SampleTrial:
    """Evaluations of a network with random weights, and decoding.

    Args:
        network: Training settings that its architecture follows from.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
        settings: The sampling.
        autoencoder: Name or folder of what decodes.
        evaluations: Of the network for one image.
    """

    network: EstimateSettings
    shape: tuple[int, int, int]
    schema: Schema | None
    settings: GenerateSettings
    autoencoder: str
    evaluations: int

    def rate(self, device: str) -> float:
        """See :class:`Trial`."""
        from latent_medi.latents.autoencoder import load_autoencoder
        from latent_medi.sampling.cost import sampling_rate
        from latent_medi.training.estimate.step_cost import build_denoiser

        denoiser = build_denoiser(self.network, self.shape, self.schema).requires_grad_(False).to(device)
        autoencoder = load_autoencoder(self.autoencoder, device)
        return sampling_rate(denoiser, autoencoder, self.shape, self.settings, self.evaluations)


@dataclass(frozen=True)
class EmbedTrial:
    """Patches through an encoder of the evaluation.

    Args:
        encoder: As the settings name it.
        weights: Its weight file or folder, if the settings give one.
        batch: Patches per forward pass.
        data: Dataset folder to read; empty for random pixels.
        patch_size: Edge of a patch in pixels.
    """

    encoder: str
    weights: str
    batch: int
    data: str
    patch_size: int

    def rate(self, device: str) -> float:
        """See :class:`Trial`."""
        from latent_medi.core.timing import seconds_per_item
        from latent_medi.features.encoders import load_encoder

        encoder = load_encoder(self.encoder, self.weights or None, device)
        read = _patches(self.data, self.patch_size)

        def embed(count: int) -> None:
            encoder.features([read(count)])

        return 1 / seconds_per_item(embed, self.batch)


def _patches(data: str, size: int) -> Callable[[int], np.ndarray]:
    """A function that gives a number of patches, uint8 [n, size, size, 3], of a dataset, or of random pixels."""
    if not data:
        pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        return lambda count: pixels.repeat(count, axis=0)
    from latent_medi.shards.dataset import PatchDataset

    dataset = PatchDataset.open(data)
    return lambda count: dataset.read(np.arange(count) % len(dataset))


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Args:
        images_per_second: Of one process, by name; without what cannot be measured here.
        start: Seconds that a process takes before it works, which each command of an experiment does.
        failed: By name, why the others cannot be measured.
    """

    images_per_second: dict[str, float]
    start: float
    failed: dict[str, str] = field(default_factory=dict)


def measure_rates(trials: Mapping[str, Trial], threads: int) -> Rates:
    """Measure, in a process of its own.

    Args:
        trials: What is measured, by name.
        threads: Threads that the process computes with.
    """
    if not trials:
        return Rates({}, 0.0)
    context = multiprocessing.get_context("spawn")
    try:
        with safe_helpers(), ProcessPoolExecutor(1, mp_context=context) as pool:
            asked = pool.submit(call_tied, os.getpid(), rates_of, list(trials.values()), threads)
            start, found, reasons = asked.result()
    except BrokenProcessPool:
        return Rates({}, 0.0, dict.fromkeys(trials, "the process that measures was killed, perhaps for want of memory"))
    return Rates(
        {name: rate for name, rate in zip(trials, found, strict=True) if rate},
        start,
        {name: reason for name, reason in zip(trials, reasons, strict=True) if reason},
    )


def rates_of(trials: Sequence[Trial], threads: int) -> tuple[float, list[float], list[str]]:
    """Seconds since this process began, everything imported; images per second of each trial, 0 for one that cannot be
    measured; and why it cannot, or ``""``."""
    import torch

    from latent_medi.sampling import generate
    from latent_medi.training import loop

    del generate, loop
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time() - psutil.Process().create_time()
    found, reasons = [], []
    for trial in trials:
        rate, reason = 0.0, ""
        try:
            rate = trial.rate(device)
        except (UserError, RuntimeError, MemoryError) as error:  # PyTorch's want of memory is a RuntimeError
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        found.append(rate)
        reasons.append(reason)
    return start, found, reasons
