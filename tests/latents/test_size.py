"""What encoding writes, told before."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from parts import random_model

from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.size import autoencoder_weights, latent_kind, latents_bytes, open_autoencoder
from latent_medi.shards.dataset import PatchDataset


@pytest.mark.parametrize(("kind", "views"), [("AutoencoderKL", 1), ("AutoencoderTiny", 8), ("AutoencoderTAEF2", 1)])
def test_the_size_of_the_latents_is_exact(tiny: Path, tmp_path: Path, kind: str, views: int) -> None:
    autoencoder = Autoencoder(random_model(kind), "random")
    encode_dataset(tiny / "data", autoencoder, tmp_path / "latents", views=views)
    dataset = PatchDataset.open(tiny / "data")
    known = latent_kind("random", autoencoder)
    assert known is not None
    counts = [shard["count"] for shard in dataset.info["shards"]]
    written = sum(file.stat().st_size for file in (tmp_path / "latents").rglob("*.safetensors"))
    assert latents_bytes(known, dataset.patch_size, counts, views) == written


def test_an_autoencoder_of_the_hub_is_looked_for_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    absent = autoencoder_weights("sd-vae-ft-mse")
    assert (absent.hub_id, absent.found) == ("stabilityai/sd-vae-ft-mse", False)
    assert open_autoencoder("sd-vae-ft-mse") is None
    kind = latent_kind("sd-vae-ft-mse", None)
    assert kind is not None
    assert kind.shape(256) == (4, 32, 32)
    assert latent_kind("somebody/something", None) is None
    assert autoencoder_weights("demo").found
    assert not autoencoder_weights("no such name").found
    # As the hub's client stores it.
    stored = tmp_path / "models--stabilityai--sd-vae-ft-mse"
    (stored / "snapshots" / "abc").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    (stored / "snapshots" / "abc" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert autoencoder_weights("sd-vae-ft-mse").found
