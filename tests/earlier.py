"""Folders that an earlier version wrote, without checksums: a dataset, its latents and autoencoder, a cut-off run, a
model, an adapter and a feature cache, each as small as can be; and what reads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from latent_medi.diffusion.settings import ModelSettings
from latent_medi.training.settings import TrainSettings

FOLDER = Path(__file__).parent / "fixtures" / "earlier"


@contextmanager
def earlier(at: Path) -> Iterator[Path]:
    """A copy at ``at``, as the working folder: the paths in it are relative."""
    shutil.copytree(FOLDER, at)
    with chdir(at):
        yield at


def run_settings(**changes: Any) -> TrainSettings:
    """Of the run that was cut off at 4 of 8 images."""
    model = ModelSettings(
        block_out_channels=[4, 4], layers_per_block=1, attention=[False, False], norm_num_groups=2, attention_head_dim=4
    )
    values: dict[str, Any] = {
        "data": "data", "latents": "latents", "out": "run", "max_steps": 4, "global_batch": 2, "lr": 1e-2,
        "checkpoint_every_images": 4, "keep_checkpoints": 2, "log_every_images": 2, "split": "", "model": model,
        "autoencoder": "autoencoder",
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})
