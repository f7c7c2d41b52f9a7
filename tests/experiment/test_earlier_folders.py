"""Folders of an earlier version, which have no checksums, open with one warning each, and can be given some."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier import earlier, run_settings
from safetensors.torch import load_file

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.store import LatentStore
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.loop import train

NOTICED = "would not be noticed"
FOLDERS = ("latents", "model", "adapter", "run")


def unsealed(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often each path of this program's models and latents was told to have no checksums."""
    told = [r.getMessage() for r in caplog.records if NOTICED in r.getMessage()]
    caplog.clear()
    return Counter(text.split(" has no checksums")[0] for text in told if " has no checksums" in text)


def test_they_open_with_one_warning_each_and_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with earlier(tmp_path / "w") as folder, caplog.at_level("WARNING", logger="latent_medi"):
        before = load_file("model/unet/diffusion_pytorch_model.safetensors")
        for _ in range(2):
            store = LatentStore(folder / "latents", "mmap")
            assert store.moments([0, 5])[0].shape == (2, 2, 4, 4)
        assert unsealed(caplog) == {str(folder / "latents"): 1}
        for _ in range(2):
            pipe = MediPipeline.from_pretrained(folder / "model")
            assert pipe(class_="a", seed=3, steps=2, output_type="np").images.shape == (1, 8, 8, 3)
        assert unsealed(caplog) == {str(folder / "model"): 1}
        pipe.load_adapter(folder / "adapter")
        assert unsealed(caplog) == {str(folder / "adapter"): 1}
        found = cached_features(
            PatchDataset.open(folder / "data"), np.arange(6), load_encoder("demo"), folder / "features"
        )
        (cache,) = (folder / "features").iterdir()
        assert found.shape == (6, 48)
        assert unsealed(caplog) == {str(cache): 1}
        # The run goes on where it was cut off, and ends as it did when it was not.
        train(run_settings(out=str(folder / "run")))
        assert unsealed(caplog)[str(folder / "run/checkpoints/images-000000000004")] == 1
        after = load_file("run/model/unet/diffusion_pytorch_model.safetensors")
        assert all(torch.allclose(after[name], value, rtol=1e-4, atol=1e-6) for name, value in before.items())


def test_they_can_be_given_checksums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with earlier(tmp_path / "w") as folder, caplog.at_level("WARNING", logger="latent_medi"):
        for name in FOLDERS:
            assert main(["shards", "verify", str(folder / name), "seal=true"]) == 0
            assert "checksums added" in capsys.readouterr().out
        caplog.clear()
        LatentStore(folder / "latents")
        MediPipeline.from_pretrained(folder / "model").load_adapter(folder / "adapter")
        train(run_settings(out=str(folder / "run"), max_steps=4))
        assert not {str(folder / name) for name in FOLDERS} & set(unsealed(caplog))
        for name, file in (
            ("latents", "data/part-000001.safetensors"),
            ("model", "unet/diffusion_pytorch_model.safetensors"),
            ("adapter", "adapter_model.safetensors"),
            ("run", "checkpoints/images-000000000008/ema.safetensors"),
        ):
            data = bytearray((folder / name / file).read_bytes())
            data[-3] ^= 4
            (folder / name / file).write_bytes(data)
            assert main(["shards", "verify", str(folder / name)]) == 2
            assert Path(file).name in capsys.readouterr().err


def test_damaged_latents_are_not_given_checksums(tmp_path: Path) -> None:
    from latent_medi.latents.info import seal_latents

    with earlier(tmp_path / "w") as folder:
        data = bytearray((folder / "latents/data/part-000000.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "latents/data/part-000000.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="part-000000"):
            seal_latents(folder / "latents")
        assert "seal" not in (folder / "latents/latents.json").read_text()
