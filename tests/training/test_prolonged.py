"""A run is prolonged by the same command with a larger length: what stays exact, what is said, what is kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.training import loop, run_folder, updates
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.loop import train
from latent_medi.training.optimizer import learning_rate
from latent_medi.training.settings import TrainSettings

Make = Callable[..., TrainSettings]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "schedule", [{"schedule": "constant"}, {"schedule": "inverse_sqrt", "decay_images": 80}], ids=["constant", "root"]
)
def test_a_finished_run_is_prolonged_to_what_a_long_one_gives(
    schedule: dict, run_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_settings(out=str(tmp_path / "whole"), max_steps=24, model={"dropout": 0.1}, **schedule)
    train(whole)
    short = replace(whole, out=str(tmp_path / "run"), max_steps=15)
    first = tensors(train(short))
    with caplog.at_level(logging.INFO, logger="latent_medi"):
        longer = replace(short, max_steps=0, max_images=190)  # 24 whole batches of 8
        folder = train(longer)
    assert "prolonged from 120 to 192 images, at 120." in caplog.text
    assert "exactly that of a run planned for 192 images" in caplog.text
    for part in ("model", "checkpoints/images-000000000192"):
        assert_same(tmp_path / "whole" / part, tmp_path / "run" / part)
    assert MediPipeline.from_pretrained(folder).provenance["images_seen"] == 192
    kept = tmp_path / "run" / "model-images-000000000120"
    assert all(torch.equal(tensor, first[name]) for name, tensor in tensors(kept).items())
    assert train(longer) == folder
    # It is not made shorter again.
    with pytest.raises(UserError, match="max_steps was 0 and is 15"):
        train(short)
    with pytest.raises(UserError, match="lr was"):
        train(replace(longer, max_images=400, lr=5e-4))


def cut_off(settings: TrainSettings, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clip = [0], updates.clip_gradients

    def interrupt(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == update:
            raise KeyboardInterrupt
        return clip(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(settings)


def test_a_running_run_is_prolonged_and_may_be_killed_again(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_settings(out=str(tmp_path / "whole"), max_steps=24, schedule="constant", warmup_images=40)
    train(whole)
    short = replace(whole, out=str(tmp_path / "run"), max_steps=15)
    cut_off(short, 12, monkeypatch)  # a checkpoint at 64 images
    longer = replace(short, max_steps=24)
    cut_off(longer, 5, monkeypatch)
    assert not (tmp_path / "run" / "model").exists()
    train(longer)
    assert_same(tmp_path / "whole" / "model", tmp_path / "run" / "model")
    assert not list((tmp_path / "run").glob("model-*"))


def test_a_kill_after_the_old_result_was_renamed_loses_nothing(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = run_settings(max_steps=4, schedule="constant")
    train(short)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_sealed", killed)
        with pytest.raises(KeyboardInterrupt):
            train(replace(short, max_steps=8))
    assert not (tmp_path / "run" / "model").exists()
    train(replace(short, max_steps=8))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "diffusion_loss", None)  # a single step would fail
        assert train(replace(short, max_steps=8)) == tmp_path / "run" / "model"
    kept = MediPipeline.from_pretrained(tmp_path / "run" / "model-images-000000000032")
    assert kept.provenance["images_seen"] == 32


def test_a_cosine_says_that_it_is_another_run(
    run_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = run_settings(max_steps=10)
    train(short)
    longer = replace(short, max_steps=40)
    with caplog.at_level(logging.WARNING, logger="latent_medi"):
        train(longer)
    rate = learning_rate(80, longer)
    assert rate > 0.8 * longer.lr
    assert f"the learning rate goes from 0 to {rate:.3g}" in caplog.text
    assert "cannot be prolonged exactly" in caplog.text
    assert checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][0] == 320


def test_a_warm_up_that_grows_with_the_length_is_told(run_settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    short = run_settings(max_steps=10, schedule="constant", warmup_fraction=0.5)
    train(short)
    with caplog.at_level(logging.WARNING, logger="latent_medi"):
        train(replace(short, max_steps=40))
    assert "goes from 0.001 to 0.0005 and rises until 160 images" in caplog.text


def test_a_finished_run_without_checkpoints_is_not_begun_again(run_settings: Make, tmp_path: Path) -> None:
    short = run_settings(max_steps=4, schedule="constant")
    model = train(short)
    first = tensors(model)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(short) == model  # of its own length it is finished all the same
    with pytest.raises(UserError, match="no whole checkpoint to continue from") as refused:
        train(replace(short, max_steps=8))
    assert f"init_from={model}" in refused.value.hint
    kept = tensors(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.items())
    # Nor is it where an earlier try has set the result aside.
    model.rename(tmp_path / "run" / "model-images-000000000032")
    with pytest.raises(UserError, match="no whole checkpoint to continue from"):
        train(replace(short, max_steps=8))
