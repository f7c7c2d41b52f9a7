"""What the experiment derives from its data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from parts import make_autoencoder, make_cohort, put_index, small_model

from latent_medi.core.config import build, load
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json
from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import DropoutSettings, ObjectiveSettings
from latent_medi.evaluation.fidelity.memorisation import TooManyCopies
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import KINDS, results
from latent_medi.experiment.kinds.datasets import _plan_of, make_plans
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import ExperimentModel, ExperimentSettings
from latent_medi.experiment.stages import Stages
from latent_medi.latents.autoencoder import load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.info import read_info
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.schema import Field, Schema
from latent_medi.planning.plan import write_plan
from latent_medi.planning.planner import make_plan
from latent_medi.planning.settings import PlanSettings
from latent_medi.shards.dataset import PatchDataset

SELECTING = ["shards", "audit", "encode", "train", "plan", "sample", "select", "evaluate"]


def test_few_patients_are_not_unseen(tmp_path: Path) -> None:
    """A combination with a training patch is generated as a seen one, however few its patients are."""
    make_cohort(tmp_path / "data", ("aster", "birch", "cedar"))
    settings = ExperimentSettings(data=str(tmp_path / "data"), seen_per_cell=3, unseen_per_cell=50)
    plan = make_plans(Experiment(settings))["medi"]
    assert set(plan["verdict"]) == {"thin"}
    assert set(plan["count"]) == {3}


def test_a_model_of_fewer_fields_has_seen_what_a_training_patch_shows(tmp_path: Path) -> None:
    """Thin alone does not say so: a combination that rests on a few patients is thin and has no patch."""
    shown = [("benign", "aster", "a"), ("benign", "birch", "a"), ("tumour", "aster", "b")]
    index = pd.DataFrame(shown * 3, columns=["class", "site", "race"])
    index = index.assign(patient=[f"p{i}" for i in range(9)])
    index = index.assign(key=index["patient"], slide=index["patient"])
    schema = Schema.from_table(index, "class", ["site", "race"])
    whole = make_plan(index, schema, PlanSettings(goal="each", per_cell=2)).table
    for known, unseen in ((["class", "site"], {("tumour", "birch")}), (["class"], set()), ([], set())):
        plan = _plan_of("small", known, whole, index, schema, 0)
        assert {tuple(row[n] for n in known) for row in plan.to_dict("records") if row["verdict"] != "seen"} == unseen


def test_ages_are_those_of_the_combination_or_else_of_its_class(tmp_path: Path) -> None:
    """A class of children is never asked for at 79, also at a hospital that has none of them, or few."""
    from latent_medi.planning.plan import check_plan, read_plan, sample_at

    dataset = make_cohort(tmp_path / "data", ("aster", "birch", "cedar"))
    index = dataset.index
    index["age"] = [
        5 + i % 10 if row["class"] == "benign" else 40 + i % 40 for i, row in enumerate(index.to_dict("records"))
    ]
    index = index[~((index["class"] == "benign") & (index["site"] == "cedar"))]  # held out
    for thin, few in ((1, "cell"), (100, "class")):
        asked = PlanSettings(goal="each", per_cell=200, draw_from="cell", fields=["class", "site"], thin_patients=thin)
        planned = make_plan(index, dataset.schema, asked).table
        write_plan(planned, tmp_path / "plan.csv")
        at = {(row["class"], row["site"]): row["age_from"] for row in planned.to_dict("records")}
        assert at["benign", "cedar"] == "class"
        assert at["benign", "aster"] == few
        plan = read_plan(tmp_path / "plan.csv", dataset.schema)
        assert "age_from" not in plan
        ends = plan["count"].cumsum().to_numpy()
        for position in range(0, int(ends[-1]), 7):
            sample = sample_at(plan, dataset.schema, position, ends).fields
            if sample["age"] != "unknown":
                assert (5 <= sample["age"] <= 14) == (sample["class"] == "benign"), sample
        check_plan(planned, dataset.schema)


def test_a_run_draws_from_the_combination_and_the_demo_from_all(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", ("aster", "birch"))
    plans = {}
    for draw_from in ("cell", "all"):
        settings = ExperimentSettings(data=str(tmp_path / "data"), seen_per_cell=3, draw_from=draw_from)
        plans[draw_from] = make_plans(Experiment(settings))["medi"]
    assert ExperimentSettings().draw_from == "cell"
    assert load(ExperimentSettings, "demo/experiment")["draw_from"] == "all"
    assert set(plans["cell"].columns) - set(plans["all"].columns) == {"age_quantiles", "age_unknown", "age_from"}
    assert plans["all"].equals(plans["cell"][plans["all"].columns])


def given_model(folder: Path, shown: list[list[str | int]]) -> Path:
    """A model folder that says what it was shown."""
    save_autoencoder(make_autoencoder(), folder / "autoencoder")
    schema = Schema((Field("class", "class", ("benign", "tumour")), Field("site", "categorical", ("aster", "birch"))))
    network = small_model()
    conditioner = MetadataConditioner(schema.to_dict(), network.embed_dim, dropout_patterns=asdict(DropoutSettings()))
    MediPipeline.from_parts(
        Denoiser(build_unet(network, 4, 8, conditional=True), conditioner),
        ObjectiveSettings(),
        load_autoencoder(str(folder / "autoencoder")),
        torch.zeros(4),
        torch.ones(4),
        {"seen": {"complete": True, "parts": [{"fields": ["class", "site"], "rows": shown}]}},
    ).save_pretrained(folder / "model")
    return folder / "model"


def test_given_models_are_looked_at_before_anything_runs(tmp_path: Path) -> None:
    held_out = [{"class": "tumour", "site": "birch"}]
    shown = given_model(tmp_path / "shown", [["tumour", "birch", 9]])
    own = given_model(tmp_path / "out" / "cls", [["tumour", "aster", 9]])
    for folder, why in (
        (tmp_path / "absent", "absent"),
        (shown, "was trained on patches of tumour × birch"),
        (own, r"models\.medi.*out/cls"),
    ):
        models = {"medi": ExperimentModel(folder=str(folder)), "cls": ExperimentModel(config="demo/cls")}
        with pytest.raises(UserError, match=why):
            run(ExperimentSettings(out=str(tmp_path / "out"), held_out=held_out, models=models))
    assert (own / "model_index.json").is_file()
    assert not (tmp_path / "out" / "stages").exists()


def test_what_follows_from_a_split_is_made_anew_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patients who move from training to test would otherwise be judged with a model that was trained on them."""
    dataset = make_cohort(tmp_path / "data", ("aster", "birch"))
    settings = ExperimentSettings(
        out=str(tmp_path / "out"), data=str(tmp_path / "data"), held_out=[{"class": "tumour", "site": "birch"}]
    )

    def inputs() -> dict[str, Any]:
        found: dict[str, Any] = {}

        def noted(stages: Stages) -> None:
            if "report" in stages._stages:
                found.update({name: stages._made_from(name) for name in stages._stages})
                raise InterruptedError

        with monkeypatch.context() as patched:
            patched.setattr(Stages, "check", noted)
            with pytest.raises(InterruptedError):
                run(settings)
        return found

    before = inputs()
    dataset.add_split("other", ["train"] * len(dataset), {})
    assert inputs() == before
    first = dataset.index["patient"].iloc[0]
    dataset.add_split("main", ["test" if p == first else "train" for p in dataset.index["patient"]], {}, replace=True)
    after = inputs()
    assert {name for name in before if after[name] == before[name]} == {"shards", "encode"}
    settings.train, settings.generate.device_batch = {"device_batch": 3, "log_every_images": 9}, 7
    settings.evaluate = {"batch": 5}
    assert inputs() == after  # speed and memory alone
    settings.encode = {"device_batch": 8, "workers": 1, "slicing": True, "device": "cpu"}
    settings.encode["reconstruction_error"] = {"patches": 0}
    assert inputs() == after
    assert after["encode"]["encode"] == {"autoencoder": "demo"}  # as earlier versions noted it
    settings.encode = {"precision": "bf16"}
    changed = inputs()
    kept = {"shards", "audit", "plan"}
    assert {name for name in before if changed[name] == after[name]} == kept
    settings.encode = {"views": 8}
    assert {name for name, made_from in inputs().items() if made_from == after[name]} == kept
    settings.encode = {}
    settings.held_out = [{"class": "benign", "site": "birch"}]
    assert {name for name, made_from in inputs().items() if made_from != after[name]} == {"audit", "evaluate", "report"}


