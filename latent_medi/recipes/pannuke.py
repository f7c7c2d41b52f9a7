"""PanNuke: 256 × 256 px of nineteen tissues at 0.25 µm per pixel, in three folds of arrays.

    latent-medi shards pannuke SOURCE OUT --patch-size 256

SOURCE holds ``Fold 1/images/fold1/images.npy`` and ``types.npy`` (and 2, 3), as unpacked; masks are not read. The class
is the tissue. The source names no patients, so each fold is *one* patient here and the published folds are the only
honest split. CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.paths import path_argument
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.duplicates import allowed
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import CODECS
from latent_medi.shards.importing.convert import convert, scaled
from latent_medi.shards.writing.patch import Patch

SOURCE_MPP = 0.25
PARTS = {1: "train", 2: "val", 3: "test"}
"""The first of the three published ways round of the folds."""
PATCHES_PER_SHARD = 512


def _arrays(source: Path, fold: int) -> tuple[Path, Path]:
    folder = Path(source) / f"Fold {fold}" / "images" / f"fold{fold}"
    return folder / "images.npy", folder / "types.npy"


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is no plain array, and is not opened: {error}.") from None


def _read(chunk: tuple[int, int, int], source: Path, patch_size: int) -> Iterator[Patch]:
    fold, start, stop = chunk
    images, types = (_load(path) for path in _arrays(source, fold))
    for i in range(start, stop):
        # Stored as float64 holding whole numbers.
        image = np.asarray(images[i])
        exact = np.rint(image)
        if (
            image.shape != (256, 256, 3)
            or not (np.abs(image - exact) < 1e-3).all()
            or exact.min() < 0
            or exact.max() > 255
        ):
            raise UserError(f"Image {i} of fold {fold} is not 256 × 256 × 3 of whole numbers from 0 to 255.")
        yield Patch(
            f"fold{fold}/{i:05d}", scaled(exact.astype(np.uint8), patch_size, f"image {i}"), f"fold {fold}",
            f"fold {fold}", -1, -1, SOURCE_MPP, {"class": str(types[i])},
        )  # fmt: skip


def _files(chunk: tuple[int, int, int], source: Path) -> list[Path]:
    return list(_arrays(source, chunk[0]))


def build(
    source: Path,
    out: Path,
    patch_size: int = 256,
    codec: str = "png",
    seed: int = 0,
    jobs: int = 1,
    allow_duplicates: Sequence[str] = (),
) -> PatchDataset:
    """Write the dataset folder with the split ``published``.

    Args:
        source: Folder that holds the folds.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 256.
        codec: ``png``, ``jpg`` or ``webp``.
        seed: Not used; the split is the published one.
        jobs: Processes.
        allow_duplicates: Patients whose pictures may lie in several parts of the split; ``["*"]`` for all.

    Raises:
        UserError: The source has another layout.
    """
    folds = [fold for fold in PARTS if all(path.is_file() for path in _arrays(source, fold))]
    if not folds:
        raise UserError(
            f"{source} has no {_arrays(Path(), 1)[0]} with types.npy.", "Give the folder with 'Fold 1' in it."
        )
    chunks, types = [], []
    for fold in folds:
        images, names = (_load(path) for path in _arrays(source, fold))
        if len(images) != len(names):
            raise UserError(f"Fold {fold} of {source} has {len(images)} images and {len(names)} types.")
        types += [str(name) for name in names]
        chunks += [(fold, i, min(i + PATCHES_PER_SHARD, len(images))) for i in range(0, len(images), PATCHES_PER_SHARD)]
    provenance = {
        "source": "PanNuke (Gamper et al. 2020)", "licence": "CC BY-NC-SA 4.0",
        "patients": "not known; each fold stands as one patient, so that no split can divide it",
        "recipe": "shards/pannuke.py",
    }  # fmt: skip
    recipe = {"kind": "as published, by fold"} | allowed(allow_duplicates)
    split = ({f"fold {fold}": PARTS[fold] for fold in folds}, recipe)
    return convert(
        Path(out), chunks, partial(_read, source=Path(source), patch_size=patch_size),
        partial(_files, source=Path(source)),
        name="pannuke", schema=Schema.from_table(pd.DataFrame({"class": types}), "class"), patch_size=patch_size,
        mpp=SOURCE_MPP * 256 / patch_size, codec=codec, provenance=provenance, splits={"published": split}, jobs=jobs,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = argparse.ArgumentParser(prog="latent-medi shards pannuke", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=path_argument, help="folder that holds 'Fold 1' to 'Fold 3'")
    parser.add_argument("out", type=path_argument, help="dataset folder to write")
    parser.add_argument("--patch-size", type=int, default=256, help="edge of a stored patch in pixels (default 256)")
    parser.add_argument("--codec", choices=CODECS, default="png", help="png is lossless (default)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--allow-duplicates", nargs="+", default=[], metavar="PATIENT",
        help="whose pictures may lie in several parts of the split under different patients; '*' for all",
    )  # fmt: skip
    a = parser.parse_args(argv)
    dataset = build(a.source, a.out, a.patch_size, a.codec, jobs=a.jobs, allow_duplicates=a.allow_duplicates)
    print(dataset.counts("class", "patient").to_string())
    return {
        "folder": str(dataset.folder), "patches": len(dataset), "splits": dataset.info["splits"]["published"]["counts"],
    }  # fmt: skip
