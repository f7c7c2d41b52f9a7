"""One runner for any list of stages over any number of named models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from evaluation_world import Size, write_real
from experiment_parts import NETWORK, TO_SAMPLE, small_experiment
from parts import make_cohort

from latent_medi.cli import main
from latent_medi.core.config import build
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import KINDS, declare
from latent_medi.experiment.kinds.datasets import make_plans
from latent_medi.experiment.kinds.results import longer_plan
from latent_medi.experiment.launching import Launching
from latent_medi.experiment.models import concerning, with_longer
from latent_medi.experiment.preflight import preflight
from latent_medi.experiment.run import run, run_changed
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.experiment.stages import Stage, Stages
from latent_medi.selection.result import CombinationCounts
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Experiment]:
    """Makes an experiment on a tiny dataset, given changes to its settings."""
    return lambda **values: Experiment(small_experiment(tmp_path, **values))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"models": {"data": {"config": "demo/medi"}}}, "'data'"),
        ({"models": {"latents-2": {"config": "demo/medi"}}}, "'latents-2'"),
        ({"models": {"a.b": {"config": "demo/medi"}}}, r"'a\.b'"),
        ({"models": {"mine": {}}}, "models.mine has neither config nor folder"),
        ({"models": {"mine": {"config": "demo/medi", "init_from": "bas"}, "base": {"config": "demo/cls"}}}, "'base'"),
        ({"models": {n: {"config": "demo/cls", "init_from": o} for n, o in ("ab", "ba")}}, "a → b → a"),
        ({"models": {"mine": {"config": "demo/medi", "split": "x"}}}, "models.mine.split"),
        ({"models": {"mine": {"config": "demo/medi", "sample": False}}}, "No model of the experiment is sampled"),
        ({"models": {"mine": {"config": "demo/medi", "classifier": "demo/classifier"}}}, "models.mine.*classifier"),
        ({"models": {"mine": "runs/m"}}, r"models.mine is 'runs/m'.*\n.*models\.NAME\.folder"),
        ({"stages": ["shards", "plan", "audit"]}, "in order"),
        ({"stages": ["shards", "shards"]}, "once"),
        ({"stages": []}, "stages is empty"),
        ({"stages": ["shards", "smaple"]}, r"stages\[1\].*'sample'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    experiment: Callable[..., Experiment], values: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        experiment(**values)


def test_a_stage_needs_those_whose_results_it_reads(experiment: Callable[..., Experiment]) -> None:
    for stages, absent in (
        (["shards", "train"], "encode"),
        (["shards", "plan", "sample"], "train"),
        (["plan"], "shar"),
    ):
        with pytest.raises(UserError, match=f"needs the stage '{absent}"):
            declare(experiment(stages=stages))
    with pytest.raises(UserError, match="needs the stage 'sample'"):
        declare(experiment(stages=["shards", "encode", "train", "plan", "evaluate"]))


def test_a_model_is_trained_after_the_one_that_it_starts_from(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = {"config": "demo/medi", "init_from": "base"}
    adapted = {"config": "demo/medi", "init_from": "tuned", "train": {"lora": {"rank": 2}}}
    base = {"config": "demo/medi", "train": {"model": {"fields": []}}, "data": str(tmp_path / "data")}
    models = {"adapted": adapted, "tuned": tuned, "plain": {"config": "demo/cls"}, "base": base | {"sample": False}}
    e = experiment(models=models)
    ran: list[list[str]] = []
    monkeypatch.setattr(e, "run_commands", lambda commands: ran.append(list(commands)))
    e.folder.mkdir()
    KINDS["train"](e).action()
    assert [sorted(names) for names in ran] == [["base", "plain"], ["tuned"], ["adapted"]]
    written = yaml.safe_load((e.folder / "train-tuned.yaml").read_text())
    assert written["init_from"] == str(e.folder / "base" / "model")
    assert (e.models["base"].fields, e.models["plain"].fields, e.models["tuned"].fields) == ([], ["class"], None)
    # Unlabelled tissue: every patch of a dataset of its own, encoded once for all models that train on it.
    written = yaml.safe_load((e.folder / "train-base.yaml").read_text())
    assert (written["split"], written["latents"]) == ("", str(e.folder / "latents-base"))
    assert [encoding.out for encoding in e.encodings.values()] == [str(e.folder / "latents"), written["latents"]]
    # An adapter's samples are those of the model that it changes, with it.
    generation = e.generation(e.models["adapted"])
    assert generation["model"] == str(e.folder / "tuned" / "model")
    assert generation["adapters"] == [str(e.folder / "adapted" / "adapter")]
    assert set(e.synthetic) == {"adapted", "tuned", "plain"}


def test_a_classifier_whose_batch_the_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", ("aster", "birch"))
    guided = {"config": "demo/medi", "classifier": "demo/classifier", "classifier_train": {"global_batch": 3}}
    values = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), "models": {"guided": guided}}
    values["stages"] = TO_SAMPLE
    e = Experiment(build(ExperimentSettings, values), Launching(2))
    declare(e)
    with pytest.raises(UserError, match=r"models\.guided\.classifier has a global_batch of 3, which 2 processes"):
        preflight(e)


def test_a_plan_has_the_fields_that_the_model_knows(experiment: Callable[..., Experiment]) -> None:
    fields = {"all": None, "both": ["class", "site"], "site": ["site"], "none": []}
    models: dict[str, Any] = {
        name: {"config": "demo/medi", "train": {"model": {"fields": known}}} for name, known in fields.items()
    }
    models["guided"] = models["none"] | {"classifier": "demo/classifier"}
    plans = make_plans(experiment(models=models, stages=[*TO_SAMPLE, "select", "evaluate", "report"]))
    assert {name: [c for c in plan if c in ("class", "site")] for name, plan in plans.items()} == {
        "all": ["class", "site"],
        "both": ["class", "site"],
        "site": ["site"],
        "none": [],
        "guided": ["class"],
    }
    assert {plan["count"].sum() for plan in plans.values()} == {4 * ExperimentSettings().seen_per_cell}
    union = make_plans(experiment(plan={"goal": "all_sites_of_classes", "per_cell": 7}))["medi"]
    assert set(union["count"]) == {7}


def test_guidance_scales_reach_the_models_that_know_their_fields(experiment: Callable[..., Experiment]) -> None:
    guidance = {"form": "chain", "scales": {"class": 2.0, "site": 3.0}, "order": ["site"]}
    own = {"generate": {"sampler": {"steps": 5}}}
    e = experiment(
        models={"all": {"config": "demo/medi"}, "one": {"config": "demo/cls"} | own}, generate={"guidance": guidance}
    )
    all_fields, one = (e.generation(e.models[name]) for name in ("all", "one"))
    assert (all_fields["guidance"]["scales"], all_fields["guidance"]["order"]) == ({"class": 2, "site": 3}, ["site"])
    assert (one["guidance"]["scales"], one["guidance"]["order"]) == ({"class": 2.0}, [])
    assert (all_fields["sampler"]["steps"], one["sampler"]["steps"]) == (20, 5)


def two_stages(folder: Path, ran: list[str], **models: Any) -> Stages:
    """Training and sampling of some models, as files."""

    def write(name: str) -> None:
        ran.append(name)
        for model in models:
            (folder / f"{name}-{model}").touch()

    stages = Stages(folder, ["train", "sample"], concerning)
    names = {name: {model: (f"{name}-{model}",) for model in models} for name in ("train", "sample")}
    stages.add("train", Stage(lambda: write("train"), models, by_model=names["train"], costly=True))
    stages.add("sample", Stage(lambda: write("sample"), 1, ("train",), by_model=names["sample"], costly=True))
    return stages


def test_a_changed_model_leaves_the_others(tmp_path: Path) -> None:
    ran: list[str] = []
    two_stages(tmp_path, ran, a={"steps": 1}, b={"steps": 1}).run("train", "sample")
    made = {path.name: path.stat().st_ino for path in tmp_path.glob("*-*")}
    with pytest.raises(UserError, match=r"train-b, .*sample-b were made from other inputs: train.b.steps was 1, is 2"):
        two_stages(tmp_path, ran, a={"steps": 1}, b={"steps": 2}).check()
    # A further model removes nothing, and neither does one less.
    more = two_stages(tmp_path, ran, a={"steps": 1}, b={"steps": 1}, c={"steps": 1})
    more.check()
    more.run("train", "sample")
    assert {name: (tmp_path / name).stat().st_ino for name in made} == made
    assert (tmp_path / "sample-c").exists()
    two_stages(tmp_path, ran, a={"steps": 1}).check()
    assert ran == ["train", "sample"] * 2
    (tmp_path / "train-a").write_text("kept")
    changed = two_stages(tmp_path, ran, a={"steps": 1}, b={"steps": 2}, c={"steps": 1})
    (tmp_path / "train-b").write_text("removed")
    changed.run("train")
    assert [(tmp_path / f"train-{name}").read_text() for name in "ab"] == ["kept", ""]


def test_a_longer_run_is_continued_and_its_samples_are_kept_aside(tmp_path: Path) -> None:
    ran: list[str] = []

    def stages(**images: int) -> Stages:
        runs = {name: {"max_images": n, "lr": 1.0} for name, n in images.items()}
        found = Stages(tmp_path, ["train", "sample"], concerning, with_longer)

        def touch(stage: str) -> None:
            ran.append(stage)
            for name in runs:
                (tmp_path / f"{stage}-{name}").touch()

        outputs = {stage: {name: (f"{stage}-{name}",) for name in runs} for stage in found.names}
        shared: dict[str, Any] = {"costly": True}
        found.add("train", Stage(lambda: touch("train"), runs, by_model=outputs["train"], prolongs=True, **shared))
        found.add("sample", Stage(lambda: touch("sample"), {}, ("train",), by_model=outputs["sample"], **shared))
        return found

    stages(a=100, b=100).run("train", "sample")
    for path in tmp_path.glob("*-?"):
        path.write_text("first")
    longer = stages(a=100, b=200)
    longer.check()
    longer.run("train", "sample")
    assert ran == ["train", "sample"] * 2
    found = {path.name: path.read_text() for path in tmp_path.glob("*-?*")}
    # What is trained stays for the command that continues it; the samples of the shorter run are beside the new ones.
    expected = dict.fromkeys(("train-a", "train-b", "sample-a", "sample-b.before"), "first") | {"sample-b": ""}
    assert found == expected
    assert stages(a=100, b=200).finished("sample")
    with pytest.raises(UserError, match=r"train-b, .*sample-b were made from other inputs: train.b.max_images was 200"):
        stages(a=100, b=100).check()


def test_the_length_of_a_run_is_compared_in_images() -> None:
    def of(**run: Any) -> dict[str, Any]:
        return {"train": {"a": run, "split": {"name": "main"}}, "classifier": {"models": {"a": run}}}

    now = of(max_steps=10, global_batch=16, lr=1)
    assert with_longer(of(max_images=100, global_batch=16, lr=1), now) == now
    for kept in (of(max_images=161, global_batch=16), of(max_steps=11, global_batch=16), of(lr=1)):
        assert with_longer(kept, now) == kept
    # A run that starts from another one begins again if that one is longer.
    child = {"train": {"b": {"max_steps": 1, "init_from": {"max_steps": 2}}}}
    assert with_longer(child, {"train": {"b": {"max_steps": 1, "init_from": {"max_steps": 3}}}}) == child


def test_samples_of_a_model_left_out_in_between_are_of_the_present_settings(tmp_path: Path) -> None:
    def samples(models: str, steps: int) -> dict[str, str]:
        def sample() -> None:
            for name in models:
                if not (tmp_path / name).exists():
                    (tmp_path / name).write_text(str(steps))

        stages = Stages(tmp_path, ["sample"], concerning)
        stages.add("sample", Stage(sample, {"steps": steps}, by_model={name: (name,) for name in models}))
        stages.run("sample")
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

    assert samples("ab", 20) == {"a": "20", "b": "20"}
    assert samples("a", 20) == samples("ab", 20) == {"a": "20", "b": "20"}
    (tmp_path / "b").write_text("20, kept")
    assert samples("a", 20) == samples("ab", 20) == {"a": "20", "b": "20, kept"}
    assert samples("a", 50) == {"a": "50", "b": "20, kept"}
    assert samples("ab", 50) == {"a": "50", "b": "50"}


def test_latents_that_the_user_names_are_never_outputs(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    for named, outputs in ((str(tmp_path / "out" / "mine"), {}), ("", {"": ("latents",)})):
        e = experiment(latents=named)
        declare(e)
        assert KINDS["encode"](e).by_model == outputs


def test_the_shift_benchmark_refuses_models_that_its_experiment_lacks() -> None:
    with pytest.raises(UserError, match=r"'medii'.*'medi'"):
        run_changed("demo/shift", {"models": {"medii": {"folder": "m"}}}, {})


def words(folder: Path, values: dict[str, Any]) -> list[str]:
    """The command that runs an experiment with these settings."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["run", "--config", str(file)]


