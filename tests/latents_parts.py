"""A tiny dataset of random patches."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from parts import random_images

from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset


def make_dataset(folder: Path, count: int = 10, per_shard: int = 4, size: int = 32, seed: int = 0) -> PatchDataset:
    """``count`` random patches of ``size`` px in shards of ``per_shard``."""
    patches = [
        Patch(f"k{i}", image, f"p{i // 2}", f"s{i // 2}", 0, 0, 0.5, {"class": "ab"[i % 2]})
        for i, image in enumerate(random_images(count, size, seed))
    ]
    schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"]}), "class")
    return write_dataset(folder, patches, "tiny", schema, size, 0.5, patches_per_shard=per_shard)
