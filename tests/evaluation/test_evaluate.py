"""The record as a whole: what it holds, what it refuses, and that it is reproducible."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_world import (
    CLASSES,
    HELD_OUT,
    SCHEMA,
    SIZE,
    Size,
    World,
    build_world,
    evaluated,
    filters,
    real_patches,
    synthetic_patches,
    write_real,
)
from parts import put_index
from safetensors import safe_open

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.evaluate import _remove_outdated, evaluate
from latent_medi.evaluation.results import Metrics, metrics_of
from latent_medi.evaluation.summary import headline, headline_json, headline_text
from latent_medi.features.cache import dataset_hash
from latent_medi.features.encoders import ImageEncoder
from latent_medi.metadata.training_record import training_record
from latent_medi.report.render import render_report
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import write_dataset


def _measures(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        own = [value] if {"value", "n_patches", "n_patients", "interval"} <= value.keys() else []
        return own + [m for v in value.values() for m in _measures(v)]
    return [m for v in value for m in _measures(v)] if isinstance(value, list) else []


def test_the_file_is_the_record(world: World, metrics: dict[str, Any]) -> None:
    folder = world.root / "full"
    text = (folder / "metrics.json").read_text()
    assert "NaN" not in text
    assert {key: value for key, value in json.loads(text).items() if key != "seal"} == metrics
    assert {p.name for p in (folder / "reference").iterdir()} == {
        "filters.safetensors",
        "filters-haematoxylin.safetensors",
    }
    with safe_open(folder / "reference" / "filters.safetensors", "numpy") as file:
        assert file.metadata()["fingerprint"] == metrics["encoders"]["filters"]["fingerprint"]
        real = PatchDataset.open(folder / metrics["settings"]["real"])
        assert file.metadata()["dataset_sha256"] == dataset_hash(real)
        assert int(file.metadata()["n_patches"]) == int(file.get_tensor("n")[0])
    run = metrics["run"]
    assert run["command"]
    assert run["seed"] == 0
    assert "git_revision" in run
    for name, encoder in metrics["encoders"].items():
        assert metrics["fidelity"][name]["fingerprint"] == encoder["fingerprint"]


def test_every_number_has_its_support(metrics: dict[str, Any]) -> None:
    found = _measures({k: metrics[k] for k in ("fidelity", "adherence", "downstream")})
    assert len(found) > 100
    for number in found:
        if number["value"] is not None and number.get("interval_over") != "samples":
            assert number["n_patients"] > 0
            if number.get("smallest_group", number["n_patients"]) < 10 or number["n_patients"] < 10:
                assert number["interval"] in ("not estimable", None)
            elif "reason" in number:
                assert number["interval"] == "not estimable"
            else:
                low, high = number["interval"]
                assert low <= high


def test_headline_has_the_promised_shape(results: Metrics) -> None:
    record = headline(results)
    assert record == results.headline
    content = headline_json(record)
    for key in ("distance_unseen", "distance_unseen_colour_free", "distance_per_class"):
        row = content[key]
        assert row["metric"] == "kid"
        if key != "distance_unseen_colour_free":  # where class alone may be as near as real patients are
            assert row["ratio"] == pytest.approx(row["medi"] / row["cls"], abs=0.05)  # less the jackknife's bias
            assert row["ratio_interval"][0] < row["ratio"] < row["ratio_interval"][1]
        assert {"real", "frechet_ratio", "frechet_perfect", "left_out"} <= row.keys()
    assert set(content["accuracy_shift"]) == {"real", "oversample", "stain_transfer", "cls", "medi", "oracle"}
    assert set(content["accuracy_shift_difference"]) == {"real", "oversample", "stain_transfer", "cls"}
    assert {"accuracy_shift", "accuracy_unseen", "medi_minus", "interval"} == set(content["further_arms"]["reweight"])
    assert set(content["recovery_unseen"]) == {"site", "class"}
    assert content["recovery_unseen"]["site"] > 0.9
    assert abs(content["recovery_unseen"]["class"] - content["recovery_ceiling"]["class"]) < 0.2
    assert headline(results, {"train": 12.0}).seconds.keys() == {"train", "evaluate"}
    assert headline(results, {"evaluate": 12.0}).seconds == {"evaluate": 12.0}
    text = headline_text(results, record)
    assert record.warnings == []
    assert "Warning" not in text
    assert "not compared" not in text
    assert max(len(line) for line in text.splitlines()[:-1]) <= 110
    assert text.splitlines()[-1] == record.verdict.sentence


def test_adherence_has_ceiling_chance_and_confusion(metrics: dict[str, Any]) -> None:
    site = metrics["adherence"]["filters"]["fields"]["site"]
    assert site["chance"] == pytest.approx(1 / 3)
    assert site["real"]["value"] > 0.9
    assert site["synthetic"]["cls"]["conditioned"] is False
    assert site["synthetic"]["cls"]["value"] < 0.5
    assert np.sum(site["confusion"]["medi"][0]) == pytest.approx(1.0)
    assert "preparation" in metrics["adherence"]["filters"]["fields"]


def test_a_second_run_gives_the_same_numbers(world: World) -> None:
    arms = ["real", "stain_transfer", "medi", "reweight"]
    runs = [
        evaluated(
            world.settings("again", repeats=1, real_splits=20, memorisation=True, training_sets=arms),
            [filters()],
        )
        for _ in range(2)
    ]
    for run in runs:
        del run["run"]["date"], run["seconds"], run["headline"]["seconds"]
    assert runs[0] == runs[1]


def test_patches_can_be_embedded_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_world(tmp_path, Size(5, 5, 5, 2), count=4)
    settings = world.settings("later", encoders=["demo"], downstream=False, colour_free=True)
    words = [f"{name}={value}" for name, value in (("real", world.real), ("out", settings.out))]
    words += [f"synthetic={{medi: {world.medi}, cls: {world.cls}}}", f"cache={settings.cache}", "encoders=[demo]"]
    assert main(["evaluate", "--embed", *words, "downstream=false", "held_out=[]", "unseen=false"]) == 0
    assert len(list(Path(settings.cache).iterdir())) == 6  # three datasets in two feature spaces
    assert not Path(settings.out).exists()
    monkeypatch.setattr(ImageEncoder, "features", lambda *_: pytest.fail("embedded again"))
    assert evaluated(settings, None)["fidelity"].keys() == {"demo", "demo:haematoxylin"}


def test_without_probe_patients(world: World) -> None:
    folder = world.root / "no-probe"
    write_real(folder, Size(train=8, test=6, patches=10), merge_probe=True)
    result = evaluated(world.settings("no-probe-out", real=str(folder), repeats=1), [filters()])
    assert result["headline"]["accuracy_shift"]["oracle"] is None
    assert "probe" in result["downstream"]["filters"]["unavailable"]["oracle"]
    assert result["fidelity"]["filters"]["unseen"]["means"]["real"]["value"] is not None
    assert "half of the test patients" in result["notes"][0]
    study = open_study(world.settings("x", real=str(folder)))
    assert set(study.patients[study.reference]).isdisjoint(study.patients[study.probe])
    assert set(study.patients[study.train]).isdisjoint(study.patients[study.test])
    cell = result["fidelity"]["filters"]["unseen"]["combinations"][0]
    assert cell["n_patients"] == 3
    assert cell["sources"]["medi"]["interval"] == "not estimable"


def test_rivals_can_be_judged_without_samples(world: World) -> None:
    result = evaluated(world.settings("rivals", synthetic={}, repeats=1), [filters()])
    assert result["headline"]["accuracy_shift"]["oracle"] > result["headline"]["accuracy_shift"]["real"]
    assert result["headline"]["accuracy_shift"]["medi"] is None
    assert result["headline"]["distance_unseen"]["ratio"] is None


def test_patches_can_be_judged_where_nothing_is_held_out(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    settings = world.settings("whole", held_out=[], downstream=False, memorisation=True)
    result = evaluated(settings, [filters()])
    whole = result["fidelity"]["filters"]["whole"]["means"]
    assert whole["medi"]["value"] < whole["cls"]["value"]
    assert whole["real"]["n_patients"] > 10
    assert whole["real"]["interval"][0] < whole["real"]["value"] < whole["real"]["interval"][1]
    assert result["memorisation"]["filters"]["synthetic"]["medi"]["copies"] is not None
    read = metrics_of(result)
    text = headline_text(read, headline(read))
    assert "per class, all sites" in text
    assert "unseen" not in text
    assert "–" not in text.split("ratio = ")[0]


def test_only_what_a_selection_chose_takes_part(world: World, tmp_path: Path) -> None:
    """A column of an arm gives what a dataset of those patches alone gives."""
    patches = list(synthetic_patches(24, {"south": "east"}, False)) + list(synthetic_patches(24, None, False, seed=2))
    patches = [replace(p, key=f"{i}-{p.key}") for i, p in enumerate(patches)]
    right = np.arange(len(patches)) >= len(patches) // 2
    both = write_dataset(tmp_path / "both", patches, "medi", SCHEMA, SIZE, 0.5)
    both.add_selection("best", {"": right}, {}, {})
    write_dataset(tmp_path / "right", patches[len(patches) // 2 :], "medi", SCHEMA, SIZE, 0.5)
    runs = []
    for folder, column in (("both", {"medi": "selected_best"}), ("right", {}), ("both", {})):
        settings = world.settings("selected", repeats=1, synthetic={"medi": str(tmp_path / folder)}, selected=column)
        runs.append(evaluated(settings, [filters()]))
    for part in ("fidelity", "adherence", "downstream"):
        assert runs[0][part] == runs[1][part]
    assert runs[0]["synthetic"]["medi"]["n_patches"] == int(right.sum())
    assert runs[0]["synthetic"]["medi"]["n_unselected"] == len(patches)
    assert runs[0]["headline"]["recovery_site"]["found"] > runs[2]["headline"]["recovery_site"]["found"] + 0.2


def test_bad_input_is_refused(world: World, tmp_path: Path) -> None:
    def refuse(match: str, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            open_study(world.settings("bad", **changes))

    refuse("held-out", held_out=[])
    refuse("not held out", held_out=[{"class": "blobs", "site": "east"}])
    refuse("stripes", held_out=[{"class": "strips", "site": "south"}])
    refuse("site", held_out=[{"sight": "south"}])
    refuse("categorical", held_out=[{"age": "60"}])
    refuse("main", split="mian")
    refuse("site", site_field="sight")
    refuse("no 'training' patches", train_value="training")
    refuse("holds real patches", synthetic={"medi": str(world.real)})
    refuse("no selection 'selected_best'", selected={"medi": "selected_best"})
    refuse("'media'.*closest: 'medi'", selected={"media": "selected_best"})

    mixed = list(real_patches(Size(2, 2, 2, 1))) + list(synthetic_patches(1, None, False))
    split = {p.patient: p.patient.split("-")[0] if p.origin == "real" else "" for p in mixed}
    write_dataset(tmp_path / "mixed", mixed, "mixed", SCHEMA, SIZE, 0.5, splits={"main": (split, {})})
    refuse("18 synthetic", real=str(tmp_path / "mixed"))

    no_test = [p for p in real_patches(Size(2, 2, 2, 1)) if not p.patient.startswith("test-stripes-south")]
    split = {p.patient: p.patient.split("-")[0] for p in no_test}
    write_dataset(tmp_path / "no-test", no_test, "no-test", SCHEMA, SIZE, 0.5, splits={"main": (split, {})})
    refuse("no test patch", real=str(tmp_path / "no-test"), held_out=HELD_OUT[:1])


def test_without_stain_transfer_nobody_is_called_useful(world: World) -> None:
    """Only the named training sets are built, and MeDi is compared with those."""
    result = evaluate(world.settings("few", repeats=1, training_sets=["medi", "reweight"]), [filters()])
    assert result.headline is not None
    assert result.headline.verdict.answer == "no verdict"
    assert "stain transfer was not tried" in result.headline.verdict.reasons


def test_patches_without_a_class_take_no_part(world: World) -> None:
    folder = world.root / "no-class"
    copied = shutil.copytree(world.real, folder)
    table = pd.read_parquet(copied / "index.parquet")
    gone = table["patient"].isin([table["patient"].iloc[0], table["patient"].iloc[-1]])
    table.loc[gone, "class"] = "unknown"
    put_index(copied, table)
    result = evaluated(world.settings("no-class-out", real=str(folder), repeats=1), [filters()])
    assert (
        f"{gone.sum()} real patches without a known class take no part, but copies of them are looked for."
        in result["notes"]
    )
    assert result["downstream"]["filters"]["classes"] == list(CLASSES)


def test_what_an_earlier_evaluation_made_is_known_by_its_record(results: Metrics, world: World, tmp_path: Path) -> None:
    """The full evaluation wrote predictions and the statistics of two encoders; no protocol was followed."""
    shutil.copytree(world.root / "full", tmp_path / "full", ignore=shutil.ignore_patterns("features"))
    out = tmp_path / "full"
    (out / "medi_results.csv").write_text("a user's own")
    assert (out / "predictions.csv").is_file()
    assert len(list((out / "reference").iterdir())) == 2
    _remove_outdated(out, ["per_class_distance.csv"], [filters()])
    assert not (out / "predictions.csv").exists()
    assert [path.name for path in (out / "reference").iterdir()] == ["filters.safetensors"]
    assert {"medi_results.csv", "per_class_distance.csv"} <= {path.name for path in out.iterdir()}


def test_one_class_alone_can_be_judged_but_not_told_apart(world: World) -> None:
    folder = world.root / "stripes"
    write_real(folder, Size(), classes=["stripes"])
    with pytest.raises(UserError, match=r"class = stripes.*\n.*downstream=false"):
        evaluate(world.settings("stripes-out", real=str(folder), held_out=HELD_OUT[:1]), [filters()])
    settings = world.settings("stripes-out", real=str(folder), held_out=HELD_OUT[:1], downstream=False, real_splits=20)
    result = evaluated(settings, [filters()])
    assert "class_mix" not in result["fidelity"]["filters"]["real_splits"]["synthetic"]["medi"]


def test_two_encoders_of_one_name_are_refused(world: World) -> None:
    with pytest.raises(UserError, match="filters, filters"):
        evaluate(world.settings("twice"), [filters(), filters(60)])


def test_a_model_that_was_shown_a_held_out_combination_is_refused(world: World, tmp_path: Path) -> None:
    index = PatchDataset.open(world.real).index
    train = index[index["split_main"] == "train"]
    honest = training_record(train, SCHEMA)
    shown = training_record(pd.concat([train, index[index["class"].eq("stripes") & index["site"].eq("south")]]), SCHEMA)
    for name, record in (("honest", honest), ("shown", shown)):
        patches, seen = list(synthetic_patches(2, None, False)), {"seen": record}
        write_dataset(tmp_path / name, patches, name, SCHEMA, SIZE, 0.5, provenance=seen)
    arms = {"medi": str(tmp_path / "honest")}
    assert not [note for note in open_study(world.settings("seen", synthetic=arms)).notes if "do not record" in note]
    of_others = "trained on other patients than the 'train' part of split 'main'"
    assert open_study(world.settings("seen", synthetic=arms)).warnings == []
    again = tmp_path / "again"  # divided anew after the model was trained
    shutil.copytree(world.real, again)
    table = pd.read_parquet(again / "index.parquet")
    table.loc[table["patient"] == train["patient"].iloc[0], "split_main"] = "test"
    put_index(again, table)
    warned = open_study(world.settings("seen", real=str(again), synthetic=arms)).warnings
    assert [text for text in warned if of_others in text]
    before = {**honest, "parts": [{k: v for k, v in part.items() if k != "patients"} for part in honest["parts"]]}
    patches = list(synthetic_patches(2, None, False))
    write_dataset(tmp_path / "before", patches, "before", SCHEMA, SIZE, 0.5, provenance={"seen": before})
    earlier = open_study(world.settings("seen", real=str(again), synthetic={"medi": str(tmp_path / "before")}))
    assert earlier.warnings == []
    assert "The samples of medi do not record which patients their model was trained on." in earlier.notes
    unknown = open_study(world.settings("seen", synthetic={"cls": str(world.cls)}))
    assert [note for note in unknown.notes if "cls do not record" in note]
    bad = world.settings("seen", synthetic={"medi": str(tmp_path / "shown")})
    with pytest.raises(UserError, match=r"shown \(medi\) was trained on patches of stripes × south"):
        open_study(bad)
    assert open_study(replace(bad, unseen=False)).synthetic


def test_a_headline_is_not_read_without_what_limits_it(metrics: dict[str, Any]) -> None:
    changed = copy.deepcopy(metrics)
    encoder = next(iter(metrics["encoders"]))
    changed["warnings"] = ["Accuracy under shift has no interval: …"]
    changed["fidelity"][encoder]["per_class"]["left_out"] = {"rings": "medi: 12 samples match, fewer than 20"}
    read = metrics_of(changed)
    record = headline(read)
    assert record.warnings == ["Accuracy under shift has no interval: …"]
    text = headline_text(read, record)
    assert "Warning: Accuracy under shift has no interval" in text
    assert "not compared: rings (medi: 12 samples match, fewer than 20)" in text


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, entry in value.items() for text in (key, *_texts(entry))]
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry)]
    return [value] if isinstance(value, str) else []


def test_no_folder_of_this_machine_and_no_patient_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in the page that is made of it, which finds the patches all the same."""
    home = tmp_path / "Dr. Jones" / "study of liver"
    shutil.copytree(world.real, home / "real")
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["/usr/bin/latent-medi", "evaluate", "real=real", f"synthetic.medi={world.medi}"])
    out = home / "runs" / "first"
    settings = world.settings("x", real="real", out=str(out), memorisation=True, downstream=False)
    evaluate(settings, [filters()])
    text = (out / "metrics.json").read_text()
    record = json.loads(text)
    assert record["settings"]["real"] == record["dataset"]["folder"] == "../../real"
    assert record["settings"]["out"] == "."
    assert record["run"]["command"].startswith("latent-medi evaluate real=../../real synthetic.medi=../../")
    page = render_report(out / "metrics.json", out / "report.html").read_text()
    assert "Real and synthetic patches" in page
    index = PatchDataset.open(world.real).index
    named = {*index["patient"], *index["key"]}
    for content in (text, page):
        assert "Jones" not in content
        assert str(world.root.parent) not in content
        assert not [name for name in named if name in content]
    assert not [found for found in _texts(record) if found.startswith("/")]
    assert record["memorisation"]["filters"]["synthetic"]["medi"]["listed"]
