"""Sources of public datasets in their true layout, small."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

DRAW = np.random.default_rng(0)


def picture(edge: int) -> np.ndarray:
    """Noise uint8 [edge, edge, 3]."""
    return DRAW.integers(0, 256, (edge, edge, 3), dtype=np.uint8)


def image_bytes(edge: int, kind: str) -> bytes:
    """A file of :func:`picture`; ``kind`` is Pillow's name of the format."""
    buffer = io.BytesIO()
    Image.fromarray(picture(edge)).save(buffer, kind)
    return buffer.getvalue()


def camelyon(folder: Path) -> Path:
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


def nct_crc(folder: Path) -> Path:
    """NCT-CRC-HE: two of its classes; three images of each for training, two for testing, and what macOS leaves."""
    for name, count in (("NCT-CRC-HE-100K", 3), ("CRC-VAL-HE-7K", 2)):
        for kind in ("ADI", "TUM"):
            (folder / name / kind).mkdir(parents=True)
            for i in range(count):
                (folder / name / kind / f"{kind}-AAA{i}.tif").write_bytes(image_bytes(224, "TIFF"))
                (folder / name / kind / f"._{kind}-AAA{i}.tif").write_bytes(b"\0\5\x16\7")  # as macOS leaves it
    return folder


def pannuke(folder: Path, count: int = 5) -> Path:
    """PanNuke: three folds of ``count`` patches of 256 px, at most five."""
    for fold in (1, 2, 3):
        target = folder / f"Fold {fold}" / "images" / f"fold{fold}"
        target.mkdir(parents=True)
        np.save(target / "images.npy", np.stack([picture(256) for _ in range(count)]).astype(np.float64))
        np.save(target / "types.npy", np.array(["Breast", "Colon", "Bile-duct", "Breast", "Skin"][:count]))
    return folder
