"""The patches that an autoencoder is trained and measured on, with the labels of the auxiliary classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.features.classifier_folder import read_facts
from latent_medi.latents.store import moved, pinned
from latent_medi.latents.views import VIEWS, view_of
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.training_record import training_record
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.training.batch_randomness import batch_generator
from latent_medi.training.data import training_rows
from latent_medi.training.sample_order import rank_slice, rows_at

logger = get_logger("training")

UNLABELLED = -1
"""Label of a patch whose value of the field is not known."""


@dataclass(frozen=True)
class PixelBatch:
    """The part of a global batch that one process trains on: n patches.

    Args:
        images: uint8 [n, H, W, 3].
        noise: fp32 [n, C, h, w]; chooses a sample of the posterior; with C = 0 for a deterministic autoencoder.
        labels: int64 [n]; position of the value of the classifier's field, or :data:`UNLABELLED`.
        seen: Images seen before the update.
    """

    images: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor
    seen: int

    def __len__(self) -> int:
        return len(self.images)

    def _each(self, do: Callable[[torch.Tensor], torch.Tensor]) -> PixelBatch:
        return PixelBatch(do(self.images), do(self.noise), do(self.labels), self.seen)

    def pinned(self) -> PixelBatch:
        """The same in pinned memory."""
        return self._each(pinned)

    def parts(self, size: int, device: torch.device) -> list[PixelBatch]:
        """The batch, moved to a device as a whole and split into parts of at most ``size`` patches."""
        whole = self._each(lambda tensor: moved(tensor, device))
        cuts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [whole._each(lambda tensor, cut=cut: tensor[cut]) for cut in cuts]  # type: ignore[misc]


@dataclass
class PixelData:
    """The rows to train on.

    Args:
        dataset: The dataset.
        rows: int64 [n]; row numbers of its index.
        keys: Keys of these rows.
        labels: int64 [n], see :class:`PixelBatch`.
        values: Values of the classifier's field in the order of the labels; none without a classifier.
        crop: Edge of what is cut from a patch, in pixels.
        symmetries: Whether a symmetry of the square is drawn for each patch.
        latent: (C, h, w) of the posterior sample that is drawn for each patch; C = 0 for none.
    """

    dataset: PatchDataset
    rows: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    values: tuple[str, ...]
    crop: int
    symmetries: bool
    latent: tuple[int, int, int]

    def __post_init__(self) -> None:
        # Where the network runs on the CPU, decoding would compete with it for the cores.
        self._reader = ReadAhead(self.dataset, read_ahead_threads(torch.device("cpu"), self.dataset))

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, number: int, batch: int, seed: int) -> np.ndarray:
        """Positions in :attr:`rows` of the ``number``-th global batch, int64 [batch]."""
        return rows_at(number * batch, batch, len(self), seed)

    @property
    def in_order(self) -> bool:
        """Whether batches are to be requested one after the other: no, each reads its own patches."""
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: nothing."""
        return {}

    def batch(
        self, number: int, batch: int, seed: int, timesteps: int, dropout: DropoutSettings, rank: int, processes: int
    ) -> PixelBatch:
        """A process's share of the ``number``-th global batch, on the CPU; there are no timesteps and no conditions.

        Crops, symmetries and noise are drawn for the whole global batch, so they do not depend on the number of
        processes.
        """
        generator, mine = batch_generator(seed, number), rank_slice(rank, processes)
        noise = torch.randn((batch, *self.latent), generator=generator)[mine]
        room = self.dataset.patch_size - self.crop + 1
        corners = torch.randint(room, (batch, 2), generator=generator)[mine].numpy()
        views = torch.randint(VIEWS, (batch,), generator=generator)[mine].numpy()
        members = self.at(number, batch, seed)[mine]
        images = cropped(self._reader.read(self.rows[members]), corners, self.crop)
        images = view_of(images, views) if self.symmetries else images
        labels = torch.from_numpy(self.labels[members])
        return PixelBatch(torch.from_numpy(images), noise.contiguous(), labels, number * batch)

    def fingerprint(self) -> str:
        """SHA-256 over the pixels of the dataset, the rows and their labels."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        for shard in self.dataset.info["shards"]:
            digest.update(str(shard["sha256"]).encode())
        digest.update(repr(self.values).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    @property
    def info(self) -> dict[str, Any]:
        """Name of the dataset, its patch size and resolution, its training patients and what occurs in them."""
        table = self.dataset.index.iloc[self.rows]
        info = {"name": self.dataset.name, "patch_size": self.dataset.patch_size, "mpp": self.dataset.info["mpp"]}
        info |= {"training_patches": len(self), "training_patients": int(table["patient"].nunique())}
        return info | {"seen": training_record(table, self.dataset.schema)}


def cropped(images: np.ndarray, corners: np.ndarray, edge: int) -> np.ndarray:
    """Squares of images [n, H, W, 3] at their upper left corners, int [n, 2] (row, column)."""
    if edge == images.shape[1]:
        return images
    return np.stack([x[r : r + edge, c : c + edge] for x, (r, c) in zip(images, corners, strict=True)])


def open_pixels(settings: AutoencoderSettings, factor: int, channels: int) -> PixelData:
    """The rows that the settings select, with their labels.

    Args:
        settings: The run.
        factor: Pixels per latent pixel of the autoencoder along an edge.
        channels: Channels of the posterior sample; 0 for a deterministic autoencoder.

    Raises:
        UserError: Data, split or field are absent, the size does not fit the autoencoder, or there are fewer than two
            labels.
    """
    dataset = open_dataset(settings.data)
    rows = training_rows(dataset, settings.split, settings.split_value, settings.only)
    crop = settings.crop or dataset.patch_size
    if crop > dataset.patch_size:
        raise UserError(f"crop={crop} is larger than the patches of {dataset.folder}, {dataset.patch_size} px.")
    if crop % factor:
        raise UserError(
            f"The autoencoder takes images of a multiple of {factor} px, not {crop} px.",
            f"Set crop={crop // factor * factor}." if crop >= factor else "Use larger patches.",
        )
    labels = np.full(len(rows), UNLABELLED)
    values: tuple[str, ...] = ()
    if settings.classifier.weight:
        folder = settings.classifier.model
        facts = read_facts(folder) if folder else None
        name = facts.field if facts else settings.classifier.field
        labels, values = labels_of(dataset, name, rows, facts.labels if facts else ())
    latent = (channels, crop // factor, crop // factor)
    keys = dataset.index["key"].to_numpy()[rows]
    return PixelData(dataset, rows, keys, labels, values, crop, settings.symmetries, latent)


def labels_of(
    dataset: PatchDataset, name: str, rows: np.ndarray, known: Sequence[str] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of some rows, int64 [n], and the values in the order of the labels.

    Args:
        dataset: The dataset.
        name: The field; empty: the class.
        rows: The rows.
        known: The values of a classifier that is trained already; others are not labelled. Empty: those that occur.

    Raises:
        UserError: There is no such field, it is continuous, or fewer than two values occur.
    """
    field = dataset.schema.field(name) if name else dataset.schema.class_field
    if field is None:
        raise UserError(
            f"{dataset.folder} has no class, which the auxiliary classifier needs.",
            "Set classifier.field to a field, or classifier.weight=0.",
        )
    if field.continuous:
        raise UserError(f"The field {field.name!r} is a number; a classifier needs a field with a vocabulary.")
    column = dataset.index[field.name].iloc[rows]
    present = set(column.dropna().astype(str))
    values = tuple(known) or tuple(value for value in field.values if value in present)
    if len(present & set(values)) < (1 if known else 2):
        raise UserError(
            f"The training patches of {dataset.folder} have {len(present & set(values))} values of {field.name} "
            f"({', '.join(sorted(present)) or 'none'}) to classify"
            + (f", of {', '.join(known)}." if known else "; the auxiliary classifier needs two or more."),
            "Set classifier.weight=0, or train on other patches.",
        )
    place = {value: i for i, value in enumerate(values)}
    return np.array([place.get(str(value), UNLABELLED) for value in column], np.int64), values


