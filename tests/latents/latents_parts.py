"""Tiny autoencoders and a tiny dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latent_medi.latents.taef2 import AutoencoderTAEF2
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writer import Patch, write_dataset


def random_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random autoencoder with few channels; 4× down (8× for TAEF2)."""
    torch.manual_seed(seed)
    if kind == "AutoencoderKL":
        return AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        ).eval()
    if kind == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        ).eval()
    return AutoencoderTAEF2(latent_channels=6, width=8, blocks=1).eval()


def random_images(count: int = 3, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_dataset(folder: Path, count: int = 10, per_shard: int = 4, size: int = 32, seed: int = 0) -> PatchDataset:
    """``count`` random patches of ``size`` px in shards of ``per_shard``."""
    patches = [
        Patch(f"k{i}", image, f"p{i // 2}", f"s{i // 2}", 0, 0, 0.5, {"class": "ab"[i % 2]})
        for i, image in enumerate(random_images(count, size, seed))
    ]
    schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"]}), "class")
    return write_dataset(folder, patches, "tiny", schema, size, 0.5, patches_per_shard=per_shard)
