"""PanNuke: 256 × 256 px of nineteen tissues at 0.25 µm per pixel, in three folds of arrays.

    latent-medi shards pannuke SOURCE OUT --patch-size 256

SOURCE holds ``Fold 1/images/fold1/images.npy`` and ``types.npy`` (and 2, 3), as unpacked; masks are not read. The class
is the tissue. The source names no patients, so each image counts as one, and every result says so. CC BY-NC-SA 4.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.recipes._common import Options, recipe_parser, run_recipe
from latent_medi.shards.checking.duplicates import allowed
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.convert import Source, convert, scaled
from latent_medi.shards.writing.finish import Description
from latent_medi.shards.writing.patch import Patch

SOURCE_MPP = 0.25
PARTS = {1: "train", 2: "val", 3: "test"}
"""Part of the published split by fold, in the first of its three published orders."""
PATCHES_PER_SHARD = 512


def _arrays(source: Path, fold: int) -> tuple[Path, Path]:
    folder = Path(source) / f"Fold {fold}" / "images" / f"fold{fold}"
    return folder / "images.npy", folder / "types.npy"


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is no plain array, and is not opened: {error}.") from None


def _key(fold: int, number: int) -> str:
    return f"fold{fold}/{number:05d}"


def _read(chunk: tuple[int, int, int], source: Path, patch_size: int) -> Iterator[Patch]:
    fold, start, stop = chunk
    images, types = (_load(path) for path in _arrays(source, fold))
    for i in range(start, stop):
        # Stored as float64 holding whole numbers.
        image = np.asarray(images[i])
        exact = np.rint(image)
        whole = (np.abs(image - exact) < 1e-3).all() and exact.min() >= 0 and exact.max() <= 255
        if image.shape != (256, 256, 3) or not whole:
            raise UserError(f"Image {i} of fold {fold} is not 256 × 256 × 3 of whole numbers from 0 to 255.")
        key, fields = _key(fold, i), {"class": str(types[i])}
        patch = scaled(exact.astype(np.uint8), patch_size, f"image {i}")
        yield Patch(key, patch, key, key, -1, -1, SOURCE_MPP, fields, extra={"fold": str(fold)})


def build(source: Path, out: Path, patch_size: int = 256, **options: Unpack[Options]) -> PatchDataset:
    """Write the dataset folder with the split ``published``.

    Args:
        source: Folder that holds the folds.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 256.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout.
    """
    folds = [fold for fold in PARTS if all(path.is_file() for path in _arrays(source, fold))]
    if not folds:
        problem = f"{source} has no {_arrays(Path(), 1)[0]} with types.npy."
        raise UserError(problem, "Give the folder with 'Fold 1' in it.")
    chunks, types = [], []
    for fold in folds:
        images, names = (_load(path) for path in _arrays(source, fold))
        if len(images) != len(names):
            raise UserError(f"Fold {fold} of {source} has {len(images)} images and {len(names)} types.")
        types += [str(name) for name in names]
        chunks += [(fold, i, min(i + PATCHES_PER_SHARD, len(images))) for i in range(0, len(images), PATCHES_PER_SHARD)]
    provenance = {
        "source": "PanNuke (Gamper et al. 2020)",
        "licence": "CC BY-NC-SA 4.0",
        "patients": "not known; each image counts as one",
        "recipe": "shards/pannuke.py",
    }
    recipe = {"kind": "as published, by fold"} | allowed(options.get("allow_duplicates", ()))
    parts = {_key(fold, i): PARTS[fold] for fold, start, stop in chunks for i in range(start, stop)}
    splits = {"published": (parts, recipe)}
    schema = Schema.from_table(pd.DataFrame({"class": types}), "class")
    mpp = SOURCE_MPP * 256 / patch_size
    read = partial(_read, source=Path(source), patch_size=patch_size)
    return convert(
        Path(out),
        Source(chunks, read, lambda chunk: _arrays(source, chunk[0])),
        Description("pannuke", schema, patch_size, mpp, options.get("codec", "png"), provenance, splits, "image"),
        options.get("jobs", 1),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = recipe_parser("pannuke", __doc__, "folder that holds 'Fold 1' to 'Fold 3'", 256)
    return run_recipe(build, parser, argv, "published", ("class", "fold"))