@dataclass(frozen=True)
class MeasuredPart:
    """Patches whose reconstructions are measured.

    Args:
        name: Value of the split, or name of another dataset.
        dataset: Where they are.
        rows: int64 [n]; row numbers of its index.
        crop: Edge of what is cut from the middle of a patch, in pixels.
    """

    name: str
    dataset: PatchDataset
    rows: np.ndarray
    crop: int

    def read(self, positions: slice | np.ndarray) -> np.ndarray:
        """Some of the patches, uint8 [n, H, W, 3]."""
        images = self.dataset.read(self.rows[positions])
        corner = (self.dataset.patch_size - self.crop) // 2
        return cropped(images, np.full((len(images), 2), corner), self.crop)


def measured_parts(settings: AutoencoderSettings, data: PixelData, factor: int) -> list[MeasuredPart]:
    """The patches that are measured, of each value of the split and of each other dataset.

    Raises:
        UserError: A dataset is absent, or its patches are too small for the autoencoder.
    """
    found: list[MeasuredPart] = []

    def add(name: str, dataset: PatchDataset, rows: np.ndarray) -> None:
        draw = np.random.default_rng(settings.seed)
        if len(rows) < 2:
            logger.info("%s has %d patches to measure, so it is left out.", name, len(rows))
            return
        few = np.sort(draw.choice(rows, min(settings.measure_patches, len(rows)), replace=False))
        crop = min(data.crop, dataset.patch_size) // factor * factor
        if not crop:
            raise UserError(
                f"The patches of {dataset.folder}, {dataset.patch_size} px, are smaller than a latent pixel, {factor}.",
                f"Leave {name} out of others.",
            )
        found.append(MeasuredPart(name, dataset, few, crop))

    if settings.split:
        for value in settings.measure:
            rows = data.dataset.rows({f"{SPLIT_PREFIX}{settings.split}": value})
            rows = rows[only_mask(data.dataset.index, settings.only, settings.data)[rows]]
            add(value, data.dataset, data.rows if value == settings.split_value else rows)
    elif settings.measure:
        add("training", data.dataset, data.rows)
    for name, folder in settings.others.items():
        dataset = open_dataset(folder)
        add(name, dataset, np.arange(len(dataset)))
    return found


def measured_fingerprint(parts: Sequence[MeasuredPart]) -> str:
    """SHA-256 over the patches that are measured."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.name.encode())
        digest.update("\n".join(part.dataset.index["key"].iloc[part.rows]).encode())
    return digest.hexdigest()
