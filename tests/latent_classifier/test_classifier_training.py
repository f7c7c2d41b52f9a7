"""The classifier's training: it learns at every noise level, survives kills and processes, and refuses what it cannot
do."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from parts import make_cohort, put_index, small_model
from safetensors.torch import load_file

from latent_medi.cli import main
from latent_medi.core.errors import Preempted, UserError
from latent_medi.diffusion.objective import Objective
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latent_classifier import train as trainer
from latent_medi.latent_classifier.data import open_parts
from latent_medi.latent_classifier.network import LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.latent_classifier.scores import score, timestep_buckets
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latent_classifier.train import train_classifier
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.launch import make_accelerator
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import run_folder, updates
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

Make = Callable[..., ClassifierSettings]


@pytest.fixture
def make(coloured: Path, tmp_path: Path) -> Make:
    """Settings of a run of 30 updates in a fresh folder, with overrides."""

    def settings(**values: Any) -> ClassifierSettings:
        defaults: dict[str, Any] = {
            "data": str(coloured / "data"),
            "latents": str(coloured / "latents"),
            "out": str(tmp_path / "run"),
            "max_steps": 30,
            "global_batch": 16,
            "lr": 2e-3,
            "checkpoint_every_images": 128,
            "log_every_images": 80,
            "network": EncoderSettings([16, 32], 1, attention_head_dim=16, norm_num_groups=8),
        }
        return ClassifierSettings(**{**defaults, **values})

    return settings


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {f"{f.relative_to(out)}:{k}": v for f in sorted(out.rglob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = tensors(a / "classifier"), tensors(b / "classifier")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    last = sorted((a / "checkpoints").iterdir())[-1].name
    ours, theirs = tensors(a / "checkpoints" / last), tensors(b / "checkpoints" / last)
    assert any("optimizer" in name for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for file in ("log.csv", "evaluation.csv"):
        rows = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in read_log(o / file)] for o in (a, b)]
        assert rows[0] == rows[1], file


def interrupt_at(update: int, error: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """A stand-in for ``clip_gradients`` that does its work, and something else at an update."""
    calls, clip = [0], updates.clip_gradients

    def interrupt(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == update:
            error()
        return clip(*arguments)

    return interrupt


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassifierSettings, dict[str, Any]]:
    """A run that has learned, and what it told."""
    settings = ClassifierSettings(
        data=str(coloured / "data"),
        latents=str(coloured / "latents"),
        out=str(tmp_path_factory.mktemp("trained") / "run"),
        max_steps=250,
        global_batch=16,
        lr=2e-3,
        evaluate_every_images=2000,
        network=EncoderSettings([16, 32], 1, attention_head_dim=16, norm_num_groups=8),
    )
    return settings, train_classifier(settings)


def test_it_sees_through_noise_the_less_the_more_there_is(trained) -> None:
    _, told = trained
    f1 = [row["f1"] for row in told["scores"]]
    assert [row["timesteps"] for row in told["scores"]] == [f"{100 * i}-{100 * i + 99}" for i in range(10)] + ["all"]
    assert np.mean(f1[:3]) > 0.6  # hardly any noise; a third is chance
    assert np.mean(f1[:3]) > np.mean(f1[4:7]) + 0.05
    assert np.mean(f1[4:7]) > np.mean(f1[8:10]) + 0.05
    assert np.mean(f1[8:10]) < 0.45  # hardly anything else
    losses = [row["loss"] for row in told["scores"]]
    assert np.mean(losses[:3]) < np.mean(losses[4:7]) < np.mean(losses[8:10])
    # Where it knows nothing it says so (log 3 is 1.1): a confident gradient would lead anywhere.
    assert losses[9] < 1.25
    for row in told["scores"][:-1]:
        assert row["n"] == 40
    assert told["scores"][-1]["n"] == 400


def test_on_clean_latents_alone_it_does_not_learn_to_see_through_noise(trained, make: Make) -> None:
    _, aware = trained
    clean = train_classifier(make(max_steps=250, noise_aware=False))
    of = {kind: {row["timesteps"]: row for row in found["scores"]} for kind, found in (("a", aware), ("c", clean))}
    assert of["c"]["0-99"]["f1"] > of["a"]["0-99"]["f1"] - 0.1  # hardly any noise
    assert of["c"]["500-599"]["loss"] > of["a"]["500-599"]["loss"] + 0.3
    assert of["c"]["900-999"]["loss"] > of["a"]["900-999"]["loss"] + 0.5  # sure of what it cannot know


def test_clean_latents_come_with_timestep_zero_and_their_whitening(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = LatentEncoder.forward

    def watched(self: LatentEncoder, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.append((x.detach(), t))
        return forward(self, x, t)

    monkeypatch.setattr(LatentEncoder, "forward", watched)
    train_classifier(make(noise_aware=False))
    assert len(seen) == 30
    assert all((t == 0).all() for _, t in seen)
    values = torch.cat([x for x, _ in seen])  # whitened, and nothing added: a variance of 1 by channel
    torch.testing.assert_close(values.var((0, 2, 3)), torch.ones(values.shape[1]), rtol=0.15, atol=0)


def test_it_knows_how_noisy_a_latent_is(trained) -> None:
    """Told wrong timesteps, it is worse: what it is told is used."""
    settings, _ = trained
    data, validation, _, _ = open_parts(settings, None, torch.device("cpu"))
    data.whiten(None, [])
    classifier = LatentClassifier.from_pretrained(Path(settings.out) / "classifier")
    objective = Objective(classifier.objective)
    shift, scale = (v.view(-1, 1, 1) for v in (classifier.shift, classifier.scale))
    mean, std = validation.store.moments(validation.rows)
    generator = torch.Generator().manual_seed(0)
    right = wrong = 0.0
    for _ in range(8):
        draw = mean if std is None else mean + std * torch.randn(mean.shape, generator=generator)
        t = torch.randint(0, 1000, (len(mean),), generator=generator)
        x_t = objective.add_noise((draw - shift) / scale, torch.randn(mean.shape, generator=generator), t)
        for told_t, into in ((t, "right"), (999 - t, "wrong")):
            p = classifier.probabilities(x_t, told_t)[torch.arange(len(mean)), validation.labels]
            loss = float(-p.clamp(min=1e-9).log().mean())
            if into == "right":
                right += loss
            else:
                wrong += loss
    assert wrong > 1.03 * right


def test_scores_are_those_of_scikit_learn(trained) -> None:
    from sklearn.metrics import f1_score, recall_score

    settings, told = trained
    data, validation, _, _ = open_parts(settings, None, torch.device("cpu"))
    data.whiten(None, [])
    classifier = LatentClassifier.from_pretrained(Path(settings.out) / "classifier")
    seen: list[torch.Tensor] = []

    def watched(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(classifier.network(x_t, t).argmax(1))
        return classifier.network(x_t, t)

    rows = score(
        watched, validation, (data.shift, data.scale), Objective(ObjectiveSettings()), make_accelerator(), 0, 0, 256
    )
    truth = validation.labels[torch.from_numpy(validation.drawn(0, 0).copy())].numpy()
    assert len(seen) == 10
    for row, found in zip(rows, (s.numpy() for s in seen), strict=False):
        assert row["f1"] == pytest.approx(f1_score(truth, found, average="macro", labels=[0, 1, 2]), abs=1e-6)
        assert row["sensitivity"] == pytest.approx(recall_score(truth, found, average="macro", labels=[0, 1, 2]))
        specificity = np.mean([np.mean(found[truth != c] != c) for c in range(3)])
        assert row["specificity"] == pytest.approx(specificity, abs=1e-6)
    assert [row["f1"] for row in rows] == [row["f1"] for row in told["scores"]]  # the same noise at every measurement


def test_what_it_tells_and_writes(trained) -> None:
    settings, told = trained
    out = Path(settings.out)
    assert told["classifier"] == str(out / "classifier")
    assert told["values"] == ["benign", "solid", "spindle"]
    assert (told["field"], told["patches"], told["patients"]) == ("class", 80, 40)  # without the unknown
    rows = read_log(out / "evaluation.csv")
    assert [int(row["images"]) for row in rows] == [2000] * 11 + [4000] * 11
    config = json.loads((out / "classifier" / "config.json").read_text())
    assert config["provenance"]["scores"] == told["scores"]
    before = os.stat(out / "classifier" / "config.json").st_mtime_ns
    assert train_classifier(settings) == told  # finished: at once
    assert os.stat(out / "classifier" / "config.json").st_mtime_ns == before
    with pytest.raises(UserError, match=r"lr was 0\.002 and is 0\.001"):
        train_classifier(replace(settings, lr=1e-3))
    with pytest.raises(UserError, match="validation_data was"):
        train_classifier(replace(settings, validation_value=""))


def test_classes_are_balanced_unless_told_otherwise(make: Make) -> None:
    def shares(settings: ClassifierSettings) -> np.ndarray:
        data, _, _, _ = open_parts(settings, None, torch.device("cpu"))
        drawn = np.concatenate([data.at(i, 64, 0) for i in range(40)])
        return np.bincount(data.conditions.codes[drawn, 0].numpy(), minlength=5)[2:] / len(drawn)

    np.testing.assert_allclose(shares(make()), 1 / 3, atol=0.04)
    np.testing.assert_allclose(shares(make(balance=[])), [0.5, 0.25, 0.25], atol=0.03)


def test_cut_off_and_resumed_equals_unbroken(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(out=str(tmp_path / "whole"), evaluate_every_images=160)
    whole.network.dropout = 0.1
    train_classifier(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    for update in (12, 14):  # of this attempt: at 192 and at 352 images, in the middle of an interval of the log
        with monkeypatch.context() as patch:
            patch.setattr(updates, "clip_gradients", interrupt_at(update, stop))
            with pytest.raises(KeyboardInterrupt):
                train_classifier(torn)
        torch.rand(3)  # what ran before does not matter
        assert not (tmp_path / "torn" / "classifier").exists()
    train_classifier(torn)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        train_classifier(replace(torn, seed=1))


def test_told_to_stop_it_saves_and_the_same_command_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = make(out=str(tmp_path / "torn"), checkpoint_every_images=0)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_folder.plain(asdict(torn))))
    words = ["classifier", "--config", str(path), "--json", str(tmp_path / "told.json")]
    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt_at(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert main(words) == 75
    assert [p.name for p in (tmp_path / "torn" / "checkpoints").iterdir()] == ["images-000000000112"]
    assert main(words) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["classifier"] == str(tmp_path / "torn" / "classifier")
    whole = replace(torn, out=str(tmp_path / "whole"))
    assert train_classifier(whole)["scores"] == told["scores"]
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def test_device_batch_changes_rounding_only(make: Make, tmp_path: Path) -> None:
    whole, parts = (
        make(out=str(tmp_path / n), max_steps=10, lr=5e-4, device_batch=b) for n, b in (("a", None), ("b", 6))
    )
    for settings in (whole, parts):
        train_classifier(settings)
    a, b = (torch.cat([v.flatten() for v in tensors(tmp_path / n / "classifier").values()]) for n in "ab")
    assert 0 < float((a - b).norm() / a.norm()) <= 1e-5


def test_a_model_gives_its_schedule_and_whitening(make: Make, coloured: Path, tmp_path: Path) -> None:
    objective = ObjectiveSettings(
        prediction="epsilon",
        schedule="linear",
        beta_start=0.0015,
        beta_end=0.0155,
        zero_terminal_snr=False,
        timesteps=500,
    )
    folder = train(
        TrainSettings(
            data=str(coloured / "data"),
            latents=str(coloured / "latents"),
            out=str(tmp_path / "uncond"),
            max_steps=1,
            global_batch=8,
            split_value="test",
            model=replace(small_model(), fields=[]),
            objective=objective,
        )
    )
    pipeline = MediPipeline.from_pretrained(folder)
    told = train_classifier(make(model=str(folder), max_steps=2))
    classifier = LatentClassifier.from_pretrained(told["classifier"])
    assert torch.equal(classifier.shift, pipeline.shift)
    assert torch.equal(classifier.scale, pipeline.scale)
    assert classifier.objective.timesteps == 500
    assert timestep_buckets(500)[1] == (50, 100)
    classifier.check_model(pipeline)
    # On its own it measures the whitening of its own rows, on its own schedule.
    alone = LatentClassifier.from_pretrained(
        train_classifier(make(out=str(tmp_path / "alone"), max_steps=2))["classifier"]
    )
    with pytest.raises(UserError, match=r"shift .*500 timesteps, the classifier 1000"):
        alone.check_model(pipeline)


def test_streaming_is_training_on_stored_latents(make: Make, coloured: Path, tmp_path: Path) -> None:
    source = json.loads((coloured / "latents" / "latents.json").read_text())["autoencoder"]["source"]
    stored = train_classifier(make(out=str(tmp_path / "stored"), max_steps=4))
    streamed = train_classifier(make(out=str(tmp_path / "streamed"), max_steps=4, latents="", autoencoder=source))
    a, b = (
        torch.cat([v.flatten() for v in tensors(tmp_path / n / "classifier").values()]) for n in ("stored", "streamed")
    )
    assert float((a - b).norm() / a.norm()) <= 1e-4
    assert streamed["scores"][0]["n"] == stored["scores"][0]["n"]


def test_values_choose_what_is_told_apart(make: Make) -> None:
    data, validation, _, values = open_parts(make(values=["spindle", "benign"]), None, torch.device("cpu"))
    assert values == ("benign", "spindle")
    assert len(data) == 60
    assert set(validation.labels.tolist()) == {0, 1}
    told = train_classifier(make(values=["spindle", "benign"], max_steps=2))
    assert LatentClassifier.from_pretrained(told["classifier"]).values == ("benign", "spindle")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"field": "klass"}, "no field 'klass'; closest: 'class'"),
        ({"field": "class", "values": ["benign"]}, "1 values of class"),
        ({"values": ["benign", "solide"]}, "no value 'solide'; closest: 'solid'"),
        ({"values": ["solid", "solid"]}, "values repeats one"),
        ({"split": "other"}, "other"),
        ({"split_value": "nobody"}, "nobody"),
        ({"validation_value": "nobody"}, "nobody"),
        ({"validation_value": "train"}, "both 'train'"),
        ({"validation_patches": -1}, "validation_patches is -1"),
        ({"balance": ["hospital"]}, "no field 'hospital'"),
        ({"latents": "", "autoencoder": ""}, "give latents"),
        ({"max_steps": 0}, "max_images or max_steps"),
        ({"global_batch": 0}, "global_batch"),
        ({"precision": "fp8"}, "fp8"),
        ({"model": "/nowhere/at/all"}, "no model folder"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], why: str, make: Make, tmp_path: Path) -> None:
    if "precision" in changes:  # the command line's types refuse it before anything else
        assert main(["classifier", "data=a", "out=b", "latents=c", "max_steps=1", "precision=fp8"]) == 2
        return
    with pytest.raises(UserError, match=why):
        train_classifier(make(**changes))
    assert not (tmp_path / "run" / "classifier").exists()


def test_a_number_is_no_class(tiny: Path, make: Make) -> None:
    with pytest.raises(UserError, match="'age' is a number"):
        train_classifier(make(data=str(tiny / "data"), latents=str(tiny / "latents"), field="age"))


def test_a_value_without_training_patches_is_named(make: Make, coloured: Path, tmp_path: Path) -> None:
    dataset = PatchDataset.open(coloured / "data")
    classes = dataset.index["class"].tolist()
    patients = dataset.index["patient"].tolist()
    spindle = {p for p, c in zip(patients, classes, strict=True) if c == "spindle"}
    dataset.add_split("no_spindle", ["test" if p in spindle else "train" for p in patients], {"scheme": "by hand"})
    with pytest.raises(UserError, match="No training patch has class 'spindle'"):
        train_classifier(make(split="no_spindle"))


def test_patients_in_both_parts_are_refused(make: Make, tmp_path: Path, autoencoder: Autoencoder) -> None:
    dataset = make_cohort(tmp_path / "data", ("a", "b"))
    encode_dataset(tmp_path / "data", autoencoder, tmp_path / "latents")
    index = pd.read_parquet(dataset.folder / "index.parquet")
    index["split_main"] = [("train", "test")[i // 2 % 2] for i in range(len(index))]  # as another program might
    put_index(dataset.folder, index)
    with pytest.raises(UserError, match="more than one part"):
        train_classifier(make(data=str(tmp_path / "data"), latents=str(tmp_path / "latents")))


def test_a_stop_before_the_first_update_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "clip_gradients", interrupt_at(1, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    with pytest.raises(Preempted, match="SIGUSR1 at 16 of 480 images"):
        train_classifier(make())


def test_a_loss_that_is_not_finite_stops_the_run(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer.F, "cross_entropy", lambda *a, **k: a[0].sum() * float("nan"))
    with pytest.raises(UserError, match=r"update 1 .*nan.*p\d"):
        train_classifier(make())
    assert not list((tmp_path / "run").glob("checkpoints/images-*"))


def test_a_finished_classifier_is_prolonged_to_what_a_long_run_gives(make: Make, tmp_path: Path) -> None:
    whole = make(out=str(tmp_path / "whole"), max_steps=12, warmup_images=32, schedule="constant")
    train_classifier(whole)
    short = replace(whole, out=str(tmp_path / "run"), max_steps=7)
    train_classifier(short)
    train_classifier(replace(short, max_steps=12))
    for part in ("classifier", "checkpoints/images-000000000192"):
        ours, theirs = (tensors(tmp_path / name / part) for name in ("whole", "run"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    kept = LatentClassifier.from_pretrained(tmp_path / "run" / "classifier-images-000000000112")
    assert kept.provenance["images_seen"] == 112
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="no whole checkpoint to continue from"):
        train_classifier(replace(short, max_steps=15))
