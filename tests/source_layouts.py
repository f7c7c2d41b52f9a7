"""Public datasets of random pixels in the layouts in which they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NCT_CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def write_nct_crc(folder: Path, train: int, test: int) -> Path:
    """The two sets of NCT-CRC-HE, a folder of TIFF of 224 px for each of nine classes.

    Args:
        folder: The source folder of the recipe.
        train: Images of each class in NCT-CRC-HE-100K.
        test: Images of each class in CRC-VAL-HE-7K.
    """
    rng = np.random.default_rng(0)
    for name, count in (("NCT-CRC-HE-100K", train), ("CRC-VAL-HE-7K", test)):
        for kind in NCT_CRC_CLASSES:
            (folder / name / kind).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(blocks(rng, 7, 224))
                picture.save(folder / name / kind / f"{kind}-{name[:3]}{i:03}.tif")
    return folder


def write_pannuke(folder: Path, count: int = 5) -> Path:
    """The three folds of PanNuke: arrays of images of 256 px, held as float64, and of the names of their tissues.

    Args:
        folder: The source folder of the recipe.
        count: Images of each fold.
    """
    rng = np.random.default_rng(1)
    for fold in (1, 2, 3):
        target = folder / f"Fold {fold}" / "images" / f"fold{fold}"
        target.mkdir(parents=True)
        np.save(target / "images.npy", np.stack([blocks(rng, 8, 256) for _ in range(count)]).astype(np.float64))
        np.save(target / "types.npy", np.resize(["Breast", "Colon", "Bile-duct", "Breast", "Skin"], count))
    return folder


def write_pictures(folder: Path, count: int, seed: int = 2) -> Path:
    """A folder of images of 224 px, PNG."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(blocks(rng, 7, 224)).save(folder / f"picture{i:03}.png")
    return folder


def blocks(rng: np.random.Generator, number: int, edge: int) -> np.ndarray:
    """Random squares, such that no picture passes for another one: uint8 [edge, edge, 3].

    Args:
        rng: Draws the colours.
        number: Squares in a row.
        edge: Width and height, a multiple of ``number``.
    """
    size = edge // number
    return np.kron(rng.integers(0, 255, (number, number, 3), np.uint8), np.ones((size, size, 1), np.uint8))
