"""The data of an image classifier: training patches, real and synthetic, in their order; and patches to score on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from torch.utils.data import DataLoader, Dataset

from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_bytes
from latent_medi.core.progress import get_logger
from latent_medi.features.cache import dataset_hash
from latent_medi.features.classifier_folder import preprocessing_for
from latent_medi.image_classifier.augment import Augmentation, MixedImages, generators_kept
from latent_medi.image_classifier.settings import ImageClassifierSettings
from latent_medi.latent_classifier.data import chosen_field, chosen_values, labelled
from latent_medi.latents.store import moved, pinned
from latent_medi.metadata.schema import Field
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.selections import choice_order
from latent_medi.training.data import training_rows
from latent_medi.training.sample_order import balance_weights, rank_slice, rows_at

logger = get_logger("training")

MOST_WORKERS = 16
_SAME_WIDTH = 0.05  # relative difference up to which patches count as equally wide


@dataclass(frozen=True)
class ImageBatch:
    """The part of a global batch that one process trains on: n images.

    Args:
        images: uint8 [n, S, S, 3]; cut out and changed in colour.
        labels: int64 [n].
        places: Place of each image in the run, int64 [n].
        number: Number of the update.
        augmentation: Erases and mixes them on the device.
    """

    images: torch.Tensor
    labels: torch.Tensor
    places: np.ndarray
    number: int
    augmentation: Augmentation

    def pinned(self) -> ImageBatch:
        """The same, with tensors of the CPU in pinned memory."""
        return ImageBatch(pinned(self.images), pinned(self.labels), self.places, self.number, self.augmentation)

    def parts(self, size: int, device: torch.device) -> list[MixedImages]:
        """The images, erased and mixed on a device, in parts of at most ``size``."""
        whole = moved(self.images, device), moved(self.labels, device)
        mixed = self.augmentation.finish(*whole, self.places, self.number)
        cut = zip(mixed.images.split(size), mixed.targets.split(size), strict=True)
        return [MixedImages(*part) for part in cut]


class ImageData:
    """The training patches, for :class:`latent_medi.training.updates.Run`.

    Args:
        sources: Datasets that patches come from.
        source: Which of them each patch is in, int64 [n].
        rows: Row of each patch there, int64 [n].
        labels: Class code of each patch, int64 [n].
        weights: float64 [n] for weighted draws, or ``None`` for each patch once per epoch.
        augmentation: Changes the patches.
        workers: Helper processes that read and augment.
        updates: Length of the run in updates, beyond which they make nothing.
    """

    def __init__(
        self,
        sources: Sequence[PatchDataset],
        source: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray | None,
        augmentation: Augmentation,
        workers: int = 0,
        updates: int = 0,
    ) -> None:
        self.sources, self.source, self.rows, self.labels = list(sources), source, rows, labels
        self.weights, self.augmentation = weights, augmentation
        self.workers, self.updates = workers, updates
        self.keys = np.empty(len(rows), object)
        for i, dataset in enumerate(self.sources):
            self.keys[source == i] = dataset.index["key"].to_numpy()[rows[source == i]]
        self._coming: Iterator[Any] | None = None
        self._next = -1

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def in_order(self) -> bool:
        """Batches are to be requested one after the other."""
        return True

    def state(self) -> dict[str, Any]:
        """A checkpoint keeps nothing: order and augmentation are functions of the images seen."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 over the patches with their pixels, classes and weights."""
        digest = hashlib.sha256()
        for dataset in self.sources:
            digest.update(dataset_hash(dataset).encode())
        for values in (self.source, self.rows, self.labels):
            digest.update(np.ascontiguousarray(values, np.int64).tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()

    def at(self, number: int, batch: int, seed: int) -> np.ndarray:
        """Positions of the ``number``-th global batch, int64 [batch]; each patch occurs ``repeats`` times in a row."""
        repeats = self.augmentation.settings.repeats
        first, last = number * batch // repeats, ((number + 1) * batch - 1) // repeats
        positions = rows_at(first, last - first + 1, len(self), seed, self.weights)
        return positions[np.arange(number * batch, (number + 1) * batch) // repeats - first]

    def batch(
        self, number: int, batch: int, seed: int, timesteps: int, dropout: object, rank: int, processes: int
    ) -> ImageBatch:
        """A process's share of the ``number``-th global batch; ``timesteps`` and ``dropout`` have no meaning here.

        Its i-th image from the start and from the end are half a global batch apart. Mixed pairs are therefore the same
        for any number of processes.
        """
        share = np.arange(batch)[rank_slice(rank, processes)]
        half = len(share) // 2
        share = np.concatenate([share[:half], share[half:][::-1]])
        positions, places = self.at(number, batch, seed)[share], number * batch + share
        images = self._images(number, batch, seed, rank, processes, positions, places)
        return ImageBatch(images, torch.from_numpy(self.labels[positions]), places, number, self.augmentation)

    def _images(
        self,
        number: int,
        batch: int,
        seed: int,
        rank: int,
        processes: int,
        positions: np.ndarray,
        places: np.ndarray,
    ) -> torch.Tensor:
        if not self.workers:
            return self.augmented(positions, places)
        if self._coming is None:
            self._next = number
            shares = _Shares(self, batch, seed, rank, processes)
            numbers = range(number, max(self.updates, number + 1))
            # A generator of its own: the loader draws a seed, and must not draw it from the network's.
            self._coming = iter(
                DataLoader(shares, None, sampler=numbers, num_workers=self.workers, generator=torch.Generator())
            )
        if number != self._next:  # asked for once more
            return self.augmented(positions, places)
        self._next += 1
        found = next(self._coming)
        if isinstance(found, UserError):
            raise found
        assert isinstance(found, torch.Tensor)
        return found

    def augmented(self, positions: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """Patches at these positions, changed as at these places of the run, uint8 [n, S, S, 3].

        Raises:
            UserError: A patch is damaged (named).
        """
        size = self.augmentation.preprocessing.size
        images = np.empty((len(positions), size, size, 3), np.uint8)
        source, rows = self.source[positions], self.rows[positions]
        with generators_kept():
            for i, dataset in enumerate(self.sources):
                mine = np.flatnonzero(source == i)
                if len(mine):
                    patches = dataset.read(rows[mine])
                    for place, patch in zip(mine.tolist(), patches, strict=True):
                        images[place] = self.augmentation.image(patch, int(places[place]))
        return torch.from_numpy(images)

    def close(self) -> None:
        """End the helper processes."""
        self._coming = None


class _Shares(Dataset[Any]):
    """A process's share of each global batch, as a helper process makes it."""

    def __init__(self, data: ImageData, batch: int, seed: int, rank: int, processes: int) -> None:
        # Without helpers of its own, in the helper.
        common = (data.sources, data.source, data.rows, data.labels, data.weights, data.augmentation)
        self.data, self.known = ImageData(*common), (batch, seed, 0, None, rank, processes)

    def __getitem__(self, number: int) -> torch.Tensor | UserError:
        try:
            return self.data.batch(number, *self.known).images
        except UserError as error:  # a loader would raise it with another text
            return error


@dataclass(frozen=True)
class Scored:
    """Real patches to score a classifier on.

    Args:
        dataset: Their dataset.
        rows: int64 [n].
        labels: Class code of each, int64 [n].
        patients: Patient of each, [n].
    """

    dataset: PatchDataset
    rows: np.ndarray
    labels: np.ndarray
    patients: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 over the patches and their classes."""
        keys = self.dataset.index["key"].to_numpy()[self.rows]
        return sha256_bytes("\n".join(f"{k}\t{v}" for k, v in zip(keys, self.labels.tolist(), strict=True)).encode())


@dataclass(frozen=True)
class Parts:
    """What a training works on.

    Args:
        data: The training patches.
        validation, test: The patches to choose by and to score on; there may be none.
        dataset: The real dataset.
        field: The field to classify.
        labels: Its values, in the order of the logits.
        info: Facts about the data for the provenance.
    """

    data: ImageData
    validation: Scored
    test: Scored
    dataset: PatchDataset
    field: Field
    labels: tuple[str, ...]
    info: dict[str, Any]


def open_parts(settings: ImageClassifierSettings) -> Parts:
    """Training, validation and test patches.

    Raises:
        UserError: Data, split, field, value or selection are absent; a patient is in several parts; or validation or
            test patches are synthetic.
    """
    dataset = PatchDataset.open(settings.data)
    field = chosen_field(dataset, settings.field)
    labels = chosen_values(field, settings.values)
    if settings.validation_value or settings.test_value:
        assert_patient_disjoint(dataset.index, f"{SPLIT_PREFIX}{settings.split}")

    def part(value: str, setting: str) -> Scored:
        rows = np.zeros(0, np.int64)
        if value:
            try:
                rows = labelled(dataset, field, labels, training_rows(dataset, settings.split, value, settings.only))
            except UserError as error:
                remedy = f"Make a split with this part, or set {setting}= (empty) to do without."
                raise UserError(error.message, f"{error.hint} {remedy}".strip()) from None
        table = dataset.index.iloc[rows]
        if setting != "split_value" and (table["origin"] != "real").any():
            raise UserError(
                f"The part {value!r} of {dataset.folder} holds synthetic patches.",
                "Only real patches can choose or score a classifier.",
            )
        codes = np.array([labels.index(v) for v in table[field.name].astype(str)], np.int64)
        return Scored(dataset, rows, codes, table["patient"].to_numpy(str))

    training = part(settings.split_value, "split_value")
    counts = np.bincount(training.labels, minlength=len(labels))
    if empty := [label for label, n in zip(labels, counts.tolist(), strict=True) if not n]:
        raise UserError(
            f"No training patch has {field.name} {', '.join(map(repr, empty))}, so it cannot be learned.",
            "List the other values in the setting values.",
        )
    sources, source, rows = [dataset], [np.zeros(len(training), np.int64)], [training.rows]
    codes, added = [training.labels], {}
    for name, folder in settings.synthetic.items():
        other = PatchDataset.open(folder)
        warn_of_scale(other, dataset.patch_size, float(dataset.info["mpp"]))
        chosen, its_codes = synthetic_rows(other, field, labels, counts, settings)
        source.append(np.full(len(chosen), len(sources), np.int64))
        sources.append(other)
        rows.append(chosen)
        codes.append(its_codes)
        added[name] = len(chosen)
    everyone = np.concatenate(codes)
    weights = balance_weights(everyone[:, None], 1.0) if settings.balance else None
    info: dict[str, Any] = {"name": dataset.name, "training_patches": len(training), "synthetic_patches": added}
    info["training_patients"] = len(set(training.patients.tolist()))
    how = preprocessing_for(settings.network, settings.image_size, settings.weights)
    augmentation = Augmentation(settings.augment, how, len(labels), settings.seed)
    data = ImageData(sources, np.concatenate(source), np.concatenate(rows), everyone, weights, augmentation)
    validation = part(settings.validation_value, "validation_value")
    return Parts(data, validation, part(settings.test_value, "test_value"), dataset, field, labels, info)


def warn_of_scale(dataset: PatchDataset, patch_size: int, mpp: float) -> None:
    """Warn of patches of another size in pixels or micrometres than the real ones of a training."""
    own = float(dataset.info["mpp"])
    if dataset.patch_size != patch_size:
        logger.warning(
            "The real training patches have %d px; those of %s have %d px and are resized.",
            patch_size,
            dataset.folder,
            dataset.patch_size,
        )
    theirs, ours = own * dataset.patch_size, mpp * patch_size
    if abs(theirs / ours - 1) > _SAME_WIDTH:
        logger.warning(
            "The real training patches are %.4g µm wide (%.4g µm per pixel); those of %s are %.4g µm wide (%.4g µm per "
            "pixel), so tissue has another size in them.",
            ours,
            mpp,
            dataset.folder,
            theirs,
            own,
        )


def synthetic_rows(
    dataset: PatchDataset, field: Field, labels: Sequence[str], counts: np.ndarray, settings: ImageClassifierSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a synthetic dataset that are added, and their class codes, int64 [m] each.

    Args:
        dataset: The synthetic dataset.
        field: The field to classify.
        labels: Its values.
        counts: Real training patches of each.
        settings: How many, and which.

    Raises:
        UserError: It holds real patches, whose patients may be in the test part; it has no such field or selection, or
            no patch of the classes.
    """
    if (dataset.index["origin"] != "synthetic").any():
        raise UserError(f"The synthetic dataset {dataset.folder} holds real patches.", "Name one without them.")
    if field.name not in dataset.index:
        raise UserError(f"{dataset.folder} has no field {field.name!r}.", "Leave this folder out of synthetic.")
    order = choice_order(dataset.index, str(dataset.folder), settings.selection, settings.choice, settings.seed)
    values = dataset.index[field.name].astype(str).to_numpy()[order]
    rows, codes, few = [], [], []
    for code, (label, count) in enumerate(zip(labels, counts.tolist(), strict=True)):
        wanted = int(settings.percent / 100 * count)
        found = order[values == label][:wanted]
        rows.append(found)
        codes.append(np.full(len(found), code, np.int64))
        if len(found) < wanted:
            few.append(f"{label} ({len(found):,} of {wanted:,})")
    if settings.percent and not sum(map(len, rows)):
        raise UserError(f"{dataset.folder} has no patch of {', '.join(labels)} to add.", "Check field and selection.")
    if few:
        logger.warning("%s has too few patches of %s; all are taken.", dataset.folder, ", ".join(few))
    return np.concatenate(rows).astype(np.int64), np.concatenate(codes)


def default_workers(device: torch.device) -> int:
    """Helper processes where none are set: none on a CPU, whose cores the network needs."""
    if device.type == "cpu":
        return 0
    cores = cpu_count()
    mine = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MOST_WORKERS, mine - 1))
