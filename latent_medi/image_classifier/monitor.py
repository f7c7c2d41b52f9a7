"""What the training of an image classifier reports, and the best weights by the validation patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from latent_medi.core.progress import get_logger
from latent_medi.image_classifier.augment import MixedImages
from latent_medi.image_classifier.data import ImageData, Parts
from latent_medi.image_classifier.scores import logits_of
from latent_medi.image_classifier.settings import ImageClassifierSettings
from latent_medi.statistics.confusion import macro_scores
from latent_medi.statistics.patient_means import PatientTable
from latent_medi.training.updates import Monitor, Run, crossed

logger = get_logger("training")

COLUMNS = ("images", "loss", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "n")


class ImageClassifierMonitor(Monitor):
    """The monitor of an image classifier's training.

    Args:
        run: The run, at its start.
        settings: The training.
        parts: Its data.
        module: The network that is validated: the one in training, or its average.
        best: The best weights so far, of the checkpoint that the run continues from.
    """

    def __init__(
        self,
        run: Run[ImageData],
        settings: ImageClassifierSettings,
        parts: Parts,
        module: nn.Module,
        best: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(run, ("loss", "accuracy"))
        self._settings, self._data, self._module = settings, parts, module
        self.best = dict(best)
        self.facts: dict[str, Any] = dict(run.state.get("best", {}))
        self._scores = self._csv("evaluation.csv", COLUMNS)

    def add(self, part: MixedImages, loss: torch.Tensor, noted: torch.Tensor) -> None:
        """As :meth:`Monitor.add`; ``noted`` is the part's share of the update's accuracy, []."""
        self._parts.append(torch.stack([loss, noted]))

    def before_saving(self, step: int, last: bool) -> None:
        """Score the validation patches, where it is time to, and keep the weights if they are the best."""
        settings, batch = self._settings, self._settings.global_batch
        images = (step + 1) * batch
        due = last or crossed(images, batch, settings.evaluate_every_images)
        if not (due and len(self._data.validation)):
            return
        if self.waiting:
            self.fetch(step)
        found = self.measure()
        if self._scores is None:
            return
        self._scores.write([(images, *(found[name] for name in COLUMNS[1:]))])
        logger.info(
            "%s validation patches at %s images: balanced accuracy %.3f, loss %.3f.",
            f"{found['n']:,}",
            f"{images:,}",
            found["balanced_accuracy"],
            found["loss"],
        )
        # Of two equally accurate ones the more certain, then the earlier.
        rank = (found["balanced_accuracy"], -found["loss"])
        if not self.facts or rank > (self.facts["balanced_accuracy"], -self.facts["loss"]):
            self.facts = {"images": images, "balanced_accuracy": rank[0], "loss": found["loss"]}
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self._module.state_dict().items()}

    def measure(self) -> dict[str, Any]:
        """Scores on the validation patches, by the names of :data:`COLUMNS`; every process must call."""
        settings, validation = self._settings, self._data.validation
        module, classes = self._module, len(self._data.labels)
        training = module.training
        module.eval()
        how = (self._data.data.augmentation.preprocessing, validation.dataset, validation.rows, classes)
        logits = logits_of(module, *how, settings.device_batch or 256, self._accelerator, settings.precision)
        module.train(training)
        truth, codes = validation.labels, np.unique(validation.patients, return_inverse=True)[1].reshape(-1)
        right = (logits.argmax(axis=1) == truth).astype(float)
        table = PatientTable(truth, codes, np.ones(len(truth), bool), classes, int(codes.max()) + 1)
        accuracy, f1, sensitivity, specificity = macro_scores(truth, logits.argmax(axis=1))
        loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(truth)).item()
        values = (loss, accuracy, table.mean(right), f1, sensitivity, specificity, len(truth))
        return dict(zip(COLUMNS[1:], values, strict=True))

    def state(self) -> dict[str, Any]:
        """As :meth:`Monitor.state`, with the scores of the best weights."""
        return {**super().state(), **({"best": self.facts} if self.facts else {})}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """As :meth:`Monitor.tensors`: the best weights."""
        return {"best": self.best} if self.best else {}