def test_what_would_end_the_evaluation_is_told_before_anything_is_trained(tiny: Path, tmp_path: Path) -> None:
    dataset = PatchDataset.open(tiny / "data")
    last = dataset.index.iloc[-1]
    there = {"data": str(tiny / "data"), "held_out": [{"class": last["class"], "site": last["site"]}]}
    judged = {"evaluate": {"unseen": False}}
    contradictory = tmp_path / "own.yaml"
    contradictory.write_text("base: prostate/medi\nmodel: {preset: L}\n")
    for changes, why in (
        ({"split": "wilds"}, "has no split 'wilds'"),
        ({"held_out": []}, "No held-out combination is given"),
        ({}, "is not held out: .* training patches have it"),
        (judged | {"site_field": "hospital"}, "has no field 'hospital'"),
        (judged | {"encoders": ["squeezenet"]}, "'squeezenet' needs its weights"),
        (
            judged | {"models": {"medi": {"config": "demo/medi", "train": {"model": {"fields": ["sight"]}}}}},
            "medi is conditioned on 'sight'.*'site'",
        ),
        (judged | {"encoders": ["demo", "demo"]}, "demo, demo"),
        ({"evaluate": {"unseen": False, "max_copy_rate": 2.0}}, "max_copy_rate is 2"),
        ({"evaluate": {"unseen": False, "deal": 3}}, "unknown setting 'evaluate.deal'"),
        ({"evaluate": {"unseen": False, "protocol": "papers"}}, "protocol is 'papers'"),
        ({"evaluate": {"unseen": False, "classifier": "cnnn"}}, "classifier is 'cnnn'"),
        ({"evaluate": {"unseen": False, "training_sets": ["rael"]}}, "'rael'.*'real'"),
        ({"evaluate": {"unseen": False, "classifier": "cnn", "cnn": {"network": "resnet81"}}}, "'resnet81'"),
        ({"evaluate": {"unseen": False, "downstream_protocol": "histodiffusion"}}, "stage select before evaluate"),
        (judged | {"evaluate": {"unseen": False, "candidate": "mdei"}}, "candidate is 'mdei'.*'medi'"),
        (judged | {"stages": SELECTING, "select": {"share": 3.0}}, "share is 3.0"),
        (judged | {"stages": SELECTING, "evaluate": {"unseen": False, "selected": {"mdei": "x"}}}, "'mdei'"),
        (judged | {"generate": {"guidance": {"scales": {"sit": 3.0}}}}, "'sit'.*'site'"),
        (judged | {"plan": {"goal": "all_sites_of_classes", "ratio": 1.0, "per_cell": 3}}, "per_cell"),
        (judged | {"generate": {"sampler": {"name": "ddim", "steps": 30}}}, "ddim steps must divide"),
        (judged | {"train": {"max_images": 80, "max_steps": 5}}, "give max_images or max_steps, one of them"),
        (
            judged
            | {
                "generate": {"guidance": {"form": "chain", "scales": {"class": 3.0}}},
                "train": {"dropout": {"keep_all": 1.0, "all_null": 0.0, "metadata_null": 0.0, "independent": 0.0}},
            },
            "guidance.form=chain cannot be used",
        ),
        (
            judged | {"models": {"medi": {"config": str(contradictory)}}},
            "sets block_out_channels and attention",
        ),
    ):
        with pytest.raises(UserError, match=why):
            run(build(ExperimentSettings, {"out": str(tmp_path / "out")} | there | changes))
        assert not (tmp_path / "out" / "audit.json").exists()


