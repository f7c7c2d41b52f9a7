"""`classify` writes what the network says, for datasets and folders of images, and refuses what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.experiment.verify_artefacts import verify_artefact
from latent_medi.features.classifier_folder import CLASSIFIER_FILE, WEIGHTS_FILE
from latent_medi.features.encoders import load_encoder
from latent_medi.image_classifier.classify import ImageClassifier, classify
from latent_medi.image_classifier.scores import ClassifierScores, classifier_scores
from latent_medi.image_classifier.settings import ClassifySettings, ImageClassifierSettings
from latent_medi.image_classifier.train import train_image_classifier
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import encode_image


@pytest.fixture(scope="module")
def model(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has hardly learned."""
    out = tmp_path_factory.mktemp("model") / "run"
    settings = ImageClassifierSettings(str(tissue), str(out), network="test_vit", image_size=64, max_steps=2)
    settings = ImageClassifierSettings(**{**vars(settings), "global_batch": 8, "validation_value": ""})
    return train_image_classifier(settings)[0]


def test_a_row_per_patch_slide_and_patient(model: Path, tissue: Path, tmp_path: Path) -> None:
    dataset = PatchDataset.open(tissue)
    rows = dataset.rows({"split_main": "test"})
    settings = {"model": str(model), "data": str(tissue), "split": "main"}
    done = classify(ClassifySettings(**settings, out=str(tmp_path / "patches.csv")))
    table = pd.read_csv(tmp_path / "patches.csv", dtype={"patient": str, "slide": str})
    assert table.columns.tolist() == ["key", "patient", "slide", "p_glandular", "p_solid", "p_spindle", "predicted"]
    assert table["key"].tolist() == dataset.index["key"].iloc[rows].tolist()
    chances = table[["p_glandular", "p_solid", "p_spindle"]].to_numpy()
    ours = ImageClassifier(model)
    np.testing.assert_allclose(chances, ours.probabilities(dataset.read(rows)), atol=1e-6)
    logits = ours.module(load_encoder(model).prepare(dataset.read(rows[:4])))
    np.testing.assert_allclose(chances[:4], torch.softmax(logits, 1).numpy(), atol=1e-5)
    assert table["predicted"].tolist() == [ours.facts.labels[i] for i in chances.argmax(1)]
    assert isinstance(done.scores, ClassifierScores)
    truth = dataset.index["class"].astype(str).iloc[rows].to_numpy()
    assert done.scores.accuracy.value == pytest.approx((table["predicted"].to_numpy() == truth).mean())
    for by, keys in (("slide", ["patient", "slide"]), ("patient", ["patient"])):
        classify(ClassifySettings(**settings, out=str(tmp_path / f"{by}.csv"), by=by))  # type: ignore[arg-type]
        mean = pd.read_csv(tmp_path / f"{by}.csv", dtype={"patient": str, "slide": str})
        wanted = table.groupby(keys)["p_solid"].mean()
        np.testing.assert_allclose(mean["p_solid"], wanted.to_numpy(), atol=1e-9)
        assert mean["patches"].sum() == len(table)


def test_synthetic_patches_get_predictions_and_no_scores(model: Path, synthetic: PatchDataset, tmp_path: Path) -> None:
    done = classify(ClassifySettings(str(model), str(synthetic.folder), str(tmp_path / "p.csv")))
    assert done.scores is None
    assert len(pd.read_csv(tmp_path / "p.csv")) == len(synthetic)


def test_a_folder_of_images_is_classified_like_the_dataset(
    model: Path, tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = PatchDataset.open(tissue).read(np.arange(5))
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    for i, patch in enumerate(patches):
        (images / "a" / f"{i}.png").write_bytes(encode_image(patch))
    settings = ClassifySettings(str(model), str(images), str(tmp_path / "p.csv"))
    classify(settings)
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["key"].tolist() == [f"a/{i}.png" for i in range(5)]
    found = table[["p_glandular", "p_solid", "p_spindle"]].to_numpy()
    np.testing.assert_allclose(found, ImageClassifier(model).probabilities(patches), atol=1e-6)
    assert "resized" not in caplog.text
    (images / "b.png").write_bytes(encode_image(np.zeros((32, 32, 3), np.uint8)))
    classify(settings)
    assert len(pd.read_csv(tmp_path / "p.csv")) == 6
    assert "1 images do not have the 64 px" in caplog.text
    (images / "c.png").write_bytes(encode_image(np.zeros((32, 40, 3), np.uint8)))
    with pytest.raises(UserError, match=r"c.png has 40×32 px; patches are square"):
        classify(settings)
    with pytest.raises(UserError, match="no split, fields, slides or patients"):
        classify(ClassifySettings(str(model), str(images), str(tmp_path / "p.csv"), by="patient"))
    with pytest.raises(UserError, match="holds no dataset and no image"):
        classify(ClassifySettings(str(model), str(model), str(tmp_path / "p.csv")))
    (images / "c.png").unlink()
    told = tmp_path / "told.json"
    words = ["classify", f"model={model}", f"data={images}", f"out={tmp_path / 'p.csv'}", f"--json={told}"]
    assert main(words) == 0
    assert "6 patches classified" in capsys.readouterr().out
    assert json.loads(told.read_text()) == {"table": str(tmp_path / "p.csv"), "patches": 6, "scores": None}


def test_another_size_or_scale_is_warned_of(
    model: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = classify(ClassifySettings(str(model), str(tiny / "data"), str(tmp_path / "p.csv")))
    assert "those of" in caplog.text
    assert "have 32 px and are resized" in caplog.text
    assert "tissue has another size" in caplog.text
    assert done.scores is None  # none of its classes is one of the classifier's
    assert done.patches == len(PatchDataset.open(tiny / "data"))


def test_damage_is_named_and_verified(model: Path, tissue: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert verify_artefact(copy) == "image classifier"
    for name in (WEIGHTS_FILE, CLASSIFIER_FILE):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        for use in (
            lambda: classify(ClassifySettings(str(copy), str(tissue), str(tmp_path / "p.csv"))),
            lambda: load_encoder(copy),
            lambda: verify_artefact(copy),
        ):
            with pytest.raises(UserError, match=f"{name} is damaged"):
                use()
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match="is no image classifier"):
        classify(ClassifySettings(str(tissue), str(tissue), str(tmp_path / "p.csv")))


def test_intervals_are_over_patients_and_need_ten() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(240) % 2
    found = np.where(rng.random(240) < 0.8, truth, 1 - truth)
    narrow = classifier_scores(truth, found, np.array([f"p{i}" for i in range(240)]), ["a", "b"], "image")
    wide = classifier_scores(truth, found, np.array([f"p{i % 24}" for i in range(240)]), ["a", "b"], "patient")
    few = classifier_scores(truth, found, np.array([f"p{i % 6}" for i in range(240)]), ["a", "b"], "patient")
    assert narrow.accuracy.value == wide.accuracy.value == few.accuracy.value == (truth == found).mean()
    assert few.accuracy.interval == few.f1.interval == "not estimable"
    low, high = narrow.accuracy.interval  # type: ignore[misc]
    assert low < narrow.accuracy.value < high  # type: ignore[operator]
    assert high - low == pytest.approx(2 * 1.97 * np.sqrt(0.8 * 0.2 / 240), rel=0.15)
    assert (wide.n_patients, wide.classes[0].n_patients, narrow.patient_is) == (24, 12, "image")
