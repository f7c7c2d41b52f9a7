"""What the training of a latent classifier reports: log.csv with the accuracy, and evaluation.csv."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latent_medi.core.progress import get_logger
from latent_medi.diffusion.objective import Objective
from latent_medi.latent_classifier.scores import COLUMNS as SCORE_COLUMNS
from latent_medi.latent_classifier.scores import Validation, score, score_text
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.training.data import Batch, TrainingData
from latent_medi.training.updates import Monitor, Run, crossed

logger = get_logger("training")


class ClassifierMonitor(Monitor):
    """The monitor of a classifier's training: its accuracy, and scores on the validation patches by noise level.

    Args:
        run: The run, at its start.
        settings: The classifier's.
        validation: The patches to score.
        field: Name of the field.
        objective: The noise schedule.
    """

    def __init__(
        self,
        run: Run[TrainingData],
        settings: ClassifierSettings,
        validation: Validation,
        field: str,
        objective: Objective,
    ) -> None:
        super().__init__(run, ("loss", "accuracy"))
        self._settings, self._validation, self._field, self._objective = settings, validation, field, objective
        self._scores = self._csv("evaluation.csv", SCORE_COLUMNS)

    @staticmethod
    def average(values: Sequence[float]) -> float:
        """Mean of some numbers, NaN of none; rounded as numpy does, as in every log of earlier versions."""
        return float(np.mean(values)) if values else float("nan")

    def add(self, part: Batch, loss: torch.Tensor, noted: torch.Tensor) -> None:
        """As :meth:`Monitor.add`; ``noted`` is the part's share of the update's accuracy, []."""
        self._parts.append(torch.stack([loss, noted]))

    def before_saving(self, step: int, last: bool) -> None:
        """Score the validation patches, where it is time to."""
        run, settings, batch = self._run, self._settings, self._settings.global_batch
        due = last or crossed((step + 1) * batch, batch, settings.evaluate_every_images)
        if not (due and len(self._validation)):
            return
        if self.waiting:
            self.fetch(step)
        run.network.eval()
        whitening, batch_size = (run.data.shift, run.data.scale), settings.device_batch or 256
        seed, most = settings.seed, settings.validation_patches
        rows = score(run.network, self._validation, whitening, self._objective, run.accelerator, seed, most, batch_size)
        run.network.train()
        if self._scores is not None:
            self._scores.write([((step + 1) * batch, *(row[name] for name in SCORE_COLUMNS[1:])) for row in rows])
            logger.info("%s", score_text(rows, self._field, self._validation))
