"""The two published protocols: what goes in, and their numbers recomputed by hand."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_world import SCHEMA, SIZE, World, filters, synthetic_patches
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.evaluation.class_distances import FILE, distance_text
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classifiers import Prediction
from latent_medi.evaluation.downstream.histodiffusion_protocol import histodiffusion_protocol
from latent_medi.evaluation.downstream.medi_protocol import _pool, medi_protocol, medi_real, medi_tasks
from latent_medi.evaluation.downstream.protocol_tables import RESULTS, SUMMARY, protocol_text
from latent_medi.evaluation.downstream.records import ClassifierRecord
from latent_medi.evaluation.downstream.stage import DownstreamStage, check_downstream
from latent_medi.evaluation.downstream.training_sets import ProtocolSources, TrainingSet
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.findings import findings
from latent_medi.evaluation.results import Metrics, metrics_json, metrics_of
from latent_medi.evaluation.settings import EvaluateSettings, HistoDiffusionProtocolSettings, MediProtocolSettings
from latent_medi.evaluation.summary import headline_text
from latent_medi.report.render import render_report
from latent_medi.shards.writing.writer import write_dataset
from latent_medi.statistics.kernel_distance import kid_text
from latent_medi.statistics.logistic_regression import Problem, Solution
from latent_medi.statistics.seeds import MeanOverSeeds


def _features(study: Study, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Noisy one-hot classes, and the row number last, far too small to be learnt from."""
    rng = np.random.default_rng(seed)

    def of(labels: np.ndarray) -> np.ndarray:
        hot = np.eye(3)[[study.classes.index(v) for v in labels]] + rng.normal(0, 0.8, (len(labels), 3))
        return np.column_stack([hot, np.arange(len(labels)) * 1e-9])

    arms = {a.name: of(a.index[study.class_field].to_numpy(str)) for a in study.synthetic.values()}
    return of(study.index[study.class_field].to_numpy(str)), arms


def test_mean_and_standard_error_by_hand() -> None:
    found = MeanOverSeeds.of([0.5, 0.6, 1.0])
    assert found.mean == pytest.approx(0.7)
    assert found.sem == pytest.approx(np.sqrt((0.04 + 0.01 + 0.09) / 2) / np.sqrt(3))
    assert MeanOverSeeds.of([0.5]).sem is None


def test_medi_protocol_takes_what_it_says(world: World) -> None:
    study = open_study(world.settings("medi-protocol"))
    labels, sites = (study.index[f].to_numpy(str) for f in ("class", "site"))
    for k, most in ((2, 0), (2, 7), (0, 7)):
        rows, drawn = medi_real(study, study.train, 2, k, most, 3)
        assert set(drawn) == set(sites[rows])
        assert set(rows) <= set(study.train)
        assert len(set(sites[rows])) == (k or 3)
        if most:
            assert dict(zip(*np.unique(labels[rows], return_counts=True), strict=True)) == dict.fromkeys(
                study.classes, 7
            )
    assert not np.array_equal(*(medi_real(study, study.train, 2, 2, 7, seed)[0] for seed in (0, 1)))

    real, arms = _features(study)
    settings = MediProtocolSettings(ratios=[0.0, 0.5], max_real=[9], sites=[2, 0], seeds=2)
    record = medi_protocol(ProtocolSources(study, "f", real, arms), settings)
    assert [(r.training_set, r.sites, r.ratio) for r in record.rows] == [
        (arm, k, ratio) for k in (2, 3) for arm, ratio in (("real", 0.0), ("medi", 0.5), ("cls", 0.5))
    ]
    assert record.not_converged == 0
    assert record.test.n_patches == len(study.test)
    for row in record.rows:
        assert row.n_synthetic == [int(row.ratio * n) for n in row.n_real]

    # One number by hand: two sites, seed 1, no synthetic patch.
    rows, drawn = medi_real(study, study.train, 2, 2, 9, 1)
    assert record.tasks[""].draws["2"][1] == drawn
    model = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8).fit(real[rows], labels[rows])
    found, truth = model.predict(real[study.test]), labels[study.test]
    here = record.rows[0]
    assert here.balanced_accuracy.by_seed[1] == pytest.approx(balanced_accuracy_score(truth, found))
    assert here.mcc.by_seed[1] == pytest.approx(matthews_corrcoef(truth, found))
    by_site = [
        balanced_accuracy_score(truth[sites[study.test] == s], found[sites[study.test] == s]) for s in np.unique(sites)
    ]
    assert here.site_averaged_balanced_accuracy.by_seed[1] == pytest.approx(np.mean(by_site))

    with pytest.raises(UserError, match="asks for 9 sites; training has 3"):
        medi_protocol(ProtocolSources(study, "f", real, arms), MediProtocolSettings(sites=[9]))


