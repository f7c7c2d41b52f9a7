"""Public datasets of random pixels in the layouts in which they are published."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

NCT_CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


DRAW = np.random.default_rng(0)


def picture(edge: int) -> np.ndarray:
    """Noise uint8 [edge, edge, 3]."""
    return DRAW.integers(0, 256, (edge, edge, 3), dtype=np.uint8)


def image_bytes(edge: int, kind: str) -> bytes:
    """A file of :func:`picture`; ``kind`` is Pillow's name of the format."""
    buffer = io.BytesIO()
    Image.fromarray(picture(edge)).save(buffer, kind)
    return buffer.getvalue()


def write_camelyon(folder: Path) -> Path:
    """CAMELYON17-WILDS: a node of each of four patients at four centres, three patches of 96 px each."""
    rows = []
    for number, (patient, node, centre) in enumerate([("4", 4, 0), ("20", 2, 1), ("40", 0, 2), ("41", 1, 3)]):
        name = f"patient_{int(patient):03d}_node_{node}"
        (folder / "patches" / name).mkdir(parents=True)
        for i in range(3):
            x, y = 3328 + 96 * i, 21792
            (folder / "patches" / name / f"patch_{name}_x_{x}_y_{y}.png").write_bytes(image_bytes(96, "PNG"))
            rows.append(
                {
                    "": len(rows),
                    "patient": patient,
                    "node": node,
                    "x_coord": x,
                    "y_coord": y,
                    "tumor": i % 2,
                    "slide": number,
                    "center": centre,
                    "split": int(i == 2),
                }
            )
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


def write_nct_crc(folder: Path, train: int = 3, test: int = 2, classes: tuple[str, ...] = NCT_CRC_CLASSES) -> Path:
    """The two sets of NCT-CRC-HE, a folder of TIFF of 224 px for each class, and what macOS leaves beside them.

    Args:
        folder: The source folder of the recipe.
        train: Images of each class in NCT-CRC-HE-100K.
        test: Images of each class in CRC-VAL-HE-7K.
        classes: Those that there are.
    """
    rng = np.random.default_rng(0)
    for name, count in (("NCT-CRC-HE-100K", train), ("CRC-VAL-HE-7K", test)):
        for kind in classes:
            (folder / name / kind).mkdir(parents=True)
            for i in range(count):
                file = folder / name / kind / f"{kind}-{name[:3]}{i:03}.tif"
                Image.fromarray(blocks(rng, 7, 224)).save(file)
                file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
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
