"""What a run tells: log.csv, losses.csv, previews and trackers; and the stop at a loss that is not finite."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, write_json
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import Objective
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.training import losses, preview, run_folder
from latent_medi.training.data import TrainingData
from latent_medi.training.log import COLUMNS, CsvLog, Measure, mean_measures, start_trackers
from latent_medi.training.settings import TrainSettings


class Watch:
    """A run's measures. Every process must make the same calls; only the main one writes.

    Args:
        settings: The run.
        data: Its rows, whitened.
        autoencoder: For previews.
        objective: The run's.
        accelerator: Its processes and trackers.
        state: Of the checkpoint that it goes on from: images, and what :meth:`state` gave.

    Attributes:
        table: Takes the loss of each sample.
    """

    def __init__(
        self, settings: TrainSettings, data: TrainingData, autoencoder: Autoencoder, objective: Objective,
        accelerator: Accelerator, state: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._settings, self._data, self._accelerator = settings, data, accelerator
        out, self._images, main = Path(settings.out), int(state["images"]), accelerator.is_main_process
        self._window: list[Measure] = [(loss, norm) for loss, norm in state.get("window", [])]  # since the last row
        self._pending: list[torch.Tensor] = []  # still on the device
        self.table = losses.LossTable(data.schema, objective.timesteps, accelerator.device)
        self.table.load(state.get("losses", []))
        self._log = CsvLog(out / "log.csv", COLUMNS, self._images) if main else None
        self._losses = CsvLog(out / "losses.csv", losses.COLUMNS, self._images) if main else None
        self._previews = self._looks = None
        if settings.preview_every_images:
            self._previews = preview.Previews(settings, data, autoencoder, objective.settings, accelerator)
            self._looks = CsvLog(out / "previews.csv", preview.COLUMNS, self._images) if main else None
        described = json.dumps(
            [run_folder.plain(asdict(settings)), str(out.resolve()), data.fingerprint()], sort_keys=True
        )
        identity = hashlib.sha256(described.encode()).hexdigest()
        start_trackers(accelerator, settings.trackers, out, self._images, identity)
        self._time = time.monotonic()

    @property
    def waiting(self) -> int:
        """Updates whose measures were not looked at yet."""
        return len(self._pending)

    def take(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Note an update's loss and gradient norm without fetching them from the device."""
        self._pending.append(torch.stack([loss, norm.to(loss)]))

    def look(self, step: int, denoiser: torch.nn.Module) -> None:
        """Fetch what waits, up to update ``step``.

        Raises:
            UserError: A loss was not finite; see :func:`check_finite`.
        """
        values = self._accelerator.reduce(torch.stack(self._pending), "mean").tolist()
        scaled, main = self._accelerator.scaler is not None, self._accelerator.is_main_process
        check_finite(values, step, self._settings, self._data, scaled, main, denoiser)
        self._window += [(loss, norm if math.isfinite(norm) else None) for loss, norm in values]
        self._pending.clear()
        self.table.fold(self._accelerator)

    def report(self, images: int, rate: float) -> None:
        """Write a row of the log for what was looked at since the last, with the last learning rate."""
        now = time.monotonic()
        loss, norm = mean_measures(self._window)
        row = (loss, rate, norm, round((images - self._images) / (now - self._time), 1))
        self._accelerator.log(dict(zip(COLUMNS[1:], row, strict=True)), step=images)
        if self._log is not None and self._losses is not None:
            self._log.write([(images, *map(repr, row))])
            self._losses.write(self.table.rows(images))
        self._time, self._images = now, images
        self._window.clear()
        self.table.clear()

    def preview(self, images: int, averaged: Denoiser) -> None:
        """Samples of the averaged model, if the settings ask for them."""
        if self._previews is None:
            return
        row = self._previews.make(images, averaged)
        self._accelerator.log(dict(zip(preview.COLUMNS[1:], row[1:], strict=True)), step=images)
        if self._looks is not None:
            self._looks.write([row])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON-able."""
        return {"window": self._window, "losses": self.table.state()}

    def finish(self) -> None:
        """Wait for the last picture and close the trackers."""
        if self._previews is not None:
            self._previews.finish()
        if self._settings.trackers:
            self._accelerator.end_training()


def check_finite(
    values: list[list[float]], step: int, settings: TrainSettings, data: TrainingData, scaled: bool, main: bool,
    denoiser: torch.nn.Module,
) -> None:  # fmt: skip
    """Stop at the first update whose loss or gradient is not finite, naming what was trained on.

    ``out/not_finite`` then holds the update's numbers and keys and the weights as they are now, a few updates later.

    Raises:
        UserError: Names the update and its patches.
    """
    for i, (loss, norm) in enumerate(values):
        # Under fp16 a gradient beyond its range is normal: the scaler skips that update.
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            continue
        bad = step - len(values) + 1 + i
        keys = [str(key) for key in data.keys[data.at(bad, settings.global_batch, settings.seed)]]
        folder = Path(settings.out) / "not_finite"
        if main:
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                told = {"update": bad + 1, "images": bad * settings.global_batch, "keys": keys}
                # JSON has no word for what is not finite.
                numbers = {"losses_and_norms_since_the_last_look": [[repr(x) for x in value] for value in values]}
                write_json(temporary / "update.json", told | numbers | {"settings": run_folder.plain(asdict(settings))})
                weights = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
                save_file(weights, temporary / "model.safetensors")
        raise UserError(
            f"The loss of update {bad + 1} (from {bad * settings.global_batch:,} images on) is {loss}, its gradient "
            f"norm {norm}. Its patches: {', '.join(keys)}. {folder} holds the state.",
            "No checkpoint was written since. Look at the latents of these patches; else lower lr, lengthen the "
            "warm-up, or use bf16 instead of fp16.",
        )