def test_a_pool_with_too_few_samples_is_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    study = open_study(world.settings("short"))
    real, arms = _features(study)
    caplog.set_level("WARNING", "latent_medi")
    record = medi_protocol(ProtocolSources(study, "f", real, arms), MediProtocolSettings(ratios=[1.0, 50.0], seeds=1))
    messages = [each.getMessage() for each in caplog.records if "gets all" in each.getMessage()]
    assert len(messages) == 2  # one for each set, and none at ratio 1
    assert all("ratio 50" in message for message in messages)
    assert max(row.n_synthetic[0] for row in record.rows) == len(study.synthetic["medi"].index)


PAIR = {"pair": ["blobs", "stripes"]}


def test_a_task_is_about_its_own_classes(world: World) -> None:
    """Stripes at south are held out, so the samples of them are in the union and not in the separate pool."""
    study = open_study(world.settings("medi-tasks"))
    real, arms = _features(study)
    labels, sites = (study.index[f].to_numpy(str) for f in ("class", "site"))
    settings = MediProtocolSettings(tasks=PAIR, ratios=[0.5, 0.0], pools=["union", "separate"], seeds=2)
    record = medi_protocol(ProtocolSources(study, "f", real, arms), settings)
    assert [(r.task, r.training_set, r.pool, r.ratio) for r in record.rows] == [
        *[("pair", arm, pool, 0.5) for arm in ("medi", "cls") for pool in ("union", "separate")],
        ("pair", "real", "", 0.0),
    ]
    task = record.tasks["pair"]
    train, test = (rows[np.isin(labels[rows], PAIR["pair"])] for rows in (study.train, study.test))
    assert (task.classes, task.sites, task.n_train, task.test.n_patches) == (PAIR["pair"], 3, len(train), len(test))
    assert record.rows[0].n_real == [len(train)] * 2

    samples = study.synthetic["medi"]
    own = samples.index[["class", "site"]].astype(str).apply(tuple, axis=1)
    union, separate = (_pool(study, "medi", pool, np.array(PAIR["pair"])) for pool in ("union", "separate"))
    assert set(own[union]) == {(c, s) for c in PAIR["pair"] for s in ("east", "north", "south")}
    assert set(own[union]) - set(own[separate]) == {("stripes", "south")}
    # One number by hand.
    extra = separate[np.random.default_rng([1, 37]).permutation(len(separate))[: int(0.5 * len(train))]]
    x, y = (
        np.concatenate([real[train], arms["medi"][extra]]),
        np.concatenate([labels[train], [c for c, _ in own[extra]]]),
    )
    model = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8).fit(x, y)
    found, truth = model.predict(real[test]), labels[test]
    here = record.rows[1]
    assert here.balanced_accuracy.by_seed[1] == pytest.approx(balanced_accuracy_score(truth, found))
    assert here.mcc.by_seed[1] == pytest.approx(matthews_corrcoef(truth, found))
    by_site = [balanced_accuracy_score(truth[sites[test] == s], found[sites[test] == s]) for s in np.unique(sites)]
    assert here.site_averaged_balanced_accuracy.by_seed[1] == pytest.approx(np.mean(by_site))


