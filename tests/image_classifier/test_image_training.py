"""An image classifier learns, keeps its best weights, survives kills, and refuses what cannot be right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import put_index
from safetensors.torch import load_file

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.features.classifier_folder import build_network, read_classifier, read_facts
from latent_medi.features.encoders import load_encoder
from latent_medi.image_classifier import monitor
from latent_medi.image_classifier.scores import ClassifierScores
from latent_medi.image_classifier.settings import AugmentSettings, ImageClassifierSettings
from latent_medi.image_classifier.train import train_image_classifier
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import updates
from latent_medi.training.ema import Ema
from latent_medi.training.log import read_log
from latent_medi.training.settings import EmaSettings

Make = Callable[..., ImageClassifierSettings]


@pytest.fixture(scope="module")
def trained(
    tissue: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ImageClassifierSettings, Path, ClassifierScores]:
    """A small residual network that has learned."""
    settings = ImageClassifierSettings(
        data=str(tissue),
        out=str(tmp_path_factory.mktemp("trained") / "run"),
        validation_value="probe",
        network="test_resnet",
        image_size=64,
        augment=AugmentSettings((0.6, 1.0), 0.5, 0.5, "rand-m5-n1", 0.0, 0.1, 0.2, 0.5, 0.1),
        max_steps=50,
        global_batch=32,
        lr=3e-3,
        warmup_fraction=0.1,
        evaluate_every_images=320,
    )
    folder, scores = train_image_classifier(settings)
    assert scores is not None
    return settings, folder, scores


def test_it_learns_and_keeps_the_best_of_its_weights(
    trained: tuple[ImageClassifierSettings, Path, ClassifierScores],
) -> None:
    settings, folder, scores = trained
    assert scores.balanced_accuracy.value is not None
    assert scores.balanced_accuracy.value > 0.6  # chance is 1/3
    assert isinstance(scores.accuracy.interval, tuple)
    assert (scores.n_patches, scores.n_patients, scores.patient_is) == (96, 24, "patient")
    facts = read_facts(folder)
    assert (facts.labels, facts.field) == (["glandular", "solid", "spindle"], "class")
    assert (facts.patch_size, facts.preprocessing.size, facts.network) == (64, 64, "test_resnet")
    rows = read_log(Path(settings.out) / "evaluation.csv")
    best = max(rows, key=lambda row: (float(row["balanced_accuracy"]), -float(row["loss"])))
    assert facts.provenance["best"]["images"] == int(best["images"])
    # The numbers of the test part are those of the kept weights, counted here.
    test = PatchDataset.open(settings.data)
    chosen = test.rows({"split_main": "test"})
    _, module = read_classifier(folder)
    x = torch.from_numpy(test.read(chosen)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (facts.preprocessing.mean, facts.preprocessing.std))
    found = module((x - mean) / std).argmax(1).numpy()
    truth = test.index["class"].astype(str).to_numpy()[chosen]
    right = np.array(facts.labels)[found] == truth
    assert scores.accuracy.value == pytest.approx(right.mean())
    for entry in scores.classes:
        assert entry.sensitivity.value == pytest.approx(right[truth == entry.label].mean())


def test_finished_it_is_not_trained_again(
    trained: tuple[ImageClassifierSettings, Path, ClassifierScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder, scores = trained
    monkeypatch.setattr(updates.Run, "train", lambda *_: pytest.fail("trained again"))
    assert train_image_classifier(settings) == (folder, scores)
    with pytest.raises(UserError, match="lr was"):
        train_image_classifier(replace(settings, lr=1e-3))


def test_its_features_are_those_before_the_last_layer(
    trained: tuple[ImageClassifierSettings, Path, ClassifierScores],
) -> None:
    settings, folder, _ = trained
    patches = PatchDataset.open(settings.data).read(np.arange(5))
    encoder = load_encoder(folder)
    features = encoder.features([patches])
    assert features.shape == (5, encoder.dim)
    _, module = read_classifier(folder)
    logits = module.fc(torch.from_numpy(features))  # type: ignore[operator]
    torch.testing.assert_close(logits, module(encoder.prepare(patches)), rtol=1e-4, atol=1e-4)


def test_of_a_vision_transformer_the_features_are_the_class_token(make: Make) -> None:
    folder, _ = train_image_classifier(make(max_steps=1, test_value="", validation_value=""))
    encoder = load_encoder(str(folder))
    patches = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    _, module = read_classifier(folder)
    tokens = module.forward_features(encoder.prepare(patches))  # type: ignore[operator]
    np.testing.assert_allclose(encoder.features([patches]), tokens[:, 0].numpy(), rtol=1e-4, atol=1e-5)


def test_on_shuffled_labels_it_stays_near_chance(
    trained: tuple[ImageClassifierSettings, Path, ClassifierScores], tmp_path: Path
) -> None:
    settings, _, scores = trained
    folder = tmp_path / "data"
    folder.mkdir()
    dataset = PatchDataset.open(settings.data)
    for path in dataset.folder.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    index = dataset.index.copy()
    train = (index["split_main"] == "train").to_numpy()
    names = sorted(set(index["patient"][train]))
    classes = index[train].astype({"class": str}).groupby("patient")["class"].first()
    given = dict(zip(names, np.random.default_rng(0).permutation(classes), strict=True))
    index["class"] = [given.get(p, c) for p, c in zip(index["patient"], index["class"].astype(str), strict=True)]
    index["class"] = index["class"].astype(dataset.index["class"].dtype)
    put_index(folder, index)
    again = replace(settings, data=str(folder), out=str(tmp_path / "run"), max_steps=25, validation_value="")
    _, found = train_image_classifier(again)
    assert found is not None
    assert found.balanced_accuracy.value is not None
    assert found.balanced_accuracy.value < 0.5 < scores.balanced_accuracy.value  # type: ignore[operator]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}:{k}": v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}


def test_killed_and_resumed_equals_unbroken(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"drop_path": 0.1, "dropout": 0.1, "ema": EmaSettings(), "keep_checkpoints": 9}
    changes |= {"augment": AugmentSettings(repeats=2), "balance": True}
    whole, _ = train_image_classifier(make(out=str(tmp_path / "whole"), **changes))
    broken, clip, calls = make(out=str(tmp_path / "broken"), **changes), updates.clip_gradients, [0]

    def kill(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", kill)
        with pytest.raises(KeyboardInterrupt):
            train_image_classifier(broken)
    assert not (tmp_path / "broken" / "model").exists()
    torch.rand(5)  # the state of the global generator does not matter
    resumed, _ = train_image_classifier(broken)
    for part in ("checkpoints", "model"):
        ours, theirs = tensors(whole.parent / part), tensors(resumed.parent / part)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (whole.parent / "scores.json").read_bytes() == (resumed.parent / "scores.json").read_bytes()
    read = [read_log(folder.parent / "evaluation.csv") for folder in (whole, resumed)]
    assert read[0] == read[1]
    assert len(read[0]) == 3


def test_the_best_weights_are_those_of_the_best_validation_and_survive_a_kill(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By images: the second is best, and of the equally accurate fourth the loss is higher.
    planned = {32: (0.5, 1.0), 64: (0.8, 1.0), 96: (0.6, 0.1), 128: (0.8, 1.5), 160: (0.7, 0.1)}
    coming = iter(planned.values())

    def measure(self: monitor.ImageClassifierMonitor) -> dict[str, Any]:
        accuracy, loss = next(coming)
        return dict.fromkeys(monitor.COLUMNS, 0.0) | {"balanced_accuracy": accuracy, "loss": loss, "n": 1}

    monkeypatch.setattr(monitor.ImageClassifierMonitor, "measure", measure)
    settings, clip, calls = make(max_steps=20, keep_checkpoints=9), updates.clip_gradients, [0]

    def kill(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 14:
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", kill)
        with pytest.raises(KeyboardInterrupt):
            train_image_classifier(settings)
    folder, _ = train_image_classifier(settings)
    assert read_facts(folder).provenance["best"] == {"images": 64, "balanced_accuracy": 0.8, "loss": 1.0}
    kept = load_file(folder / "model.safetensors")
    at = {n: load_file(folder.parent / "checkpoints" / f"images-{n:012d}" / "model.safetensors") for n in planned}
    assert all(torch.equal(kept[name], at[64][name]) for name in kept)
    assert not all(torch.equal(kept[name], at[160][name]) for name in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_value": "test"}, "chosen and scored on other patients"),
        ({"validation_value": "train"}, "chosen and scored on other patients"),
        ({"validation_value": "val"}, "no row in 'val'(.|\n)*validation_value="),
        ({"split": ""}, "split is empty"),
        ({"network": "vit_smal_patch16_224"}, "no network 'vit_smal_patch16_224'; closest: 'vit_small_patch16_224'"),
        ({"network": "test_vit.none"}, "Leave out what follows test_vit"),
        ({"image_size": 60}, "does not take images of 60 px"),
        ({"augment": AugmentSettings(rand_augment="rondom")}, "rand_augment is 'rondom'"),
        ({"global_batch": 7}, "even global_batch"),
        ({"values": ["solid"]}, "1 values of class"),
        ({"selection": "best"}, "selection needs synthetic"),
        ({"weights": "pretrained"}, "weights=PATH"),
    ],
)
def test_what_cannot_be_right_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_image_classifier(make(**changes))
    assert not (Path(make().out) / "run.json").exists()


def test_it_starts_from_weights_of_another_task_and_refuses_those_of_another_network(
    make: Make, tmp_path: Path, trained: tuple[ImageClassifierSettings, Path, ClassifierScores]
) -> None:
    first, _ = train_image_classifier(make(max_steps=1, test_value="", validation_value=""))
    two = {"values": ["solid", "spindle"], "image_size": 96, "weights": str(first)}
    second, _ = train_image_classifier(
        make(out=str(tmp_path / "two"), lr=1e-12, max_steps=1, test_value="", validation_value="", **two)
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert theirs["head.weight"].shape[0] == 2
    assert ours["pos_embed"].shape != theirs["pos_embed"].shape
    torch.testing.assert_close(ours["blocks.0.mlp.fc1.weight"], theirs["blocks.0.mlp.fc1.weight"])
    before, after = (read_facts(folder).preprocessing for folder in (first, second))
    assert (after.size, after.mean, after.std) == (96, before.mean, before.std)  # what the weights have learned from
    with pytest.raises(UserError, match="do not fit the network"):
        train_image_classifier(make(out=str(tmp_path / "three"), weights=str(trained[1])))


def test_biases_normalisations_and_embeddings_do_not_decay(make: Make) -> None:
    settings = make(max_steps=1, test_value="", validation_value="", lr=1e-3, weight_decay=500.0, warmup_fraction=0.0)
    after = load_file(train_image_classifier(settings)[0] / "model.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = build_network("test_vit", 64, 3)
    # Decay halves a weight, and Adam's first step changes it by the learning rate.
    halved = {name for name, before in network.named_parameters() if (after[name] - before / 2).abs().max() < 2e-3}
    assert {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= halved
    kept = {name for name, before in network.named_parameters() if (after[name] - before).abs().max() < 2e-3}
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight", "blocks.1.norm1.weight"} <= kept


def test_an_average_follows_the_statistics_of_batch_normalisation() -> None:
    network = torch.nn.BatchNorm2d(2)
    average = Ema(network)
    network.running_mean.fill_(8.0)  # type: ignore[union-attr]
    average.update(network, 0.75)
    assert average.module.running_mean.tolist() == [2.0, 2.0]  # type: ignore[union-attr]


def test_the_verb_prints_scores_and_writes_them(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make(max_steps=1)
    words = [f"{name}={getattr(settings, name)}" for name in ("data", "out", "network", "image_size", "max_steps")]
    words += ["validation_value=", "global_batch=8", f"--json={tmp_path / 'told.json'}"]
    assert main(["image-classifier", *words]) == 0
    assert "intervals over patients" in capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["model"] == str(Path(settings.out) / "model")
    assert told["scores"]["accuracy"]["n_patches"] == 96
    assert json.loads((Path(settings.out) / "scores.json").read_text())["accuracy"] == told["scores"]["accuracy"]
