"""The distance of previews to training patches, and the model of the best one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from parts import random_images
from safetensors.torch import load_file
from test_loop import two_processes
from test_prolonged import assert_same, cut_off

from latent_medi.core.errors import UserError
from latent_medi.diffusion.adapters import open_adapter
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.log import CsvLog, read_log
from latent_medi.training.loop import train
from latent_medi.training.preview import Previews
from latent_medi.training.preview_distance import PatchDistance
from latent_medi.training.settings import LoraSettings, TrainSettings

Make = Callable[..., TrainSettings]
SCRIPTED = {40: 0.3, 80: 0.1, 120: 0.2, 160: float("nan")}


@pytest.fixture
def watched(run_settings: Make) -> Callable[..., TrainSettings]:
    """Settings of a run of 20 updates with four previews in the features of the demo's encoder."""

    def make(**values: object) -> TrainSettings:
        defaults = {"max_steps": 20, "preview_every_images": 40, "preview_images": 20, "preview_steps": 2}
        defaults |= {"checkpoint_every_images": 40, "keep_checkpoints": 9}
        return run_settings(**{**defaults, "preview_encoder": "demo", **values})

    return make


def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Previews measure what the script says."""
    make = Previews.make
    monkeypatch.setattr(Previews, "make", lambda self, n, model: make(self, n, model)._replace(kid=SCRIPTED[n]))


def test_the_distance_is_the_kernel_distance_by_its_definition(
    tiny: Path, watched: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, encoder, rows = PatchDataset.open(tiny / "data"), load_encoder("demo"), np.array([0, 1, 5, 9, 21, 30])
    images = random_images(7, 32, seed=4)
    x, y = (encoder.features([part]).astype(float) for part in (dataset.read(rows), images))
    who = dataset.index["patient"].to_numpy()[rows]

    def mean(a: np.ndarray, b: np.ndarray, kept: Callable[[int, int], bool]) -> float:
        pairs = [(a[i] @ b[j] / len(a[i]) + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if kept(i, j)]
        return sum(pairs) / len(pairs)

    other = mean(x, x, lambda i, j: who[i] != who[j]) + mean(y, y, lambda i, j: i != j)
    expected = other - 2 * mean(x, y, lambda i, j: True)
    distance = PatchDistance(watched(), rows, Accelerator())
    assert distance.measure(images) == pytest.approx(expected, rel=1e-5)
    # Where a GPU's memory is full it is measured all the same.
    features, failed = ImageEncoder.features, []

    def full(self: ImageEncoder, batches: list[np.ndarray], device: object = None) -> np.ndarray:
        if not failed:
            failed.append(device)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(self, batches, device)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageEncoder, "features", full)
    assert distance.measure(images) == pytest.approx(expected, rel=1e-5)
    assert failed


def test_the_best_is_kept_as_it_was(watched: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch)
    train(watched())
    rows = read_log(tmp_path / "run" / "previews.csv")
    assert [(int(row["images"]), row["encoder"], row["n"]) for row in rows] == [(n, "demo", "20") for n in SCRIPTED]
    best = MediPipeline.from_pretrained(tmp_path / "run" / "best" / "model")
    assert best.provenance["images_seen"] == 80
    assert best.provenance["preview"] == {"encoder": "demo", "kid": 0.1, "samples": 20}
    then = load_file(tmp_path / "run" / "checkpoints" / "images-000000000080" / "ema.safetensors")
    assert all(torch.equal(tensor, then[name]) for name, tensor in best.denoiser.state_dict().items())


def test_the_best_of_an_adapter_is_kept_as_an_adapter(
    watched: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = train(watched(out=str(tmp_path / "base"), max_steps=2, preview_every_images=0, preview_encoder=""))
    scripted(monkeypatch)
    train(watched(init_from=str(base), lora=LoraSettings(rank=2)))
    best = open_adapter(tmp_path / "run" / "best" / "adapter")
    facts = json.loads((tmp_path / "run" / "best" / "adapter" / "adapter.json").read_text())
    assert (facts["provenance"]["images_seen"], facts["provenance"]["preview"]["kid"]) == (80, 0.1)
    then = load_file(tmp_path / "run" / "checkpoints" / "images-000000000080" / "ema.safetensors")
    assert best.weights
    for name, tensor in best.weights.items():
        assert torch.equal(tensor, then[f"unet.{name}".replace(".weight", ".default.weight")])


def test_measuring_leaves_the_training_as_it_is(watched: Make, tmp_path: Path) -> None:
    plain = watched(out=str(tmp_path / "plain"), preview_every_images=0, preview_encoder="", model={"dropout": 0.1})
    train(plain)
    train(watched(model={"dropout": 0.1}))
    assert_same(tmp_path / "plain" / "model", tmp_path / "run" / "model")
    distances = [float(row["kid"]) for row in read_log(tmp_path / "run" / "previews.csv")]
    assert all(np.isfinite(distances))
    assert len(set(distances)) == 4


def test_a_kill_at_a_preview_loses_neither_its_row_nor_the_best(
    watched: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch)
    whole = watched(out=str(tmp_path / "whole"))
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the checkpoint of 40 images, before their preview
        patch.setattr(Previews, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            train(torn)
    with monkeypatch.context() as patch:  # after the best was written, before its row
        write = CsvLog.write
        at = {"previews.csv": 80}
        patch.setattr(
            CsvLog, "write", lambda log, rows: killed() if at.get(log.path.name) == rows[0][0] else write(log, rows)
        )
        with pytest.raises(KeyboardInterrupt):
            train(torn)
    cut_off(torn, 3, monkeypatch)
    train(torn)
    rows = [read_log(tmp_path / name / "previews.csv") for name in ("whole", "torn")]
    assert rows[0] == rows[1]
    for part in ("model", "best/model"):
        assert_same(tmp_path / "whole" / part, tmp_path / "torn" / part)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preview_every_images": 0}, "preview_encoder measures previews"),
        ({"preview_encoder": "", "preview_weights": "x"}, "preview_weights needs preview_encoder"),
        ({"preview_encoder": "demoo"}, "There is no encoder 'demoo'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(
    values: dict, words: str, watched: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(watched(**values))
    assert not read_log(tmp_path / "run" / "log.csv")


@pytest.mark.slow
def test_two_processes_measure_the_same_and_keep_the_same(watched: Make, tmp_path: Path) -> None:
    one = watched(out=str(tmp_path / "one"))
    train(one)
    two_processes(replace(one, out=str(tmp_path / "two")), 29513)
    ours, theirs = (read_log(tmp_path / name / "previews.csv") for name in ("one", "two"))
    assert [row["images"] for row in ours] == [row["images"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["kid"]) == pytest.approx(float(b["kid"]), rel=1e-3)
    best = [MediPipeline.from_pretrained(tmp_path / name / "best" / "model") for name in ("one", "two")]
    assert best[0].provenance["images_seen"] == best[1].provenance["images_seen"]
    for name, tensor in best[0].denoiser.state_dict().items():
        torch.testing.assert_close(tensor, best[1].denoiser.state_dict()[name], rtol=1e-3, atol=1e-5)
