"""What a denoiser's training reports in addition to its log: losses by group, previews and trackers."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from typing import Any

import torch

from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import Objective
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.training import losses, preview, run_folder
from latent_medi.training.data import Batch
from latent_medi.training.log import start_trackers
from latent_medi.training.updates import Monitor, Run, crossed


class DenoiserMonitor(Monitor):
    """The monitor of a denoiser's training: losses by noise level and field, previews and trackers as well.

    Args:
        run: The run, at its start.
        averaged: The average of the denoiser, from which previews are sampled.
        autoencoder: Decodes the previews.
        objective: The run's.
    """

    def __init__(self, run: Run, averaged: Denoiser, autoencoder: Autoencoder, objective: Objective) -> None:
        super().__init__(run)
        settings, data, accelerator = run.settings, run.data, run.accelerator
        self._averaged = averaged
        self._table = losses.LossTable(data.schema, objective.timesteps, run.device)
        self._table.load(run.state.get("losses", []))
        self._losses = self._csv("losses.csv", losses.COLUMNS)
        self._previews = self._preview_log = None
        if settings.preview_every_images:
            self._previews = preview.Previews(settings, data, autoencoder, objective.settings, accelerator)
            self._preview_log = self._csv("previews.csv", preview.COLUMNS)
        described = [run_folder.plain(asdict(settings)), str(run.out.resolve()), data.fingerprint()]
        identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        start_trackers(accelerator, settings.trackers, run.out, self._images, identity)
        self._time = time.monotonic()

    def add(self, part: Batch, loss: torch.Tensor, noted: torch.Tensor) -> None:
        """As :meth:`Monitor.add`; ``noted`` is the weighted loss of each sample, fp32 [n]."""
        super().add(part, loss, noted)
        self._table.add(noted, part.timesteps, part.conditions)

    def fetch(self, step: int) -> None:
        """As :meth:`Monitor.fetch`."""
        super().fetch(step)
        self._table.fold(self._accelerator)

    def report(self, images: int, rate: float) -> None:
        """As :meth:`Monitor.report`, with rows of losses.csv."""
        super().report(images, rate)
        if self._losses is not None:
            self._losses.write(self._table.rows(images))
        self._table.clear()

    def after_saving(self, images: int, last: bool) -> None:
        """Sample from the averaged model, where the settings ask for a preview."""
        every = self._run.settings.preview_every_images
        if self._previews is None or not (last or crossed(images, self._run.settings.global_batch, every)):
            return
        row = self._previews.make(images, self._averaged)
        self._accelerator.log(dict(zip(preview.COLUMNS[1:], row[1:], strict=True)), step=images)
        if self._preview_log is not None:
            self._preview_log.write([row])

    def state(self) -> dict[str, Any]:
        """As :meth:`Monitor.state`."""
        return {**super().state(), "losses": self._table.state()}

    def finish(self) -> None:
        """Wait for the last picture and close the trackers."""
        if self._previews is not None:
            self._previews.finish()
        if self._run.settings.trackers:
            self._accelerator.end_training()