def test_reconstructions_are_judged_by_the_encoder_of_the_evaluation(tiny: Path, tmp_path: Path) -> None:
    words = {"data": str(tiny / "data"), "out": str(tmp_path), "encoders": ["squeezenet"]}
    words["weights"] = {"squeezenet": "file.pth"}
    found = Experiment(build(ExperimentSettings, words)).encodings[""].reconstruction_error
    assert (found.encoder, found.weights) == ("squeezenet", "file.pth")
    words["stages"] = ["encode", "train"]  # another encoder may not be at hand
    assert Experiment(build(ExperimentSettings, words)).encodings[""].reconstruction_error.encoder == "demo"


def test_a_run_encodes_in_another_process_and_as_it_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What encodes in this process would hold a GPU's memory while another one trains there."""
    monkeypatch.setattr("latent_medi.latents.encode.encode", lambda settings: pytest.fail("encoded in this process"))
    given = {"precision": "bf16", "reconstruction_error": {"patches": 0}}
    settings = build(ExperimentSettings, {"data": str(tiny / "data"), "out": str(tmp_path / "out"), "encode": given})
    KINDS["encode"](Experiment(settings)).action()
    info = read_info(tmp_path / "out" / "latents")
    assert info["autoencoder"]["precision"] == "bfloat16"
    assert "floor" not in info
    assert load(EncodeSettings, str(tmp_path / "out" / "encode.yaml"))["device_batch"] == 16
    # The demo's numbers are those of the batch that it always had.
    assert load(ExperimentSettings, "demo/experiment")["encode"] == {"device_batch": 64}
    with pytest.raises(UserError, match=r"unknown setting 'encode\.precison'"):
        build(ExperimentSettings, {"encode": {"precison": "bf16"}})
    with pytest.raises(UserError, match=r"views .* not 3"):
        run(build(ExperimentSettings, {"out": str(tmp_path / "bad"), "encode": {"views": 3}}))
    with pytest.raises(UserError, match="holds latents encoded in bfloat16, not float32"):
        encode_dataset(tiny / "data", load_autoencoder("demo"), tmp_path / "out" / "latents")


