"""Augmentation of training patches by timm. What happens to an image depends only on the seed and its place in the run.

timm draws from the global generators of Python, NumPy and torch, so each is seeded for each image, and for each update
where images are mixed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing

from latent_medi.core.errors import UserError
from latent_medi.features.registry import Preprocessing
from latent_medi.image_classifier.settings import AugmentSettings

_IMAGE, _ERASE, _MIX = 11, 12, 13  # different from the streams of training


def seed_of(stream: int, seed: int, number: int) -> int:
    """A seed from 0 to 2**32 - 1 of one of several random streams."""
    return int(np.random.SeedSequence([stream, seed, number]).generate_state(1)[0])


_one_at_a_time = threading.Lock()  # a thread may augment the next batch while the main thread mixes this one


def _seed(value: int, device: torch.device | None = None) -> None:
    """Seed the CPU's generators and, of a GPU's, the one that :func:`generators_kept` keeps alone."""
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Give the global generators their states back at the end; one thread at a time."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with _one_at_a_time:
        before, numpy_before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


@dataclass(frozen=True)
class MixedImages:
    """Images as the network trains on them.

    Args:
        images: fp32 [n, 3, S, S]; normalised, erased, mixed.
        targets: fp32 [n, classes]; rows sum to 1.
    """

    images: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


def keep_a_bit(transforms: Iterable[Any]) -> None:
    """Let posterisation of RandAugment keep one bit where timm asks for none, which Pillow refuses since version 12."""
    for transform in transforms:
        for op in transform.ops if isinstance(transform, RandAugment) else ():
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **others: Any) -> Image.Image:
    return posterize(image, max(bits, 1), **others)


class Augmentation:
    """Changes patches and mixes them in pairs.

    Args:
        settings: Which changes.
        preprocessing: Size and normalisation of the network's input.
        classes: Number of classes.
        seed: Seed of the run.

    Raises:
        UserError: timm does not know the RandAugment.
    """

    def __init__(self, settings: AugmentSettings, preprocessing: Preprocessing, classes: int, seed: int) -> None:
        self.settings, self.classes, self.seed = settings, classes, seed
        self.preprocessing = preprocessing
        common: dict[str, Any] = {"scale": settings.crop_scale, "hflip": settings.hflip, "vflip": settings.vflip}
        try:
            if settings.rand_augment and not settings.rand_augment.startswith("rand"):
                raise ValueError("it begins with rand")
            first, second, _ = create_transform(
                preprocessing.size,
                is_training=True,
                auto_augment=settings.rand_augment or None,
                color_jitter=settings.color_jitter,
                interpolation=preprocessing.resize,
                mean=preprocessing.mean,
                separate=True,
                **common,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"augment.rand_augment is {settings.rand_augment!r}, which timm does not know: {error}",
                "An example is rand-m9-mstd0.5-inc1.",
            ) from None
        self._transforms = [*first.transforms, *second.transforms]
        keep_a_bit(self._transforms)
        self._erasing = RandomErasing(settings.erase, mode="pixel", device="cpu") if settings.erase else None
        self._mixup: Mixup | None = None
        if settings.mixes:
            self._mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes
            )

    def image(self, patch: np.ndarray, place: int) -> np.ndarray:
        """A patch uint8 [H, W, 3] at a place of the run, cut out, flipped and changed in colour: uint8 [S, S, 3].

        The caller keeps the global generators.
        """
        _seed(seed_of(_IMAGE, self.seed, place))
        picture = Image.fromarray(patch)
        for transform in self._transforms:
            picture = transform(picture)
        return np.asarray(picture)

    def finish(self, images: torch.Tensor, labels: torch.Tensor, places: np.ndarray, number: int) -> MixedImages:
        """Normalise images on their device, erase parts, and mix pairs.

        Args:
            images: uint8 [n, S, S, 3]; image i is mixed with image n − 1 − i.
            labels: int64 [n].
            places: Place of each image in the run, int64 [n].
            number: Number of the update.
        """
        device, how = images.device, self.preprocessing
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (how.mean, how.std))
        x = (images.permute(0, 3, 1, 2).float().div_(255.0) - mean).div_(std).contiguous()
        with generators_kept(device):
            if self._erasing is not None:
                self._erasing.device = device
                for image, place in zip(x, places.tolist(), strict=True):
                    _seed(seed_of(_ERASE, self.seed, place), device)
                    self._erasing(image)
            if self._mixup is None:
                return MixedImages(x, mixup_target(labels, self.classes, 1.0, self.settings.smoothing))
            _seed(seed_of(_MIX, self.seed, number), device)
            return MixedImages(*self._mixup(x, labels))