def test_samples_without_a_site_are_separate_in_the_real_proportions(world: World) -> None:
    study = open_study(world.settings("medi-tasks"))
    labels = study.index["class"].to_numpy(str)[study.train]
    own = study.synthetic["cls"].index["class"].to_numpy(str)
    classes = np.array(PAIR["pair"])
    real, there = ({c: int((values == c).sum()) for c in classes} for values in (labels, own))
    share = min(there[c] / real[c] for c in classes)
    taken = own[_pool(study, "cls", "separate", classes)]
    assert {c: int((taken == c).sum()) for c in classes} == {c: int(share * real[c]) for c in classes}
    assert len(_pool(study, "cls", "union", classes)) == sum(there.values()) > len(taken)


def test_a_separate_pool_keeps_the_mix_of_other_fields() -> None:
    """The samples of a plan are in its order: the first half of each class would be of one gender."""
    index = pd.DataFrame({"class": ["a"] * 100 + ["b"] * 100, "gender": (["f"] * 50 + ["m"] * 50) * 2})
    samples = SimpleNamespace(index=index, fields=("class", "gender"))
    study: Any = SimpleNamespace(synthetic={"cls": samples}, class_field="class", site_field="site")
    study.train, study.class_labels = np.arange(150), np.repeat(["a", "b"], [50, 100])
    pool = index.iloc[_pool(study, "cls", "separate", np.array(["a", "b"]))]
    assert pool["class"].value_counts().to_dict() == {"a": 50, "b": 100}
    assert 15 < (pool.loc[pool["class"] == "a", "gender"] == "f").sum() < 35


def test_every_class_of_a_task_has_a_site() -> None:
    """As with TCGA's codes every site has one class: of eight sites two have the second one."""
    sites = np.repeat(np.arange(8), 5).astype(str)
    labels = np.where(np.isin(sites, ["6", "7"]), "rare", "frequent")
    study: Any = SimpleNamespace(site_labels=sites, class_labels=labels)
    draws = []
    for seed in range(30):
        rows, drawn = medi_real(study, np.arange(40), 2, 2, 0, seed)
        assert set(labels[rows]) == {"frequent", "rare"}
        assert len(set(drawn)) == 2
        draws.append(tuple(sorted(drawn)))
    assert len(set(draws)) > 8  # of 12
    every = {"train": np.arange(40), "test": np.arange(40), "classes": ["frequent", "rare"]}
    study = SimpleNamespace(site_labels=sites, class_labels=labels, **every)
    settings = MediProtocolSettings(tasks={"pair": ["frequent", "rare"]}, sites=[1, 2, 0], seeds=3)
    (task,) = medi_tasks(study, settings)
    assert (task.numbers, task.left_out) == ([2, 0], [1])  # the others are run
    with pytest.raises(UserError, match="1 random sites do not have all 2 classes"):
        medi_real(study, np.arange(40), 2, 1, 0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {"pair": ["blobs", "strips"]}}, "'pair' names 'strips', which is no class; closest: 'stripes'"),
        ({"ratios": [0.5, 1.0, 0.5]}, "ratios is .* one or more different values"),  # seeds would count twice
        ({"sites": []}, "sites is .*; it takes one or more different values"),
        ({"tasks": {"pair": ["blobs"]}}, "'pair' needs two or more different classes"),
        ({"tasks": {"pair": ["blobs", "blobs"]}}, "'pair' needs two or more different classes"),
        ({"tasks": PAIR, "sites": [2, 4]}, "asks for 4 sites; the task 'pair' has 3"),
        (
            {"tasks": {"three": ["blobs", "rings", "stripes"]}, "sites": [9]},
            "three' has 3 and 3 classes, each of which",
        ),
    ],
)
def test_tasks_that_cannot_be_are_refused_before_anything_is_computed(
    changes: dict[str, Any], words: str, world: World
) -> None:
    settings = world.settings("no-task", downstream=False, downstream_protocol="medi")
    settings.medi_protocol = MediProtocolSettings(**changes)
    with pytest.raises(UserError, match=words):
        DownstreamStage(open_study(settings), settings)