def tiny_settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Settings of an experiment on a planted cohort, which takes seconds where it trains."""
    if not (folder / "data").exists():
        write_real(folder / "data", Size(train=10, probe=10, test=10, patches=2))
    return {
        "data": str(folder / "data"),
        "out": str(folder / "out"),
        "held_out": [{"class": "stripes", "site": "south"}],
        "train": {"max_steps": 2, "global_batch": 8, "log_every_images": 8, "model": NETWORK},
        "plan_fields": ["class", "site"],
        "seen_per_cell": 4,
        "unseen_per_cell": 24,
        "generate": {"sampler": {"steps": 2}},
        "evaluate": {"repeats": 1, "real_splits": 0, "colour_free": False},
    } | values


def written_at(*paths: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


@pytest.mark.slow
def test_two_models_under_names_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_settings(tmp_path, models={"plain": {"config": "demo/cls"}, "ours": {"config": "demo/medi"}})
    values["evaluate"] |= {"candidate": "ours"}
    assert main(words(tmp_path, values)) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    for name in ("plain", "ours"):
        assert (out / name / "model" / "model_index.json").is_file()
        assert len(PatchDataset.open(out / "synthetic" / name))
    assert list(pd.read_csv(out / "plan-plain.csv")["class"]) == ["blobs", "rings", "stripes"]
    assert (out / "report.html").is_file()
    assert set(json.loads((out / "metrics.json").read_text())["synthetic"]) == {"plain", "ours"}
    before = written_at(out / "plain" / "model", out / "synthetic" / "plain" / "dataset.json")
    # The same command has nothing to do; one model's settings leave the other one as it is.
    assert main(words(tmp_path, values)) == 0
    values["models"]["ours"]["train"] = {"max_steps": 3}
    # A comparison of image classifiers that this experiment has no stage for is not its report's; this one is damaged.
    (out / "image_classifiers").mkdir()
    (out / "image_classifiers" / "classifiers.json").write_text("{}")
    samples = PatchDataset.open(out / "synthetic" / "ours").info["index_sha256"]
    assert main(words(tmp_path, values)) == 0
    assert written_at(out / "plain" / "model", out / "synthetic" / "plain" / "dataset.json") == before
    # The other one was prolonged; what the shorter run made is kept.
    images = {
        name: json.loads((out / "ours" / name / "provenance.json").read_text())["images_seen"]
        for name in ("model", "model-images-000000000016")
    }
    assert list(images.values()) == [24, 16]
    assert PatchDataset.open(out / "synthetic" / "ours.before").info["index_sha256"] == samples
    assert PatchDataset.open(out / "synthetic" / "ours").info["index_sha256"] != samples
    # A run of which no checkpoint is left is refused before the experiment is recorded as the longer one.
    shutil.rmtree(out / "ours" / "checkpoints")
    longer = values["models"]["ours"] | {"train": {"max_steps": 4}}
    with pytest.raises(UserError, match="no whole checkpoint to continue from"):
        run(build(ExperimentSettings, values | {"models": values["models"] | {"ours": longer}}))
    assert main(words(tmp_path, values)) == 0


@pytest.mark.slow
def test_one_model_alone_to_its_samples_and_then_selected_and_evaluated(tmp_path: Path) -> None:
    stages = [name for name in TO_SAMPLE if name != "classifier"]
    values = tiny_settings(tmp_path, models={"only": {"config": "demo/medi"}}, stages=stages)
    result = run(build(ExperimentSettings, values))
    assert list(result["seconds"]) == values["stages"]
    out = tmp_path / "out"
    assert not (out / "metrics.json").exists()
    before = written_at(out / "only" / "model", out / "latents" / "latents.json")
    values["stages"] += ["select", "evaluate"]
    values["select"] = {"filters": ["duplicates"], "rank": "distance", "share": 0.5, "farthest": 0}
    headline = run(build(ExperimentSettings, values))
    assert written_at(out / "only" / "model", out / "latents" / "latents.json") == before
    samples = PatchDataset.open(out / "synthetic" / "only")
    chosen = samples.index["selected_best"].astype(bool).sum()
    assert 0 < chosen < len(samples)
    record = json.loads((out / "metrics.json").read_text())["synthetic"]["only"]
    assert record["selected"] == "selected_best"
    assert set(headline["seconds"]) == set(values["stages"])
    # Samples that are made again have lost their selection, which is made again too.
    shutil.rmtree(out / "synthetic" / "only")
    run(build(ExperimentSettings, values))
    assert "best" in PatchDataset.open(out / "synthetic" / "only").selections


def test_a_longer_plan_asks_for_what_is_missing_by_what_was_accepted() -> None:
    plan = pd.DataFrame(
        {"class": ["a", "a", "b", "c"], "site": list("xyxx"), "count": [30, 10, 20, 8], "seed": range(4)}
    )

    def counts(kind: str, asked: int, accepted: int, chosen: int, wanted: int) -> CombinationCounts:
        return CombinationCounts(
            cell={"class": kind},
            unseen=False,
            wanted=wanted,
            asked=asked,
            accepted=accepted,
            chosen=chosen,
            acceptance=accepted / asked,
        )

    cells = [counts("a", 40, 20, 20, 32), counts("b", 20, 15, 12, 12), counts("c", 8, 0, 0, 5)]
    longer = longer_plan(plan, cells, 2, share=1.0)
    assert longer.iloc[:4].equals(plan)
    # a lacks 12 of which half pass: 24, a tenth more, three quarters of them at x; c, of which none passed, as before.
    assert longer.iloc[4:][["class", "site", "count"]].values.tolist() == [["a", "x", 20], ["a", "y", 7], ["c", "x", 9]]
    assert longer["seed"].is_unique
    # Where half of the patches is taken at most, 12 of b need 24: the 4 that are lacking, and a tenth.
    halved = [counts("b", 20, 20, 10, 12)]
    assert longer_plan(plan, halved, 2, share=0.5).iloc[4:]["count"].tolist() == [5]


def test_rounds_of_a_selection_stay_with_the_samples_that_they_made(experiment: Callable[..., Experiment]) -> None:
    stages = [*(name for name in TO_SAMPLE if name != "classifier"), "select"]
    values = {"models": {"only": {"config": "demo/cls"}}, "stages": stages, "select_rounds": 3}
    before, after = (experiment(**values, select={"percent": percent}) for percent in (50, 80))
    for e in (before, after):
        declare(e)
    base, longer = (before.folder / f"plan-only{end}.csv" for end in ("", "-round-2"))
    before.folder.mkdir()
    longer.write_text("class,count\na,1\na,2\n")
    assert before.plans("only") == [base], "its plan is not there, as after a kill"
    base.write_text("class,count\na,1\n")
    assert before.plans("only") == [base, longer]
    record = {"made_from": before.stages._made_from("select"), "seconds": 1.0}
    write_json(before.folder / "stages" / "select.json", record)
    assert not after.stages.finished("select")
    assert longer not in after.stages.to_remove("select")


@pytest.mark.slow
def test_more_is_generated_until_the_selection_has_what_it_wants(tmp_path: Path) -> None:
    stages = [*(name for name in TO_SAMPLE if name != "classifier"), "select"]
    values = tiny_settings(tmp_path, models={"only": {"config": "demo/cls"}}, stages=stages, unseen_per_cell=2)
    # Training has 120 patches; two per combination of class and site are generated at first.
    values |= {"seen_per_cell": 2, "select_rounds": 4}
    values["select"] = {
        "filters": ["duplicates"],
        "rank": "distance",
        "percent": 50,
        "share": 1.0,
        "cells": ["class"],
        "farthest": 0,
    }
    run(build(ExperimentSettings, values))
    out = tmp_path / "out"
    found = json.loads((out / "selection-only.json").read_text())["cells"]
    real = PatchDataset.open(tmp_path / "data").index
    of_class = real[real["split_main"] == "train"]["class"].value_counts()
    assert {c["cell"]["class"]: c["wanted"] for c in found} == {k: -(-n // 2) for k, n in of_class.items()}
    assert all(c["chosen"] == c["control"] == c["wanted"] for c in found)
    assert (out / "plan-only-round-2.csv").read_text().startswith((out / "plan-only.csv").read_text())
    before = written_at(out / "synthetic" / "only" / "dataset.json", out / "selection-only.json")
    run(build(ExperimentSettings, values))
    assert written_at(out / "synthetic" / "only" / "dataset.json", out / "selection-only.json") == before
    # Samples that are made again begin with the plan, and end as before.
    first = PatchDataset.open(out / "synthetic" / "only").index
    shutil.rmtree(out / "synthetic" / "only")
    run(build(ExperimentSettings, values))
    assert PatchDataset.open(out / "synthetic" / "only").index.equals(first)
    # A selection that wants more continues the samples that there are.
    values["select"]["percent"], values["select_rounds"] = 80, 8
    run(build(ExperimentSettings, values))
    found = json.loads((out / "selection-only.json").read_text())["cells"]
    assert all(c["chosen"] == c["wanted"] == -(-8 * of_class[c["cell"]["class"]] // 10) for c in found)


@pytest.mark.slow
def test_pre_training_fine_tuning_and_a_classifier_that_guides(tmp_path: Path) -> None:
    """As HistoDiffusion: unconditional on unlabelled tissue, on the labelled, guided by a latent classifier."""
    values = tiny_settings(tmp_path, stages=TO_SAMPLE)
    write_real(tmp_path / "unlabelled", Size(train=6, probe=0, test=0, patches=2), seed=5)
    unconditional = {"config": "demo/medi", "train": {"model": {"fields": []}}}
    classifier = {
        "classifier": "demo/classifier",
        "classifier_train": {
            "max_steps": 2,
            "global_batch": 8,
            "network": {**NETWORK, "attention": [False, True]},
        },
        "generate": {"classifier": {"scale": 5.0}},
    }
    values["models"] = {
        "base": unconditional | {"data": str(tmp_path / "unlabelled"), "sample": False},
        "guided": unconditional | classifier | {"init_from": "base"},
        "plain": {"config": "demo/cls"},
    }
    run(build(ExperimentSettings, values))
    out = tmp_path / "out"
    provenance = json.loads((out / "guided" / "run.json").read_text())
    assert json.dumps(provenance).count('"source": ""') == 0
    samples = PatchDataset.open(out / "synthetic" / "guided")
    assert set(samples.index["class"]) == {"blobs", "rings", "stripes"}
    assert samples.info["provenance"]["classifier"]["scale"] == 5.0
    assert not (out / "synthetic" / "base").exists()
    before = written_at(out / "base" / "model", out / "classifiers" / "guided" / "classifier")
    shutil.rmtree(out / "guided" / "model" / "unet")
    shutil.rmtree(out / "classifiers" / "guided")
    run(build(ExperimentSettings, values))
    after = written_at(out / "base" / "model", out / "classifiers" / "guided" / "classifier")
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


@pytest.mark.slow
def test_a_model_pre_trained_on_a_corpus_of_several_sources(tmp_path: Path) -> None:
    values = tiny_settings(
        tmp_path, stages=[*TO_SAMPLE[:1], "corpus", *(n for n in TO_SAMPLE[1:] if n != "classifier")]
    )
    data = tmp_path / "data"
    dataset = PatchDataset.open(data)
    # Half of the training patients are unlabelled.
    half = dataset.index["patient"].str.contains("train.*[13579]$") & (dataset.index["split_main"] == "train")
    dataset.add_split("few", dataset.index["split_main"].where(~half, "unlabelled").tolist(), {"kind": "by hand"})
    write_real(tmp_path / "other", Size(train=6, probe=0, test=0, patches=2), seed=5)
    values |= {"split": "few", "held_out": []}
    values["corpus"] = {
        "other": {"data": str(tmp_path / "other"), "share": 1},
        "own": {"part": "unlabelled", "share": 3},
    }
    unconditional = {"config": "demo/medi", "train": {"model": {"fields": []}}}
    values["models"] = {
        "base": unconditional | {"data": "corpus", "sample": False},
        "tuned": {"config": "demo/cls", "init_from": "base"},
    }
    run(build(ExperimentSettings, values))
    out = tmp_path / "out"
    corpus = PatchDataset.open(out / "corpus")
    trained = set(corpus.index["patient"][corpus.index["split_corpus"] == "train"])
    # The other cohort has patients of the same names, and these are other persons only if they are named apart.
    own = {name for name in trained if name.startswith("own/")}
    assert own == {f"own/{name}" for name in dataset.index["patient"][half]}
    record = json.loads((out / "base" / "run.json").read_text())["run"]["settings"]
    assert record["mixture"] == {"other": 1.0, "own": 3.0}
    before = written_at(out / "corpus" / "dataset.json", out / "base" / "model", out / "synthetic" / "tuned")
    run(build(ExperimentSettings, values))
    assert written_at(out / "corpus" / "dataset.json", out / "base" / "model", out / "synthetic" / "tuned") == before
