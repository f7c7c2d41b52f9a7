"""Latents that a classifier can learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from parts import make_autoencoder

from latent_medi.latents.autoencoder import load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset

COLOURS = {"benign": (150, 80, 110), "solid": (90, 120, 150), "spindle": (110, 110, 60)}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour, four unknown patches, other patients for testing; unbalanced."""
    folder = tmp_path_factory.mktemp("coloured")
    random = make_autoencoder()
    with torch.no_grad():  # as of a trained autoencoder, whose posterior is narrow
        random.model.quant_conv.bias[4:] = -8.0
    save_autoencoder(random, folder / "autoencoder")
    autoencoder = load_autoencoder(str(folder / "autoencoder"))
    rng = np.random.default_rng(0)
    names = ["benign"] * 60 + ["solid"] * 30 + ["spindle"] * 30 + ["unknown"] * 4
    table = pd.DataFrame({"class": names, "site": [("a", "b")[i % 2] for i in range(len(names))]})
    colours = {**COLOURS, "unknown": (128, 128, 128)}
    items = [
        Patch(
            key=f"p{i:03d}",
            image=np.clip(rng.normal(colours[row["class"]], 12, (32, 32, 3)), 0, 255).astype(np.uint8),
            patient=f"patient{i // 2:02d}",
            slide=f"slide{i // 2:02d}",
            x=0,
            y=0,
            source_mpp=0.5,
            fields=row,
        )
        for i, row in enumerate(table.to_dict("records"))
    ]
    schema = Schema.from_table(table, "class", ["site"])
    dataset = write_dataset(folder / "data", items, "coloured", schema, 32, 0.5, patches_per_shard=40)
    parts = ["test" if i // 2 % 3 == 0 else "train" for i in range(len(names))]
    dataset.add_split("main", parts, {"scheme": "by hand"})
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder
