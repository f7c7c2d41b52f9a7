"""An autoencoder's training: it learns, survives kills and processes, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cluster_parts import free_port, launcher
from cluster_parts import start as start_command
from parts import make_autoencoder, random_model, small_model
from PIL import Image
from safetensors.torch import load_file

from latent_medi.autoencoder.data import measured_parts, open_pixels
from latent_medi.autoencoder.measure import COLUMNS, reconstructed
from latent_medi.autoencoder.settings import (
    AdversarialSettings,
    AutoencoderSettings,
    AuxiliarySettings,
    NewNetworkSettings,
)
from latent_medi.autoencoder.train import train_autoencoder
from latent_medi.cli import main
from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.files import read_json
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.experiment.verify_artefacts import verify_artefact
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.reconstruction_error import paired_kid, psnr
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import updates
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

Make = Callable[..., AutoencoderSettings]
EVERYTHING = {
    "classifier": AuxiliarySettings(0.1, network="test_vit"),
    "adversarial": AdversarialSettings(0.5, 40, channels=8, layers=2, rate=2.0),
    "kl": 1e-4,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an autoencoder with a posterior."""
    folder = tmp_path_factory.mktemp("start") / "autoencoder"
    save_autoencoder(make_autoencoder(), folder)
    return folder


@pytest.fixture
def make(tiny: Path, start: Path, tmp_path: Path) -> Make:
    """Settings of a run of 12 updates in a fresh folder, with overrides."""

    def settings(**values: Any) -> AutoencoderSettings:
        defaults: dict[str, Any] = {
            "data": str(tiny / "data"),
            "init": str(start),
            "out": str(tmp_path / "run"),
            "max_steps": 12,
            "global_batch": 8,
            "lr": 2e-3,
            "checkpoint_every_images": 32,
            "log_every_images": 24,
            "encoders": [],
            "measure": ["test"],
        }
        return AutoencoderSettings(**{**defaults, **values})

    return settings


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{k}": v for file in files for k, v in load_file(file).items()}


def assert_same_run(a: Path, b: Path) -> None:
    for part in ("autoencoder", "checkpoints"):
        ours, theirs = tensors(a / part), tensors(b / part)
        assert ours
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for file in ("log.csv", "evaluation.csv"):
        rows = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in read_log(o / file)] for o in (a, b)]
        assert rows[0] == rows[1], file


def relative_distance(a: Path, b: Path) -> float:
    ours, theirs = tensors(a / "autoencoder"), tensors(b / "autoencoder")
    difference = sum((ours[name] - theirs[name]).square().sum().item() for name in ours)
    return float((difference / sum(t.square().sum().item() for t in ours.values())) ** 0.5)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, update: int, error: type[BaseException]) -> None:
    rate, calls = updates.learning_rate, [0]

    def interrupt(*arguments: Any) -> float:
        calls[0] += 1
        if calls[0] == update:
            raise error("here")
        return rate(*arguments)

    monkeypatch.setattr(updates, "learning_rate", interrupt)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTAEF2"])
def test_reconstructions_get_better_and_are_measured(kind: str, make: Make, tmp_path: Path, tiny: Path) -> None:
    save_autoencoder(Autoencoder(random_model(kind), "random"), tmp_path / "start")
    others = {"training": str(tiny / "data")}
    chosen = make(init=str(tmp_path / "start"), max_steps=40, encoders=["demo"], lr=5e-3, others=others)
    found = train_autoencoder(replace(chosen, measure_every_images=160))
    rows = read_log(tmp_path / "run" / "evaluation.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["images"], row["part"], row["encoder"]) for row in rows] == [
        (images, part, encoder)
        for images in ("0", "160", "320")
        for part in ("test", "training")
        for encoder in ("demo", "demo:haematoxylin")
    ]
    begin, end = found["measured"][0], found["measured"][4]
    assert (begin["images"], end["images"], begin["part"], end["part"]) == (0, 320, "test", "test")
    assert end["psnr"] > begin["psnr"] + 2
    assert end["l1"] < begin["l1"]

    # The product is an autoencoder like any other, with a new hash; the numbers are those of its reconstructions.
    made = load_autoencoder(found["autoencoder"])
    assert made.kind == kind
    assert made.hash != load_autoencoder(tmp_path / "start").hash
    data = PatchDataset.open(tiny / "data")
    images = data.read(data.rows({"split_main": "test"}))
    decoded = made.decode(made.encode(images)[0])
    np.testing.assert_array_equal(decoded, reconstructed(made.model, images, torch.device("cpu")))
    assert psnr(images, decoded).mean() == pytest.approx(end["psnr"], abs=1e-4)
    encoder = load_encoder("demo")
    assert paired_kid(encoder.features([images]), encoder.features([decoded])) == pytest.approx(end["kid"], rel=1e-4)

    # Patches, reconstructions at the start, and now.
    picture = np.asarray(Image.open(tmp_path / "run" / "reconstructions" / "test-images-000000000320.png"))
    assert picture.shape == (3 * 32, 4 * 32, 3)
    first = load_autoencoder(tmp_path / "start")
    columns = [np.concatenate(list(x), 1) for x in (images, first.decode(first.encode(images)[0]), decoded)]
    # Weights elsewhere in memory may round differently.
    assert np.abs(picture.astype(int) - np.concatenate(columns)).max() <= 1
    assert verify_artefact(tmp_path / "run") == "run"
    assert verify_artefact(Path(found["autoencoder"])) == "autoencoder"
    provenance = read_json(Path(found["autoencoder"]) / "provenance.json")
    assert provenance["source"] == first.hash
    assert provenance["images_seen"] == 320


def test_a_killed_run_continues_with_the_numbers_of_an_unbroken_one(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(**EVERYTHING, average_width=0.1, out=str(tmp_path / "whole"))
    train_autoencoder(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    for update in (3, 7):  # before the first checkpoint, and after the discriminator has begun
        with monkeypatch.context() as patch:
            interrupt_at(patch, update, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                train_autoencoder(torn)
    train_autoencoder(torn)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    assert train_autoencoder(torn)["autoencoder"] == str(tmp_path / "torn" / "autoencoder")  # finished: at once


def test_a_stopped_run_saves_first(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, torn = make(out=str(tmp_path / "whole")), make(out=str(tmp_path / "torn"), checkpoint_every_images=0)
    train_autoencoder(replace(whole, checkpoint_every_images=0))
    agreed = updates.listening

    class Notice:
        given = "SIGTERM"

        def agreed(self, _: Any, step: int) -> bool:
            return step == 4

    class Listening:
        def __enter__(self) -> Notice:
            return Notice()

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(updates, "listening", Listening)
    with pytest.raises(Preempted):
        train_autoencoder(torn)
    monkeypatch.setattr(updates, "listening", agreed)
    train_autoencoder(torn)
    ours, theirs = (tensors(tmp_path / name / "autoencoder") for name in ("whole", "torn"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_result_does_not_depend_on_the_device_batch(make: Make, tmp_path: Path) -> None:
    train_autoencoder(make(**EVERYTHING, out=str(tmp_path / "one"), betas=(0.9, 0.99)))
    train_autoencoder(make(**EVERYTHING, out=str(tmp_path / "parts"), device_batch=3))
    assert relative_distance(tmp_path / "one", tmp_path / "parts") < 1e-4


@pytest.mark.slow
def test_two_processes_train_the_same_autoencoder(make: Make, tmp_path: Path) -> None:
    one = make(**EVERYTHING, out=str(tmp_path / "one"))
    train_autoencoder(one)
    words = ["--config", str(tmp_path / "one" / "settings.yaml"), f"out={tmp_path / 'two'}"]
    command = [*launcher(2, free_port(), module="accelerate.commands.launch"), "-m", "latent_medi.cli", "autoencoder"]
    errors = tmp_path / "errors"
    process = start_command([*command, *words], errors)
    assert process.wait(timeout=300) == 0, errors.read_text()
    assert relative_distance(tmp_path / "one", tmp_path / "two") < 1e-5
    for file in ("log.csv", "evaluation.csv"):
        ours, theirs = (read_log(tmp_path / name / file) for name in ("one", "two"))
        for column in {"images", "loss", "l1", "adversarial", "psnr", "n"} & set(ours[0]):
            assert [float(row[column]) for row in ours] == pytest.approx(
                [float(row[column]) for row in theirs], rel=1e-3
            )


def test_shares_of_the_processes_are_the_batch(make: Make) -> None:
    data = open_pixels(make(**EVERYTHING, crop=16), 4, 4)
    whole = data.batch(3, 8, 5, 0, DropoutSettings(), 0, 1)
    assert whole.images.shape == (8, 16, 16, 3)
    assert whole.noise.shape == (8, 4, 4, 4)
    for rank in range(2):
        share = data.batch(3, 8, 5, 0, DropoutSettings(), rank, 2)
        assert torch.equal(share.images, whole.images[rank::2])
        assert torch.equal(share.noise, whole.noise[rank::2])
        assert torch.equal(share.labels, whole.labels[rank::2])
    plain = open_pixels(make(symmetries=False), 4, 0).batch(3, 8, 5, 0, DropoutSettings(), 0, 1)
    rows = data.rows[data.at(3, 8, 5)]
    np.testing.assert_array_equal(plain.images.numpy(), data.dataset.read(rows))
    assert plain.noise.numel() == 0


def test_the_decoder_alone_leaves_the_encoder_as_it_is(make: Make, start: Path, tiny: Path, tmp_path: Path) -> None:
    found = train_autoencoder(make(train="decoder"))
    before, after = load_autoencoder(start), load_autoencoder(found["autoencoder"])
    changed = [
        name
        for (name, a), b in zip(before.model.state_dict().items(), after.model.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in changed)

    # It takes the latents that were encoded before, in every place that compares hashes; and keeps saying so.
    assert after.latents_of == [before.hash]
    latents = tmp_path / "latents"
    encode_dataset(tiny / "data", before, latents)
    encode_dataset(tiny / "data", after, latents)
    trained = TrainSettings(
        data=str(tiny / "data"),
        latents=str(latents),
        autoencoder=found["autoencoder"],
        out=str(tmp_path / "model"),
        max_steps=2,
        global_batch=4,
        model=small_model(),
    )
    model = train(trained)
    pipeline = MediPipeline.from_pretrained(model)
    assert pipeline.autoencoder.hash == after.hash
    train(replace(trained, autoencoder="", init_from=str(model), out=str(tmp_path / "longer")))
    original = train(replace(trained, autoencoder=str(start), out=str(tmp_path / "original")))
    other = MediPipeline.from_pretrained(original, autoencoder=found["autoencoder"])
    assert other.autoencoder.hash == after.hash
    further = train_autoencoder(make(train="decoder", init=found["autoencoder"], out=str(tmp_path / "further")))
    assert load_autoencoder(further["autoencoder"]).latents_of == [after.hash, before.hash]
    both = train_autoencoder(make(init=found["autoencoder"], out=str(tmp_path / "both")))
    assert load_autoencoder(both["autoencoder"]).latents_of == []
    with pytest.raises(UserError, match="is another"):
        MediPipeline.from_pretrained(original, autoencoder=both["autoencoder"])


def test_latents_of_the_autoencoder_before_are_refused(make: Make, start: Path, tiny: Path, tmp_path: Path) -> None:
    found = train_autoencoder(make())
    latents = tmp_path / "latents"
    encode_dataset(tiny / "data", load_autoencoder(start), latents)
    with pytest.raises(UserError, match="another autoencoder"):
        encode_dataset(tiny / "data", load_autoencoder(found["autoencoder"]), latents)


def test_random_weights_and_a_discriminator(make: Make, tmp_path: Path) -> None:
    network = NewNetworkSettings("AutoencoderKL", [8, 16], 1, 3, 4)
    chosen = make(**EVERYTHING, init="", network=network, max_steps=30)
    found = train_autoencoder(chosen)
    made = load_autoencoder(found["autoencoder"])
    assert (made.factor, made.latent_channels) == (2, 3)
    assert found["measured"][-1]["psnr"] > found["measured"][0]["psnr"] + 0.5
    log = read_log(tmp_path / "run" / "log.csv")
    assert float(log[-1]["discriminator"]) > 0
    with pytest.raises(UserError, match=r"network\.layers was 1 and is 2"):
        train_autoencoder(replace(chosen, network=replace(network, layers=2)))


def test_average_of_the_weights_is_what_is_measured_and_kept(make: Make, tmp_path: Path) -> None:
    train_autoencoder(make(out=str(tmp_path / "averaged"), average_width=0.1, **EVERYTHING))
    train_autoencoder(make(out=str(tmp_path / "last"), **EVERYTHING))
    newest = sorted((tmp_path / "averaged" / "checkpoints").iterdir())[-1]
    averages = load_file(newest / "ema.safetensors")
    kept = load_file(tmp_path / "averaged" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], averages[f"autoencoder.{name}"]) for name in kept)
    assert 0 < relative_distance(tmp_path / "averaged", tmp_path / "last") < 0.5


def test_parts_that_are_measured(make: Make, tiny: Path, tiny_more: Path) -> None:
    chosen = make(
        measure=["train", "val", "test"], others={"more": str(tiny_more / "data")}, measure_patches=20, crop=8
    )
    data = open_pixels(chosen, 4, 4)
    parts = {part.name: part for part in measured_parts(chosen, data, 4)}
    assert list(parts) == ["train", "test", "more"]  # nothing validates
    assert [len(part.rows) for part in parts.values()] == [20, 4, 20]
    dataset = data.dataset
    assert set(dataset.index["split_main"].iloc[parts["test"].rows]) == {"test"}
    middle = dataset.read(parts["test"].rows)[:, 12:20, 12:20]
    np.testing.assert_array_equal(parts["test"].read(slice(None)), middle)
    one = replace(chosen, only={"class": ["benign"]}, measure=["test"])
    rows = measured_parts(one, open_pixels(one, 4, 4), 4)[0].rows
    assert set(dataset.index["class"].iloc[rows]) == {"benign"}


def test_what_cannot_be_followed_is_refused(make: Make, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for values, message in (
        ({"init": "", "train": "decoder"}, "train=decoder needs an autoencoder"),
        ({"l1": 0.0}, "no term compares"),
        ({"l1": 0.0, **EVERYTHING}, "relative to the gradient"),
        ({"max_images": 8}, "give max_images or max_steps"),
        ({"crop": 30}, "multiple of 4 px, not 30"),
        ({"crop": 64}, "larger than the patches"),
        ({"crop": 24, "classifier": AuxiliarySettings(0.1, network="test_vit")}, "classifier does not take .* 24 px"),
        ({"split_value": "val"}, "has no row in 'val'"),
        ({"only": {"class": ["benign"]}, **EVERYTHING}, "1 values of class"),
        ({"classifier": AuxiliarySettings(0.1, field="age")}, "is a number"),
        ({"measure": ["test"], "others": {"test": str(tiny / "data")}}, "both name test"),
    ):
        with pytest.raises(UserError, match=message):
            train_autoencoder(make(**values))
    assert main(["autoencoder", f"data={tiny / 'data'}", "init=nothing", "out=x", "max_steps=1"]) == 2
    assert "There is no autoencoder 'nothing'" in capsys.readouterr().err


def test_a_run_is_not_continued_with_other_settings(make: Make) -> None:
    chosen = make()
    train_autoencoder(chosen)
    with pytest.raises(UserError, match=r"l2 was 0\.0 and is 1\.0"):
        train_autoencoder(replace(chosen, l2=1.0))
    with pytest.raises(UserError, match="the training data changed"):
        train_autoencoder(replace(chosen, only={"class": ["benign"]}, classifier=replace(chosen.classifier)))
    assert train_autoencoder(replace(chosen, measure=[], device_batch=2, keep_checkpoints=1))["patches"] == 48
