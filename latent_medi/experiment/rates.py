"""Images per second of an experiment's stages on this machine, measured in processes of their own.

The runner keeps no memory of a GPU that training needs, and its threads and random numbers stay as they are.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
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
class Placement:
    """How work shares this machine.

    Args:
        at_once: Processes that work at the same time.
        threads: Threads that each computes with.
    """

    at_once: int
    threads: int


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Args:
        images_per_second: Of one process, next to as many others as there will be, by name; without what cannot be
            measured here.
        start: Seconds that a process takes before it works, which each command of an experiment does.
        failed: By name, why the others cannot be measured.
    """

    images_per_second: dict[str, float]
    start: float
    failed: dict[str, str] = field(default_factory=dict)


def measure_rates(trials: Mapping[str, Trial], placements: Mapping[str, Placement]) -> Rates:
    """Measure, in processes of their own: as many at once, with as many threads, as the work itself will have.

    Args:
        trials: What is measured, by name.
        placements: By the same names how the work shares the machine.
    """
    if not trials:
        return Rates({}, 0.0)
    context, parent = multiprocessing.get_context("spawn"), os.getpid()
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    start = 0.0
    with safe_helpers(), ExitStack() as stack:
        most = max(placements[name].at_once for name in trials)
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(most)]
        try:
            start = max(one.result() for one in [pool.submit(call_tied, parent, seconds_to_start) for pool in pools])
            for name, trial in trials.items():
                place = placements[name]
                asked = [
                    pool.submit(call_tied, parent, rate_of, trial, place.threads) for pool in pools[: place.at_once]
                ]
                answers = [one.result() for one in asked]
                if reasons := [reason for _, reason in answers if reason]:
                    failed[name] = reasons[0]
                else:
                    found[name] = sum(rate for rate, _ in answers) / len(answers)
        except BrokenProcessPool:
            why = "the process that measures was killed, perhaps for want of memory"
            failed |= {name: why for name in trials if name not in found and name not in failed}
    return Rates(found, start, failed)


def seconds_to_start() -> float:
    """Seconds since this process began, everything imported that a command of an experiment needs."""
    from latent_medi.sampling import generate
    from latent_medi.training import loop

    del generate, loop
    return time.time() - psutil.Process().create_time()


def rate_of(trial: Trial, threads: int) -> tuple[float, str]:
    """Images per second of a trial, 0 if it cannot be measured; and why it cannot, or ``""``."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return trial.rate(device), ""
    except (UserError, RuntimeError, MemoryError) as error:  # PyTorch's want of memory is a RuntimeError
        return 0.0, next(iter(str(error).splitlines()), "") or type(error).__name__
