"""A disk that fills while training: one clear error, what was finished stays, and the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from latent_medi.cli import main
from latent_medi.training import updates
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.settings import TrainSettings


def test_a_full_disk_keeps_the_checkpoints_and_a_rerun_with_room_goes_on(
    run_settings: Callable[..., TrainSettings],
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(run_settings())))
    words = ["train", "--config", str(tmp_path / "run.yaml")]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    [(_, newest), *_] = reversed(checkpoint_folders(tmp_path / "whole" / "checkpoints"))
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    out = small_disk / "run"
    subprocess.run(["mount", "-o", f"remount,size={round(1.5 * size)}", str(small_disk)], check=True)
    capsys.readouterr()
    assert main([*words, f"out={out}"]) == 2
    error = capsys.readouterr().err
    assert "The disk is full" in error
    assert str(out) in error
    assert "Traceback" not in error
    assert [images for images, _ in checkpoint_folders(out / "checkpoints")] == [64]
    assert not list(out.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(small_disk)], check=True)
    rates: list[int] = []
    real = updates.learning_rate
    monkeypatch.setattr(updates, "learning_rate", lambda images, *rest: (rates.append(images), real(images, *rest))[1])
    assert main([*words, f"out={out}"]) == 0
    assert min(rates) >= 64  # images: what was trained before was not trained again
    for file in (tmp_path / "whole" / "model").rglob("*.safetensors"):
        again = load_file(out / "model" / file.relative_to(tmp_path / "whole" / "model"))
        assert all(bool((tensor == again[name]).all()) for name, tensor in load_file(file).items())
