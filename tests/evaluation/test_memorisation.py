"""A generator that repeats training patients is found, its copies are listed, and the gate fails the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import SCHEMA, SIZE, World, filters, synthetic_patches
from parts import put_index

from latent_medi.cli import main
from latent_medi.errors import UserError
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.fidelity import Features
from latent_medi.evaluation.memorisation import CopyFinder, _Authentic, _percent_authentic, find_copies
from latent_medi.evaluation.study import Study, open_study
from latent_medi.features.likeness import small_patches
from latent_medi.features.statistics import pca_basis
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writer import write_dataset

QUIET: dict[str, Any] = {"downstream": False, "resamples": 20, "memorisation": True}


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
        found = record["arms"][arm]
        # Stripes are alike wherever their angle is: a few patches of other real patients count as copies too.
        assert found["copy_rate"]["value"] < 0.03
        assert found["copy_rate"]["interval"][1] < 0.05
        assert len(found["listed"]) == 24  # the most alike are shown, copies or not
        assert sum(pair["copy"] for pair in found["listed"]) == found["copies"]
        assert abs(found["auth_pct"]["value"] - record["held_out_auth_pct"]["value"]) < 15
        assert found["ct"]["value"] > -3
    assert record["held_out_flagged"]["value"] <= 0.01
    seen = [cell for cell in record["arms"]["medi"]["cells"] if cell["n_bank"]]
    assert 0.3 < np.mean([cell["nearer_train"] for cell in seen]) < 0.7
    unseen = next(c for c in record["arms"]["medi"]["cells"] if c["name"] == "stripes × south")
    assert (unseen["n_bank"], unseen["nearer_train"]) == (0, None)


def test_copies_are_counted_and_listed_with_their_originals(world: World, thief: Path) -> None:
    settings = world.settings("thief", synthetic={"medi": str(thief)}, **QUIET)
    found = evaluate(settings, [filters()])["memorisation"]["filters"]["arms"]["medi"]
    assert 72 <= found["copies"] <= 72 + 7
    copies = [pair for pair in found["listed"] if pair["copy"]]
    assert len(copies) == found["copies"]
    assert sum(cell["copies"] for cell in found["cells"]) == found["copies"]
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
    named = evaluate(replace(settings, patient_names=True), [filters()])["memorisation"]["filters"]["arms"]["medi"]
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
    stolen = np.array([int(key.partition("/")[2]) % 10 == 0 for key in study.arms["medi"].index["key"]])
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
    with pytest.raises(UserError, match="memorisation=false looks for no copies"):
        evaluate(replace(settings, max_copy_rate=0.09, memorisation=False), [filters()])
    with pytest.raises(UserError, match=r"max_copy_rate is 1\.5"):
        evaluate(replace(settings, max_copy_rate=1.5), [filters()])
    out = tmp_path / "out"
    words = ["evaluate", f"real={world.real}", f"synthetic.medi={thief}", f"out={out}", "encoders=[demo]", "deals=0"]
    words += ["held_out=[{class: stripes, site: south}]", "downstream=false", "colour_free=false", "resamples=20"]
    assert main([*words, "--max-copy-rate", "0.05"]) == 2
    assert "are copies of training patches" in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text("utf-8"))["memorisation"]["demo"]["arms"]["medi"]["copies"] >= 72


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
        found = _percent_authentic(_Authentic(cast(Study, study), features), rng.normal(size=(5, 4)) + 20)
        assert (found["value"] is not None) is known
        assert not known or found["value"] == 100.0
