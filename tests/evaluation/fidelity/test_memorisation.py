"""A generator that repeats training patients is found, its copies are listed, and the gate fails the command."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import SCHEMA, SIZE, World, evaluated, filters, synthetic_patches
from parts import put_index
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.demo.tissue import random_shape, random_stain, render
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.fidelity import memorisation as module
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.memorisation import (
    CopyFinder,
    _Authentic,
    copy_threshold,
    find_copies,
    memorisation,
)
from latent_medi.evaluation.results import read_metrics
from latent_medi.features.pixel_copies import small_patches
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.folder import write_folder
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.statistics.distances import pca_basis

QUIET: dict[str, Any] = {"downstream": False, "memorisation": True}


@pytest.fixture(scope="module")
def thief(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator whose every tenth patch is a training patch, mirrored."""
    real = PatchDataset.open(world.real)
    train = real.rows({"split_main": "train"})
    stolen = iter(real.read(train[:: len(train) // 80]))
    patches = list(synthetic_patches(40, None, False))
    for i in range(0, len(patches), 10):
        patches[i] = replace(patches[i], image=np.ascontiguousarray(next(stolen)[:, ::-1]))
    folder = tmp_path_factory.mktemp("thief") / "medi"
    write_dataset(folder, patches, "thief", SCHEMA, SIZE, 0.5)
    return folder


def test_an_honest_generator_copies_nothing(metrics: dict[str, Any]) -> None:
    record = metrics["memorisation"]["filters"]
    assert set(metrics["memorisation"]) == {"filters"}  # not of the colour-free encoder: the same pixels
    for arm in ("medi", "cls"):
        found = record["synthetic"][arm]
        # Stripes are alike wherever their angle is: a few patches of other real patients count as copies too.
        assert found["copy_rate"]["value"] < 0.03
        assert found["copy_rate"]["interval"][1] < 0.05
        assert len(found["listed"]) == 24  # the most alike are shown, copies or not
        assert sum(pair["copy"] for pair in found["listed"]) == found["copies"]
        assert abs(found["auth_pct"]["value"] - record["held_out_auth_pct"]["value"]) < 15
        assert found["ct"]["value"] > -3
    assert record["held_out_flagged"]["value"] <= 0.01
    seen = [cell for cell in record["synthetic"]["medi"]["combinations"] if cell["n_bank"]]
    assert 0.3 < np.mean([cell["nearer_train"] for cell in seen]) < 0.7
    unseen = next(c for c in record["synthetic"]["medi"]["combinations"] if c["name"] == "stripes × south")
    assert (unseen["n_bank"], unseen["nearer_train"]) == (0, None)


def test_copies_are_counted_and_listed_with_their_originals(
    world: World, thief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    search = module.nearest_neighbours

    def noting(*arguments: Any, device: Any = "unsaid", **named: Any) -> Any:
        devices.append(str(arguments[4] if len(arguments) > 4 else device))
        return search(*arguments[:4], **named)

    monkeypatch.setattr(module, "nearest_neighbours", noting)
    settings = world.settings("thief", synthetic={"medi": str(thief)}, device="cpu:0", **QUIET)
    found = evaluated(settings, [filters()])["memorisation"]["filters"]["synthetic"]["medi"]
    assert set(devices) == {"cpu:0"}  # the evaluation's own
    assert len(devices) > 3 + 2 + 2 + 2  # copies, authenticity, C_T, cells
    assert 72 <= found["copies"] <= 72 + 7
    copies = [pair for pair in found["listed"] if pair["copy"]]
    assert len(copies) == found["copies"]
    assert sum(cell["copies"] for cell in found["combinations"]) == found["copies"]
    made, real = PatchDataset.open(thief), PatchDataset.open(world.real)
    place = {key: row for row, key in enumerate(made.index["key"])}
    patients = sorted(set(real.index["patient"]))
    assert {key for key in place if int(key.partition("/")[2]) % 10 == 0} <= {p["synthetic_key"] for p in copies}
    for pair in copies[:72:9]:  # the most alike first
        assert pair["view"] == "mirrored"
        copy, source = made.read([place[pair["synthetic_key"]]])[0], real.read([pair["train_row"]])[0]
        assert np.array_equal(copy, source[:, ::-1])
        assert pair["patient"] == f"patient {patients.index(real.index['patient'][pair['train_row']]) + 1}"
        assert "train_key" not in pair
    named = evaluated(replace(settings, patient_names=True), [filters()])["memorisation"]["filters"]["synthetic"][
        "medi"
    ]
    for pair in named["listed"]:
        assert pair["train_key"] == real.index["key"][pair["train_row"]]
        assert pair["patient"] == real.index["patient"][pair["train_row"]]


def test_a_copy_of_a_patch_without_a_known_class_is_found(world: World, thief: Path, tmp_path: Path) -> None:
    """A model is trained on these too."""
    copied = shutil.copytree(world.real, tmp_path / "real")
    table = pd.read_parquet(copied / "index.parquet")
    table.loc[table["patient"].isin(sorted(set(table["patient"]))[::2]), "class"] = "unknown"
    put_index(copied, table)
    settings = world.settings("untold", real=str(copied), synthetic={"medi": str(thief)}, **QUIET)
    study = open_study(settings)
    assert len(study.train) < 0.7 * len(study.shown)
    found = find_copies(study)
    stolen = np.array([int(key.partition("/")[2]) % 10 == 0 for key in study.synthetic["medi"].index["key"]])
    assert (found.scores["medi"][stolen] > found.threshold).all()
    untold = set(study.shown) - set(study.train)
    assert untold & set(found.partner["medi"][stolen].tolist())


def test_the_gate_fails_the_command_and_keeps_the_metrics(
    world: World, thief: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = world.settings("gate", synthetic={"medi": str(thief)}, max_copy_rate=0.12, **QUIET)
    evaluate(settings, [filters()])  # not more than allowed
    with pytest.raises(UserError, match=r"7\d of 720 patches of medi are copies .*1\d\.\d\d%, allowed 9\.00%"):
        evaluate(replace(settings, max_copy_rate=0.09), [filters()])
    with pytest.raises(UserError, match="memorisation=false finds no copies"):
        evaluate(replace(settings, max_copy_rate=0.09, memorisation=False), [filters()])
    with pytest.raises(UserError, match="max_copy_rate"):
        evaluate(replace(settings, max_copy_rate=1.5), [filters()])
    out = tmp_path / "out"
    words = ["evaluate", f"real={world.real}", f"synthetic.medi={thief}", f"out={out}", "encoders=[demo]"]
    words += [
        "real_splits=0",
        "held_out=[{class: stripes, site: south}]",
        "downstream=false",
        "colour_free=false",
    ]
    assert main([*words, "--max-copy-rate", "0.05"]) == 2
    assert "are copies of training patches" in capsys.readouterr().err
    assert read_metrics(out).memorisation["demo"].synthetic["medi"].copies >= 72


def test_a_threshold_comes_from_other_real_patients(world: World) -> None:
    """Where real patients look alike, more is asked of a copy."""
    real = PatchDataset.open(world.real)
    small = small_patches(real.read(real.rows({"split_main": "train"})))
    assert CopyFinder(small, small[:0]).threshold == 0.6
    assert CopyFinder(small, small[::2]).threshold > 0.99


def test_authenticity_needs_two_training_patients() -> None:
    """With one, no other patient's patch can be nearer: every sample, however far away, would be called a copy's."""
    rng = np.random.default_rng(0)
    for people, known in ((1, False), (2, True)):
        names = np.repeat([f"p{i}" for i in range(people)], 10)
        study = SimpleNamespace(patients=names, train=np.arange(len(names)))
        features = Features(rng.normal(size=(len(names), 4)), {}, pca_basis(rng.normal(size=(20, 4))))
        authentic = _Authentic(cast(Study, study), features)
        assert authentic.alone is not known
        assert not known or authentic.of(rng.normal(size=(5, 4)) + 20).all()


def planted(tissue: np.ndarray, quality: int | None, view: int = 3) -> np.ndarray:
    """Copies of patches: turned and mirrored, and encoded again unless there is no quality."""
    turned = np.ascontiguousarray(np.rot90(tissue, view % 4, (1, 2))[:, :, ::-1])
    if quality is None or not len(turned):
        return turned
    files = [io.BytesIO() for _ in turned]
    for file, image in zip(files, turned, strict=True):
        Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.stack([np.asarray(Image.open(file)) for file in files])


def gate_study(images: dict[str, np.ndarray], folder: Path) -> Study:
    """Real patches by part (train, probe, test) and synthetic ones (made), a patient for every second patch."""
    schema = SCHEMA.subset(["class"])
    real = [
        Patch(f"{part}/{i}", image, f"{part}{i // 2}", f"{part}{i // 2}", -1, -1, 0.5, {"class": "blobs"})
        for part in ("train", "probe", "test")
        for i, image in enumerate(images[part])
    ]
    split = {p.patient: p.patient.rstrip("0123456789") for p in real}
    recipe = {"allow_duplicates": ["*"]}
    data = write_dataset(folder / "real", real, "real", schema, 64, 0.5, splits={"main": (split, recipe)})
    made = [
        Patch(f"made/{i}", image, f"synthetic:{i}", f"synthetic:{i}", -1, -1, 0.5, {"class": "blobs"}, "synthetic")
        for i, image in enumerate(images["made"])
    ]
    arm = write_dataset(folder / "made", made, "made", schema, 64, 0.5)
    rows = {part: data.rows({"split_main": part}) for part in ("train", "probe", "test")}
    arms = {"medi": SyntheticSet("medi", arm, ("class",), np.arange(len(arm)))}
    train, probe, test = rows.values()
    return Study(data, "class", "site", [], arms, train, train, probe, probe, test, test, "", [])


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    stains = [random_stain(np.random.default_rng(i)) for i in range(3)]
    draws = [np.random.default_rng(100 + i) for i in range(400)]
    return np.stack([render(random_shape(rng), stains[i % 3], rng) for i, rng in enumerate(draws)])


@pytest.mark.parametrize("twice", [0, 2, 5])
@pytest.mark.parametrize("shift", [0, 6])
def test_duplicates_among_forty_probe_patches_hide_no_copy(
    tissue: np.ndarray, tmp_path: Path, twice: int, shift: int
) -> None:
    """Real pictures that lie under a training and a probe patient, encoded again or cut a little beside."""
    train, probe, test, honest = tissue[:120], tissue[120:160].copy(), tissue[160:240].copy(), tissue[240:400]
    probe[:twice] = planted(np.roll(train[:twice], (shift, -shift), (1, 2)), 85)
    test[:twice] = planted(train[10 : 10 + twice], 90)
    stolen = [planted(train[:48], None), planted(train[48:120], 75)]
    images = {"train": train, "probe": probe, "test": test, "made": np.concatenate([*stolen, honest])}
    study = gate_study(images, tmp_path)
    found = find_copies(study)
    flagged = found.scores["medi"] > found.threshold
    assert flagged[:48].sum() == 48
    assert flagged[48:120].sum() == 72
    assert not flagged[120:].any()
    assert found.duplicates["probe"].sum() == (0 if shift else twice)  # a shift is left to the quartiles
    assert found.duplicates["held_out"].sum() == twice
    real, made = (np.random.default_rng(seed).normal(size=(n, 4)) for seed, n in enumerate((240, 280)))
    features = Features(real, {"medi": made}, pca_basis(np.random.default_rng(0).normal(size=(20, 4))))
    record = memorisation(study, features, found, "fingerprint", 0)
    assert record.synthetic["medi"].copies == 120
    assert record.held_out_flagged.value == 0
    assert record.real_duplicates == {"probe": 0 if shift else twice, "held_out": twice}
    assert record.threshold_patches == 40 - record.real_duplicates["probe"]
    assert ("same picture as a training patch" in record.rule) is (twice > 0 and not shift)


def test_where_real_patches_are_alike_more_is_asked() -> None:
    """What keeps a few outliers from blinding the gate leaves it as it is where likeness is the rule."""
    rng = np.random.default_rng(0)
    alike = np.tanh(rng.gumbel(0.35, 0.04, 4000))
    assert copy_threshold(alike) == max(0.6, np.quantile(alike, 0.999))
    stripes = np.tanh(rng.gumbel(1.2, 0.3, 500))
    assert copy_threshold(stripes) == np.quantile(stripes, 0.999)
    few = np.concatenate([alike[:36], np.full(4, 0.99)])
    assert copy_threshold(few) < 0.9
    assert copy_threshold(np.zeros(0)) == 0.6


def test_an_evaluation_says_that_a_picture_was_seen_in_training(world: World, tmp_path: Path) -> None:
    copied = shutil.copytree(world.real, tmp_path / "real")
    real = PatchDataset.open(copied)
    picture = np.full(len(real), -1)
    rows = [real.rows({"split_main": part})[0] for part in ("train", "test")]
    picture[rows] = 0
    index = real.index.assign(shared_picture=picture)
    write_folder(copied, real.info, index)
    study = open_study(world.settings("seen", real=str(copied)))
    assert any("1 pictures are in several parts of split 'main'" in text for text in study.warnings)
    assert len(set(study.patients[rows])) == 1
