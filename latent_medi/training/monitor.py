"""What a denoiser's training reports in addition to its log: losses by group, previews and trackers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from latent_medi.core.progress import get_logger
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import Objective
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text
from latent_medi.training import losses, preview, run_folder
from latent_medi.training.data import Batch, TrainingData
from latent_medi.training.log import read_log, start_trackers
from latent_medi.training.prolonged import LENGTH
from latent_medi.training.updates import Monitor, Run, crossed

logger = get_logger("training")

BEST = "best"
"""Folder in the run's that holds the model of the best preview."""

Write = Callable[[Path, int, Mapping[str, Any]], None]
"""Writes the model as it is into a folder; given that, the images seen, and facts for its provenance."""


class DenoiserMonitor(Monitor):
    """The monitor of a denoiser's training: losses by noise level and field, previews and trackers as well.

    Args:
        run: The run, at its start.
        averaged: The average of the denoiser, from which previews are sampled.
        autoencoder: Decodes the previews.
        objective: The run's.
        write: Writes the model of the best preview.
    """

    def __init__(
        self, run: Run[TrainingData], averaged: Denoiser, autoencoder: Autoencoder, objective: Objective, write: Write
    ) -> None:
        super().__init__(run)
        self._write = write
        settings, data, accelerator = run.settings, run.data, run.accelerator
        self._averaged = averaged
        self._table = losses.LossTable(data.schema, objective.timesteps, run.device)
        self._table.load(run.state.get("losses", []))
        self._losses = self._csv("losses.csv", losses.COLUMNS)
        self._previews = self._preview_log = None
        if settings.preview_every_images:
            self._previews = preview.Previews(settings, data, autoencoder, objective.settings, accelerator)
            self._preview_log = self._csv("previews.csv", preview.COLUMNS)
        same = {key: value for key, value in run.record["settings"].items() if f"settings.{key}" not in LENGTH}
        described = [same, str(run.out.resolve()), data.fingerprint()]
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

    def started(self) -> None:
        """Make the preview of the checkpoint that the run continues from, if it was cut off before that."""
        images = int(self._run.state["images"])
        last = images == self._run.settings.total_images
        made = [any(int(row["images"]) == images for row in self._rows())]
        if self._accelerator.num_processes > 1:
            made = broadcast_object_list(made)
        if images and not made[0]:
            self.after_saving(images, last)

    def after_saving(self, images: int, last: bool) -> None:
        """Sample from the averaged model, where the settings ask for a preview; keep the model if it is the best."""
        every = self._run.settings.preview_every_images
        if self._previews is None or not (last or crossed(images, self._run.settings.global_batch, every)):
            return
        row = self._previews.make(images, self._averaged)
        self._accelerator.log(row.numbers, step=images)
        if self._preview_log is None:
            return
        # The row is written last: where it is missing, the preview is made again.
        if row.kid is not None and row.kid < self._best(row):
            facts = {"encoder": row.encoder, "kid": row.kid, "samples": row.n}
            self._write(self._run.out / BEST / run_folder.product(self._run.settings), images, {"preview": facts})
            shown = (f"{images:,}", KID_UNIT, kid_text(row.kid), row.encoder)
            logger.info("The best preview so far, at %s images: %s %s (%s).", *shown)
        self._preview_log.write([row])

    def _rows(self) -> list[dict[str, str]]:
        """The previews of this run; none but in the main process."""
        return [] if self._preview_log is None else read_log(self._preview_log.path)

    def _best(self, like: preview.Measured) -> float:
        """The smallest kernel distance of the previews with an encoder and number of samples; infinity without one."""
        same = [row for row in self._rows() if (row["encoder"], row["n"]) == (like.encoder, str(like.n))]
        return min((value for row in same if (value := float(row["kid"])) == value), default=float("inf"))

    def state(self) -> dict[str, Any]:
        """As :meth:`Monitor.state`."""
        return {**super().state(), "losses": self._table.state()}

    def finish(self) -> None:
        """Wait for the last picture and close the trackers."""
        if self._previews is not None:
            self._previews.finish()
        if self._run.settings.trackers:
            self._accelerator.end_training()
