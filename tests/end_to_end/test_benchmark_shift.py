"""The shift benchmark from a dataset folder to its curve: splits, latents, training, samples and judges, all real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from evaluation_world import SCHEMA, SIZE, Size, real_patches
from experiment_parts import NETWORK

from latent_medi.cli import main
from latent_medi.evaluation.cohort.roles import synthetic_roles
from latent_medi.evaluation.downstream.registry import KINDS, names_of
from latent_medi.metadata.training_record import was_trained_on
from latent_medi.shards.writing.writer import write_dataset

TRAIN = {"max_steps": 3, "global_batch": 8, "log_every_images": 8, "model": NETWORK}


@pytest.mark.slow
def test_from_a_dataset_folder_to_the_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples after three steps are worthless; what counts is that every training set is scored at every level."""
    schema = SCHEMA.subset(["class", "site", "preparation"])
    patches = [replace(p, fields={name: p.fields[name] for name in schema.names}) for p in real_patches(Size())]
    split = {p.patient: p.patient.split("-")[0] for p in patches}
    write_dataset(tmp_path / "data", patches, "planted", schema, SIZE, 0.5, splits={"main": (split, {})})
    experiment = {
        "base": "demo/shift",
        "train": TRAIN,
        "seen_per_cell": 2,
        "unseen_per_cell": 24,
        "encoders": ["demo"],
        "plan_fields": ["class", "site"],
        "generate": {"sampler": {"steps": 3}},
        "evaluate": {"repeats": 1, "real_splits": 0, "colour_free": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    out = tmp_path / "shift"
    words = [
        "benchmark-shift",
        f"data={tmp_path / 'data'}",
        f"out={out}",
        "levels=[0, 1]",
        f"experiment={tmp_path / 'tiny.yaml'}",
        "rotation=1",
    ]
    assert main(words) == 0
    result = json.loads((out / "shift.json").read_text())
    assert [level["level"] for level in result["levels"]] == [0.0, 1.0]
    assert result["levels"][0]["n_patients"] == result["levels"][1]["n_patients"]
    assert result["levels"][0]["tie"] < result["levels"][1]["tie"]
    curve = names_of((kind for kind in KINDS if kind.plotted), synthetic_roles(["medi", "cls"]))
    for level in result["levels"]:
        assert set(curve) <= set(level["arms"]), level["arms"].keys()
        assert all(0 <= arm["accuracy_shift"] <= 1 for arm in level["arms"].values())
        assert {"medi", "cls", "real"} <= level["distance"].keys()
    assert set(pd.read_csv(out / "shift.csv")["arm"]) == set(curve)
    assert (out / "shift.png").stat().st_size > 10_000
    last = out / "level-1.000"
    shown = json.loads((last / "medi" / "model" / "provenance.json").read_text())["seen"]
    for target in result["targets"]:
        plan = pd.read_csv(last / "plan-medi.csv")
        row = plan[(plan["class"] == target["class"]) & (plan["site"] == target["site"])]
        assert row["count"].item() == 24
        assert row["verdict"].item() in ("both margins seen", "thin")
        assert was_trained_on(shown, target) is False
    capsys.readouterr()
    before = (last / "metrics.json").stat().st_mtime_ns
    assert main(words) == 0  # finished: read again, nothing is made anew
    assert (last / "metrics.json").stat().st_mtime_ns == before
