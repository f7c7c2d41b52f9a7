"""The distance of a preview's samples to training patches, in the features of an encoder."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.features.cache import warn_if_demo_encoder
from latent_medi.features.encoders import load_encoder
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.statistics.kernel_distance import kid
from latent_medi.training.settings import TrainSettings

logger = get_logger("training")

_BATCH = 32  # patches that are encoded at once


def gathered(accelerator: Accelerator, mine: torch.Tensor) -> torch.Tensor:
    """Rows of all processes on the CPU, of which each has every ``num_processes``-th, in the order of the whole."""
    everyone = accelerator.gather(mine.to(accelerator.device)).cpu()
    return everyone.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1)


class PatchDistance:
    """Kernel distance (KID) of samples to a fixed set of training patches; every process encodes an equal share.

    Pairs of reference patches of one patient are left out, so the expectation is 0 for samples of the distribution of
    the training patches. Copies of the reference have an even smaller distance: what the samples are worth on other
    patients is for the evaluation to say.

    Args:
        settings: The run's, with an encoder.
        rows: Row numbers of the reference in the dataset's index, as many for every process.
        accelerator: The processes.

    Attributes:
        name: Name of the encoder.

    Raises:
        UserError: The encoder cannot be loaded, or the patches are of one patient.
    """

    def __init__(self, settings: TrainSettings, rows: np.ndarray, accelerator: Accelerator) -> None:
        self._accelerator, self._device = accelerator, accelerator.device
        self._encoder = load_encoder(settings.preview_encoder, settings.preview_weights or None)
        self.name = self._encoder.name
        dataset = open_dataset(settings.data)
        warn_if_demo_encoder(self._encoder, dataset)
        self._patients = dataset.index["patient"].to_numpy()[rows]
        if len(np.unique(self._patients)) < 2:
            raise UserError(
                f"The {len(rows)} training patches that previews are compared with are of one patient.",
                "Raise preview_images, or leave out preview_encoder.",
            )
        self._reference = self._features(dataset.read(rows[accelerator.process_index :: accelerator.num_processes]))

    def measure(self, images: np.ndarray) -> float:
        """The distance of the samples of all processes, of which this one has uint8 [n, H, W, 3]."""
        return kid(self._reference, self._features(images), self._patients)

    def _features(self, images: np.ndarray) -> np.ndarray:
        """Features of the patches of all processes, float32 [N, d]. The encoder leaves the device afterwards."""
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        try:
            mine = self._encoder.features(batches, self._device)
        except torch.OutOfMemoryError:
            logger.warning("The encoder %s does not fit next to the training, and is run on the CPU.", self.name)
            self._device = torch.device("cpu")
            mine = self._encoder.features(batches, self._device)
        self._encoder.features([], "cpu")
        return gathered(self._accelerator, torch.from_numpy(mine)).numpy()