def test_an_evaluation_leaves_no_memory_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another experiment of the same process trains in processes of its own, on the same GPU."""
    experiment = Experiment(ExperimentSettings(data=str(tiny / "data"), out=str(tmp_path / "out")))
    done: list[str] = []
    monkeypatch.setattr("latent_medi.evaluation.evaluate.evaluate", lambda settings: done.append("evaluate"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    KINDS["evaluate"](experiment).action()
    assert done == ["evaluate", "emptied"]


def test_copies_end_the_run_and_are_shown(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(ExperimentSettings(data=str(tiny / "data"), out=str(tmp_path / "out")))
    done: list[str] = []

    def judge(settings: EvaluateSettings) -> None:
        done.append("evaluate")
        raise TooManyCopies("9 of 10 patches of medi are copies")

    monkeypatch.setattr("latent_medi.evaluation.evaluate.evaluate", judge)
    monkeypatch.setattr(results, "_report", lambda _: done.append("report"))
    with pytest.raises(TooManyCopies):
        KINDS["evaluate"](experiment).action()
    assert done == ["evaluate", "report"]


def test_what_training_patches_cannot_tell_is_not_held_out(tmp_path: Path) -> None:
    """Every tumour at one hospital and every benign patch at another: nothing says which of both one sees."""
    make_cohort(tmp_path / "data", ("aster", "birch"))
    index = pd.read_parquet(tmp_path / "data" / "index.parquet")
    index["patient"] += index["class"] + index["site"]
    put_index(tmp_path / "data", index)
    dataset = PatchDataset.open(tmp_path / "data")
    linked = (index["class"] == "tumour") == (index["site"] == "aster")
    dataset.add_split("tied", ["train" if seen else "test" for seen in linked], {})
    held_out = [{"class": "tumour", "site": "birch"}]
    settings = ExperimentSettings(
        out=str(tmp_path / "out"), data=str(tmp_path / "data"), split="tied", held_out=held_out
    )
    with pytest.raises(UserError, match=r"tumour × birch cannot be generated .* no chain of seen combinations links"):
        run(settings)


def test_nothing_is_removed_for_settings_that_cannot_be_followed(tiny: Path, tmp_path: Path) -> None:
    """Told to replace what it has, a run first looks whether it could."""
    dataset = PatchDataset.open(tiny / "data")
    last = dataset.index.iloc[-1]
    out = tmp_path / "out"
    for name in ("medi", "cls", "synthetic/medi"):
        (out / name).mkdir(parents=True)
    for name in ("train", "sample"):
        write_json(out / "stages" / f"{name}.json", {"made_from": {name: "other settings"}, "seconds": 1.0})
    (out / "settings.yaml").write_text("title: as it was\n")
    values = {
        "out": str(out),
        "data": str(tiny / "data"),
        "replace": True,
        "evaluate": {"unseen": False},
        "held_out": [{"class": last["class"], "site": last["site"]}],
    }
    with pytest.raises(UserError, match="has no split 'mian'"):
        run(build(ExperimentSettings, values | {"split": "mian"}))
    assert all((out / name).is_dir() for name in ("medi", "cls", "synthetic/medi"))
    assert (out / "settings.yaml").read_text() == "title: as it was\n"
    with pytest.raises(UserError, match=r"medi, .*cls, .*synthetic/medi were made from other inputs"):
        run(build(ExperimentSettings, values | {"replace": False}))
