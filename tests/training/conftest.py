"""A tiny dataset with latents, made through the real rooms, and settings of a tiny run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL

from latent_medi.diffusion.settings import ModelSettings
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writer import Patch, write_dataset
from latent_medi.training.settings import TrainSettings

N_PATCHES = 52  # no multiple of the batch, so that batches span epochs
TINY = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention": [False, True],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


def make_dataset(folder: Path, sites: tuple[str, ...], patches: int = N_PATCHES, seed: int = 0) -> PatchDataset:
    """Patches of 32 px, grey with noise, with a class, a site and an age that one in five lacks; the last patient is
    for testing."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "class": [("benign", "tumour")[i % 2] for i in range(patches)],
            "site": [sites[(i // 2) % len(sites)] for i in range(patches)],
            "age": ["unknown" if i % 5 == 0 else str(40 + i % 30) for i in range(patches)],
        }
    )
    schema = Schema.from_table(table, "class", ["site"], ["age"], {"age": "years"})
    items = [
        Patch(
            key=f"p{i:03d}",
            image=np.clip(rng.normal(70 + 60 * (i % 3), 12, (32, 32, 3)), 0, 255).astype(np.uint8),
            patient=f"patient{i // 4:02d}",
            slide=f"slide{i // 4:02d}",
            x=0,
            y=0,
            source_mpp=0.5,
            fields=row,
        )
        for i, row in enumerate(table.to_dict("records"))
    ]
    dataset = write_dataset(folder, items, "tiny", schema, 32, 0.5, patches_per_shard=20)
    last = dataset.index["patient"].iloc[-1]
    dataset.add_split("main", ["test" if p == last else "train" for p in dataset.index["patient"]], {"test": last})
    return PatchDataset.open(folder)


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    """A random AutoencoderKL, 4× down, 4 channels."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny"
    save_autoencoder(Autoencoder(model, "tiny"), folder)
    return load_autoencoder(str(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, autoencoder: Autoencoder) -> Path:
    """Folder with ``data`` and ``latents``; "NA" is one of the sites."""
    folder = tmp_path_factory.mktemp("tiny")
    make_dataset(folder / "data", ("aster", "NA", "birch"))
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder


@pytest.fixture(scope="session")
def tiny_more(tmp_path_factory: pytest.TempPathFactory, autoencoder: Autoencoder) -> Path:
    """As ``tiny`` with another hospital."""
    folder = tmp_path_factory.mktemp("tiny_more")
    make_dataset(folder / "data", ("aster", "cedar"), seed=1)
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder


@pytest.fixture
def run_settings(tiny: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of 40 updates in a fresh folder, with overrides."""

    def make(**values: Any) -> TrainSettings:
        model = ModelSettings(**{**TINY, **values.pop("model", {})})
        defaults: dict[str, Any] = {
            "data": str(tiny / "data"),
            "latents": str(tiny / "latents"),
            "out": str(tmp_path / "run"),
            "max_steps": 40,
            "global_batch": 8,
            "lr": 1e-3,
            "checkpoint_every_images": 64,
            "log_every_images": 40,
            "model": model,
        }
        return TrainSettings(**{**defaults, **values})

    return make