def test_a_preconditioner_of_few_patches_is_made_anew_for_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(world.settings("medi-tasks"))
    real, arms = _features(study)
    made: list[tuple[int, bool]] = []

    def problem(x: np.ndarray, *more: Any) -> Problem:
        made.append((len(x), more[-1] is None))
        return Problem(x, *more)

    monkeypatch.setattr("latent_medi.evaluation.downstream.medi_protocol.Problem", problem)
    sources = ProtocolSources(study, "f", real, {"medi": arms["medi"]})
    medi_protocol(sources, MediProtocolSettings(ratios=[3.0, 0.0, 1.0], max_real=[4, 5], seeds=1))
    assert made == [(12, True), (48, True), (24, False), (15, True), (60, True), (30, False)]
    made.clear()  # without a fit to the real patches alone, they are prepared for the others
    medi_protocol(sources, MediProtocolSettings(ratios=[0.5, 1.0], max_real=[4], seeds=1))
    assert made == [(12, True), (18, False), (24, False)]


def test_no_number_depends_on_which_others_are_computed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, whose solutions depend on the preconditioner."""
    monkeypatch.setattr("latent_medi.statistics.logistic_regression._DOUBLE", 0)
    solutions: list[np.ndarray] = []

    class Kept(Problem):
        def solve(self, *more: Any) -> Solution:
            solutions.append(super().solve(*more).weights)
            return super().solve(*more)

    monkeypatch.setattr("latent_medi.evaluation.downstream.medi_protocol.Problem", Kept)
    study = open_study(world.settings("medi-tasks"))
    real, arms = _features(study)
    sources = ProtocolSources(study, "f", real, arms)
    found = []
    for ratios, most in (([0.0, 0.25, 1.0, 2.0], [8, 0]), ([2.0, 1.0, 0.25, 0.0], [0, 8]), ([1.0, 2.0, 0.25], [8])):
        solutions.clear()
        record = medi_protocol(sources, MediProtocolSettings(ratios=ratios, max_real=most, seeds=2))
        rows = {(r.training_set, r.ratio, r.max_real): r for r in record.rows if r.max_real and r.ratio}
        weights = sorted(each.tobytes() for each in solutions)
        found.append((rows, weights))
    assert len(found[0][0]) == 6
    assert found[0] == found[1]
    assert found[2][0] == found[0][0]
    assert set(found[2][1]) <= set(found[0][1])


def test_all_sites_take_part_once(world: World) -> None:
    study = open_study(world.settings("medi-tasks"))
    real, arms = _features(study)
    sources = ProtocolSources(study, "f", real, arms)
    record = medi_protocol(sources, MediProtocolSettings(ratios=[0.0], sites=[2, 3, 0], seeds=1))
    assert [(row.sites, record.tasks[""].left_out) for row in record.rows] == [(2, []), (3, [])]
    record = medi_protocol(sources, MediProtocolSettings(ratios=[0.0], sites=[3], seeds=1))
    assert [row.sites for row in record.rows] == [3]


class Keeping:
    """A classifier that keeps its training sets and predicts the first class."""

    random = False
    record = ClassifierRecord("linear")

    def __init__(self, study: Study) -> None:
        self.training_sets: list[TrainingSet] = []
        self.study = study

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        self.training_sets.append(training_set)
        n, k = len(self.study.test), len(self.study.classes)
        return Prediction(np.full(n, self.study.classes[0]), np.full((n, k), 1 / k), True)


def test_histodiffusion_takes_the_best_first(world: World, tmp_path: Path) -> None:
    patches = list(synthetic_patches(60, None, False))
    made = write_dataset(tmp_path / "made", patches, "medi", SCHEMA, SIZE, 0.5)
    rng = np.random.default_rng(0)
    chosen, control = rng.random(len(made)) < 0.5, rng.random(len(made)) < 0.5
    score = rng.random(len(made))
    made.add_selection("best", {"": chosen, "_control": control, "_score": score}, {}, {})
    study = open_study(world.settings("histo", synthetic={"medi": str(tmp_path / "made")}))
    real, arms = _features(study)
    classifier = Keeping(study)
    settings = HistoDiffusionProtocolSettings(percent=[50.0, 900.0], seeds=2)
    record = histodiffusion_protocol(ProtocolSources(study, "f", real, arms), settings, classifier)
    assert [(r.training_set, r.choice, r.percent) for r in record.rows] == [
        ("real", "none", 0.0),
        *[("medi", choice, percent) for percent in (50.0, 900.0) for choice in ("selected", "random")],
    ]
    # One training set where nothing is random, one per seed where patches are drawn.
    assert len(classifier.training_sets) == 1 + 1 + 2 + 1 + 2
    labels = study.index["class"].to_numpy(str)[study.train]
    classes = made.index["class"].to_numpy(str)
    counts = {v: int((labels == v).sum()) for v in study.classes}
    added = [np.rint(s.features[len(labels) :, 3] * 1e9).astype(int) for s in classifier.training_sets]
    for value in study.classes:
        order = [r for r in np.argsort(score) if chosen[r] and classes[r] == value]
        mine = [r for r in added[1] if classes[r] == value]
        assert mine == order[: counts[value] // 2]
        most = [r for r in added[4] if classes[r] == value]
        assert most == order  # nine times the real ones are more than there are: all, none twice
    for rows in (added[2], added[3], added[5]):
        assert control[rows].all()
        assert len(set(rows)) == len(rows)
    assert len(added[2]) == sum(n // 2 for n in counts.values())
    assert not np.array_equal(added[2], added[3])
    assert record.rows[3].n_synthetic == int(chosen.sum())
    assert record.rows[0].accuracy.mean == pytest.approx(1 / 3)

    with pytest.raises(UserError, match="no selection 'bets'; closest: 'best'"):
        histodiffusion_protocol(
            ProtocolSources(study, "f", real, arms), HistoDiffusionProtocolSettings(selection="bets"), classifier
        )
    plain = open_study(world.settings("histo"))
    with pytest.raises(UserError, match="latent-medi select"):
        histodiffusion_protocol(ProtocolSources(plain, "f", real, _features(plain)[1]), settings, classifier)


def means_of(result: Metrics) -> list[float | None]:
    """Mean distances of both sets over classes."""
    return [result.fidelity["filters"].per_class.means[name].value for name in ("medi", "cls")]


def test_a_protocol_is_one_setting(world: World) -> None:
    sizes = MediProtocolSettings(ratios=[0.0, 1.0], max_real=[20], sites=[0], seeds=2)
    settings = world.settings("protocol", downstream=False, downstream_protocol="medi", medi_protocol=sizes)
    result = evaluate(settings, [filters()])
    rows = result.protocols.medi["filters"].rows
    assert [r.training_set for r in rows] == ["real", "medi", "cls"]
    assert 0 <= rows[1].balanced_accuracy.mean <= 1
    # The paper's two tables: a row per seed, and a row per score.
    results, summary = (pd.read_csv(Path(settings.out) / name, keep_default_na=False) for name in (RESULTS, SUMMARY))
    assert list(results.columns[-5:]) == ["seed", "tss_subset", "overall_bal", "tss_avg_bal", "mcc"]
    assert list(summary.columns[-3:]) == ["metric", "mean", "sem"]
    assert len(results) == 3 * 2
    assert len(summary) == 3 * 3
    of_cls = results[results["training_set"] == "cls"]
    assert of_cls["overall_bal"].tolist() == pytest.approx(rows[2].balanced_accuracy.by_seed)
    assert of_cls["n_synthetic"].tolist() == rows[2].n_synthetic
    mcc = summary[(summary["training_set"] == "medi") & (summary["metric"] == "mcc")].iloc[0]
    assert (mcc["mean"], mcc["sem"]) == pytest.approx((rows[1].mcc.mean, rows[1].mcc.sem))
    text = protocol_text(result.protocols)
    assert f"{rows[1].balanced_accuracy.mean:.3f} ± {rows[1].balanced_accuracy.sem:.3f}" in text
    assert "mean ± SEM of 2 seeds" in text
    assert result.downstream == {}
    assert result.protocols.histodiffusion == {}
    # A single set has nothing that it is nearer than.
    content = metrics_json(result)
    for table in ("unseen", "per_class"):
        for each in [*(c["sources"] for c in content["fidelity"]["filters"][table]["combinations"])]:
            each.pop("cls", None)
    content["protocols"] = {"medi": {}, "histodiffusion": {}}
    (alone,) = findings(metrics_of(content), "filters")
    assert alone.startswith("MeDi is at a mean KID of ")
    assert alone.endswith(
        f"; at a mean KID of {distance_text(means_of(result)[0])} from held-out patients over 3 classes."
    )
    # What was found takes the verdict's place, for nothing was asked that a verdict answers.
    assert result.headline is not None
    distances, protocol = result.headline.findings
    own = list(map(distance_text, means_of(result)))
    assert distances.startswith("Kernel distance (KID, lower is better) of MeDi against CLS: ")
    assert " to real patches of held-out patients (lower on 2 of 2 unseen combinations" in distances
    assert f"; {own[0]} against {own[1]} to held-out patients (lower on 3 of 3 classes, ratio " in distances
    by_set = [f"{row.balanced_accuracy.mean:.3f} ± {row.balanced_accuracy.sem:.3f}" for row in rows]
    assert protocol == (
        f"MeDi's protocol (3 sites, ratio 1): balanced accuracy {by_set[1]} with samples of MeDi, {by_set[2]} with "
        f"samples of CLS and {by_set[0]} from real patches alone."
    )
    readable, last = headline_text(result, result.headline).splitlines()[-2:]
    shown = list(map(kid_text, means_of(result)))
    assert readable.startswith("Kernel distance (KID × 10³, lower is better) of MeDi against CLS: ")
    assert f"; {shown[0]} against {shown[1]} to held-out patients (lower on 3 of 3 classes, ratio " in readable
    assert last == protocol
    page = render_report(result, Path(settings.out) / "report.html").read_text(encoding="utf-8")
    assert html.escape(readable, quote=False) in page
    assert "No verdict" not in page
    with pytest.raises(UserError, match="`selected`"):
        check_downstream(world.settings("wrong", downstream_protocol="histodiffusion", selected={"medi": "x"}))


def test_tables_that_another_setting_no_longer_makes_are_removed(world: World) -> None:
    sizes = MediProtocolSettings(ratios=[0.0], seeds=1)
    settings = world.settings("was-on", downstream=False, downstream_protocol="medi", medi_protocol=sizes)
    evaluate(settings, [filters()])
    out = Path(settings.out)
    (out / "medi_notes.csv").write_text("mine")
    (out / "predictions.csv").write_text("mine too: no comparison wrote it")
    assert {RESULTS, SUMMARY} <= {path.name for path in out.iterdir()}
    evaluate(replace(settings, downstream_protocol="default"), [filters()])
    names = {path.name for path in out.iterdir()}
    assert names & {RESULTS, SUMMARY} == set()
    assert {"medi_notes.csv", "predictions.csv", FILE, "metrics.json", "reference"} <= names


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"downstream_protocol": "mdi"}, "medi"),
        ({"protocol": "papre"}, "paper"),
        ({"classifier": "probe"}, "linear"),
        ({"downstream_arms": ["real"]}, "training_sets"),
        ({"deals": 20}, "real_splits"),
        ({"cells": []}, "by_fields"),
        ({"added_per_cell": 3}, "added_per_combination"),
        ({"regularisation": -1.0}, "regularisation"),
        ({"repeats": 0}, "repeats"),
        ({"stain_jitter": 1.5}, "stain_jitter"),
        ({"medi_protocol": {"seeds": 0}}, "seeds"),
        ({"medi_protocol": {"ratios": [-0.5]}}, "ratios"),
        ({"medi_protocol": {"pools": ["both"]}}, "separate"),
        ({"histodiffusion_protocol": {"percent": [-1.0]}}, "percent"),
    ],
)
def test_values_and_names_that_are_unknown_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config.build(EvaluateSettings, values)
