"""What a training run leaves on the disk, told before, and its rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latent_medi.core.errors import UserError
from latent_medi.latents.autoencoder import load_autoencoder
from latent_medi.latents.info import read_info
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.estimate import rate
from latent_medi.training.estimate.disk import run_files
from latent_medi.training.estimate.measured import Measured
from latent_medi.training.estimate.step_cost import build_denoiser
from latent_medi.training.loop import train
from latent_medi.training.settings import EmaSettings, EstimateSettings, TrainSettings


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 3, "checkpoint_every_images": 8},
        {"max_steps": 5, "checkpoint_every_images": 0, "model": {"fields": []}},
        {
            "max_steps": 7,
            "keep_checkpoints": 5,
            "checkpoint_every_images": 20,
            "ema": EmaSettings(also=[0.05], snapshot_every_images=25),
        },
    ],
)
def test_the_files_of_a_run_have_the_size_that_was_told(
    run_settings: Callable[..., TrainSettings], values: dict
) -> None:
    settings = run_settings(**values)
    schema = PatchDataset.open(settings.data).schema
    autoencoder = load_autoencoder(read_info(Path(settings.latents))["autoencoder"]["source"])
    with torch.device("meta"):
        denoiser = build_denoiser(settings, (4, 8, 8), schema if settings.model.fields is None else None)
    told = run_files(settings, denoiser, autoencoder.model)
    out = train(settings).parent

    def written(folder: str) -> int:
        return sum(file.stat().st_size for file in (out / folder).rglob("*.safetensors"))

    assert (told.checkpoints, told.averages, told.model) == tuple(map(written, ("checkpoints", "averages", "model")))
    assert told.checkpoints > 0 < told.model
    # JSON and CSV files are small beside those of a real network, and here below 128 KiB.
    everything = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert told.total <= everything < told.total + 2**17


def test_a_rate_is_that_of_real_updates(run_settings: Callable[..., TrainSettings]) -> None:
    own = run_settings()
    settings = EstimateSettings(model=own.model, max_steps=1, global_batch=8)
    schema = PatchDataset.open(own.data).schema
    assert rate.training_rate(settings, (4, 8, 8), schema, "cpu", budget=0.5) > 0


def test_on_a_card_what_was_measured_counts_and_else_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EstimateSettings(max_steps=1, card="h100", precision="bf16", global_batch=2)
    settings.model.preset = "S"
    row = Measured("NVIDIA H100 80GB HBM3", "abc", "S", "bf16", False, 5400.0, 5.0)
    monkeypatch.setattr(rate, "read_measured", lambda: [row])
    found = rate.card_rate(settings, (4, 32, 32), None)
    assert found == rate.CardRate(5400.0, "NVIDIA H100 80GB HBM3")
    settings.compile = True
    told = rate.card_rate(settings, (4, 32, 32), None)
    assert told is not None
    assert told.origin == "estimate"
    # 15.8 GFLOP forward, three times that for an update: 35 % of 989 TFLOP/s.
    assert told.images_per_second == pytest.approx(0.35 * 989.4e12 / 47.4e9, rel=0.05)
    sampled = rate.card_rate(settings, (4, 32, 32), None, evaluations=60)
    assert sampled is not None
    assert sampled.images_per_second == pytest.approx(told.images_per_second * 3 / 60, rel=0.05)
    settings.card = "h101"
    with pytest.raises(UserError, match="h100"):
        rate.card_rate(settings, (4, 32, 32), None)
