"""Small real parts that tests of several rooms build on: a tiny network, random autoencoders, images, a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from latent_medi.core.files import read_sealed, sha256_file, write_sealed
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.taef2 import AutoencoderTAEF2
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import INDEX_FILE, INFO_FILE, PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset


def put_index(folder: Path, index: pd.DataFrame) -> None:
    """Another index for a dataset folder, its hash recorded, as if the dataset had been written with it."""
    index.to_parquet(folder / INDEX_FILE, index=False)
    info, _ = read_sealed(folder / INFO_FILE, "")
    write_sealed(folder / INFO_FILE, {**info, "index_sha256": sha256_file(folder / INDEX_FILE)})


def small_model() -> ModelSettings:
    """A network of 0.2 M parameters for latents of 8×8."""
    return ModelSettings(
        block_out_channels=[16, 32],
        layers_per_block=1,
        attention=[False, True],
        attention_head_dim=16,
        norm_num_groups=8,
    )


def random_model(kind: str = "AutoencoderKL", seed: int = 0) -> torch.nn.Module:
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
    if kind == "AutoencoderDC":
        return AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        ).eval()
    return AutoencoderTAEF2(latent_channels=6, width=8, blocks=1).eval()


def make_autoencoder(seed: int = 0) -> Autoencoder:
    """A random ``AutoencoderKL`` with 4 channels, 4× down."""
    return Autoencoder(random_model("AutoencoderKL", seed), "random")


def stable_diffusion_vae(folder: Path, seed: int = 0, widths: tuple[int, ...] = (128, 256, 512, 512)) -> Path:
    """A folder with a random autoencoder of the architecture of ``stabilityai/sd-vae-ft-mse``, value by value of its
    config.json: 83.7 M parameters, 4 latent channels, 8× down. Other ``widths`` make a smaller one."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        act_fn="silu",
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        in_channels=3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=min(32, widths[0]),
        out_channels=3,
        sample_size=256,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    model.save_pretrained(folder)
    return folder


def random_images(count: int = 3, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_cohort(
    folder: Path, sites: tuple[str, ...], patches: int = 52, seed: int = 0, patches_per_shard: int = 20
) -> PatchDataset:
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
    dataset = write_dataset(folder, items, "tiny", schema, 32, 0.5, patches_per_shard=patches_per_shard)
    last = dataset.index["patient"].iloc[-1]
    dataset.add_split("main", ["test" if p == last else "train" for p in dataset.index["patient"]], {"test": last})
    return PatchDataset.open(folder)
