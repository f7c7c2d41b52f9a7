"""Latents encoded on demand from image shards by the frozen autoencoder, for data too large to store encoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.latents.autoencoder import Autoencoder, latent_shape
from latent_medi.latents.store import Moments, channel_statistics, check_rows
from latent_medi.latents.views import view_of
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads

_SAMPLE = 3  # stream of random numbers of the statistics


class StreamedLatents:
    """Moments of the patches of a dataset by row number, encoded on demand.

    It replaces a :class:`latent_medi.latents.store.LatentStore` and gives its values, rounded to fp16 as well. They
    differ by at most one such rounding, on processors that round differently in another batch.

    Args:
        data: The dataset, local or at a URL.
        autoencoder: Frozen; its device holds the moments.
        views: Symmetries to draw from, 1 or 8.
        device_batch: Most patches per forward pass of the autoencoder.
        workers: Threads that read and decode patches announced with :meth:`expect`; ``None`` takes what suits the
            device.
        sample: Number of patches from which statistics are measured.

    Attributes:
        info: The part of a latent folder's ``latents.json`` that training reads.
        shape: (C, h, w) of a latent.
        deterministic: Whether there is a mean only.
        views: As given.

    Raises:
        UserError: The autoencoder does not take patches of this size.
    """

    def __init__(
        self,
        data: PatchDataset,
        autoencoder: Autoencoder,
        views: int = 1,
        device_batch: int = 64,
        workers: int | None = None,
        sample: int = 2048,
    ) -> None:
        self.data, self.autoencoder, self.views = data, autoencoder, views
        self.device_batch, self.sample = device_batch, sample
        self.shape = latent_shape(autoencoder, data.patch_size)
        self.deterministic = autoencoder.deterministic
        self.info: dict[str, Any] = {
            "dataset": data.name,
            "autoencoder": {**autoencoder.description, "precision": str(autoencoder.dtype).removeprefix("torch.")},
            "shape": list(self.shape),
            "views": views,
        }
        self._reader = ReadAhead(data, read_ahead_threads(autoencoder.device, data) if workers is None else workers)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def identity(self) -> str:
        """What distinguishes these moments and their whitening from others of the same patches and autoencoder."""
        return f"streamed views={self.views} sample={self.sample} precision={self.info['autoencoder']['precision']}"

    def expect(self, rows: Sequence[int] | np.ndarray) -> None:
        """Announce the rows of a later call of :meth:`moments`, in their order, to read them in the background."""
        self._reader.expect(np.asarray(rows, dtype=np.int64).reshape(-1))

    def moments(self, rows: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | None = None) -> Moments:
        """Moments of some rows, in their order; rows may repeat.

        Args:
            rows: Row numbers of the dataset's index.
            views: The symmetry of each row, applied to its pixels; ``None`` takes the patches as they were cut.

        Returns:
            Mean fp32 [n, C, h, w], and standard deviation of the same shape or ``None`` for a deterministic
            autoencoder, on the autoencoder's device, rounded to fp16 as in a latent folder. Moments beyond fp16 are
            infinite and show in the loss of the training; checking them here would make a GPU wait.

        Raises:
            UserError: A row or view number is out of range, or a patch is damaged.
        """
        rows, views = check_rows(rows, views, len(self), self.views, str(self.data.folder))
        images = view_of(self._reader.read(rows), views)
        parts = [self._encode(images[i : i + self.device_batch]) for i in range(0, len(rows), self.device_batch)]
        if not parts:
            empty = torch.empty((0, *self.shape), device=self.autoencoder.device)
            return empty, None if self.deterministic else empty
        mean = torch.cat([mean for mean, _ in parts])
        std = None if self.deterministic else torch.cat([std for _, std in parts if std is not None])
        return mean, std

    def _encode(self, images: np.ndarray) -> Moments:
        mean, std = self.autoencoder.encode(images)
        return mean.half().float(), None if std is None else std.half().float()

    def statistics(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation per channel of sampled latents, over a fixed random sample of rows and views.

        Returns:
            Shift and scale, fp32 [C] each, on the CPU; (latent − shift) / scale has mean about 0 and standard
            deviation about 1 per channel.

        Raises:
            UserError: There is no row, a moment is beyond fp16, or a channel is constant.
        """
        rows = np.sort(np.asarray(rows, dtype=np.int64).reshape(-1))
        rng = np.random.default_rng(_SAMPLE)
        if len(rows) > self.sample:
            rows = np.sort(rng.choice(rows, self.sample, replace=False))
        views = rng.integers(self.views, size=len(rows))
        parts: list[Moments] = []
        starts = range(0, len(rows), self.device_batch)
        for i in progress(starts, len(rows), "shift and scale", "patches", self.device_batch):
            for j in (i, i + self.device_batch, i + 2 * self.device_batch):
                self.expect(rows[j : j + self.device_batch])
            batch = slice(i, i + self.device_batch)
            mean, std = self.moments(rows[batch], views[batch])
            finite = torch.isfinite(mean if std is None else mean + std).flatten(1).all(1).cpu().numpy()
            if not finite.all():
                raise UserError(
                    f"The latent of {self.data.index['key'].iloc[rows[batch][~finite][0]]!r} is not finite in fp16.",
                    "Encode in fp32.",
                )
            parts.append((mean.half().cpu(), None if std is None else std.half().cpu()))

        def chunks() -> Iterable[Moments]:
            return parts

        return channel_statistics(chunks, self.shape, len(rows), str(self.data.folder))
