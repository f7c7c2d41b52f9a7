"""The baselines: changed stain, the most similar site; and patches that no training set may have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_world import World, filters

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.roles import Roles, synthetic_roles
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream import baselines, registry
from latent_medi.evaluation.downstream.classifiers import Prediction
from latent_medi.evaluation.downstream.compare import choose, compare
from latent_medi.evaluation.downstream.records import ClassifierRecord
from latent_medi.evaluation.downstream.registry import TrainingSetKind, entries, plan_additions
from latent_medi.evaluation.downstream.training_sets import Add, Drawn, Request, Sources, TrainingSet
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.summary import headline_json
from latent_medi.features.stain import STAINS, jitter_stains
from latent_medi.report.render import render_report


def test_jittered_stain_stays_in_its_range() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.2, 0.8, (6, 8, 8, 3)) * [1.0, 0.8, 0.0]
    images = np.rint(255 * 10.0 ** -(amounts @ STAINS)).astype(np.uint8)
    assert np.abs(jitter_stains(images, 0.0, rng).astype(int) - images).max() <= 1
    changed = jitter_stains(images, 0.2, np.random.default_rng(1))
    assert changed.dtype == np.uint8
    assert changed.shape == images.shape
    found = -np.log10(np.maximum(changed, 1) / 255.0) @ np.linalg.inv(STAINS)
    for before, after in zip(amounts, found, strict=True):
        for stain in (0, 1):  # one line c' = α c + β per patch and stain, up to 8-bit rounding
            alpha, beta = np.polyfit(before[..., stain].ravel(), after[..., stain].ravel(), 1)
            assert 0.77 < alpha < 1.23
            assert abs(beta) < 0.04
    assert not np.array_equal(jitter_stains(images, 0.2, np.random.default_rng(2)), changed)


def test_stain_augmentation_takes_training_patches_of_the_class(world: World) -> None:
    study = open_study(world.settings("augment"))
    derived = baselines.stain_augmentation(study, {"class": "stripes", "site": "south"}, 20, 0, 0.2)
    assert derived is not None
    table = study.index.iloc[derived.rows]
    assert set(table["class"]) == {"stripes"}
    assert dict(table["site"].value_counts()) == {"east": 10, "north": 10}
    assert set(derived.rows) <= set(study.train)
    assert derived.images["jitter"].shape == (20, 32, 32, 3)


def test_nearest_site_by_hand(world: World) -> None:
    """Sites are compared over shared classes only; the class that the target lacks must not count."""
    study = open_study(world.settings("nearest"))
    sites, classes = (study.index[f].to_numpy(str) for f in ("site", "class"))
    features = np.zeros((len(study.index), 1))
    features[sites == "south"] = 1.0
    features[sites == "east"] = 1.5
    features[sites == "north"] = 3.0
    features[(sites == "east") & (classes == "stripes")] = 90.0  # south has no stripes in training
    combinations = [{"class": "stripes", "site": "south"}, {"class": "stripes", "preparation": "frozen"}]
    assert baselines.nearest_sites(study, combinations, features) == ["east", None]
    features[sites == "north"] = 1.2
    assert baselines.nearest_sites(study, combinations[:1], features) == ["north"]
    rows = baselines.sources_of_class(study, {"class": "blobs", "site": "south", "preparation": "frozen"}, "north")
    table = study.index.iloc[rows]
    assert set(table["site"]) == {"north"}
    assert set(table["preparation"]) == {"frozen"}


class Keeping:
    """A classifier that keeps the features that it is trained on."""

    random = False
    record = ClassifierRecord("linear")

    def __init__(self, n_test: int) -> None:
        self.seen: list[np.ndarray] = []
        self.n_test = n_test

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        self.seen.append(training_set.features)
        if training_set.pretraining:
            self.seen.append(training_set.pretraining[0])
        return Prediction(np.full(self.n_test, "blobs"), np.full((self.n_test, 3), 1 / 3), True)


def numbered(study: Study) -> Sources:
    """Sources whose feature is the row's number for real rows, and negative for all others."""
    additions = plan_additions(study, 0, 0, 0.2)
    derived = additions.derived_features(lambda images: np.full((len(images), 1), -1.0))
    synthetic = {s.name: np.full((len(s.index), 1), -1.0) for s in study.synthetic.values()}
    real = np.arange(len(study.index), dtype=float)[:, None]
    sites = baselines.nearest_sites(study, additions.combinations, real)
    return Sources(study, additions, real, synthetic, derived, sites)


def test_no_test_patient_is_ever_trained_on(world: World) -> None:
    study = open_study(world.settings("leak"))
    sources = numbered(study)
    classifier = Keeping(len(study.test))
    record, table = compare(sources, classifier, "f", 2, 0)
    assert set(record.training_sets) == set(choose(sources, [])[0])
    rows = np.unique(np.concatenate([s[:, 0] for s in classifier.seen])).astype(int)
    rows = rows[rows >= 0]
    assert len(rows) > len(study.train)
    assert not set(study.patients[rows]) & set(study.patients[study.test])
    # Derived patches come from training patients too.
    found = [part for parts in sources.additions.derived.values() for part in parts if part]
    assert set(np.concatenate([part.rows for part in found])) <= set(study.train)
    assert len(table) == len(study.test)

    only, _ = compare(sources, classifier, "f", 1, 0, ["real", "medi"])
    assert set(only.training_sets) == {"real", "medi"}
    with pytest.raises(UserError, match="'meddi'; closest: 'medi'"):
        compare(sources, classifier, "f", 1, 0, ["meddi"])
    alone = replace(sources, study=replace(study, oracle_reason="nobody is left"))
    with pytest.raises(UserError, match="'oracle' cannot be built: nobody is left"):
        compare(alone, classifier, "f", 1, 0, ["oracle"])


def test_a_synthetic_set_without_a_class_cannot_be_the_only_source(world: World) -> None:
    study = open_study(world.settings("lacking"))
    medi = study.synthetic["medi"]
    kept = medi.rows[medi.index["class"].to_numpy(str) != "blobs"]
    study.synthetic["medi"] = replace(medi, rows=kept)
    study.held_out[:] = [{"class": "stripes", "site": "south"}]
    chosen, reasons = choose(numbered(study), [])
    assert reasons["synthetic_only_medi"] == "medi has no sample of blobs"
    assert "medi" in chosen


def first_of_class(sources: Sources, request: Request) -> Drawn:
    """A baseline that repeats the first training patch of the class."""
    own = np.flatnonzero(sources.labels == request.combination["class"])
    return Drawn(sources.real, np.repeat(sources.study.train[own[:1]], request.n))


def test_a_new_baseline_is_one_entry_and_one_function(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TrainingSetKind("first_patch", "baseline", "first patch", {"first_patch": Add(first_of_class)})
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS, kind])
    assert "first_patch" in entries(["medi"])
    assert registry.label_of("first_patch") == "first patch"
    assert ("medi", "first_patch") in registry.comparisons(synthetic_roles(["medi"]))
    result = evaluate(world.settings("new", training_sets=["real", "first_patch", "medi"], repeats=1), [filters()])
    downstream = result.downstream["filters"]
    found = downstream.training_sets["first_patch"]
    assert found.role == "baseline"
    assert found.distinct_added == [1, 1, 1]
    assert downstream.differences["medi"]["first_patch"].accuracy_shift.value is not None
    assert "first_patch" in result.headline.further


def test_roles_follow_the_setting_then_the_names_then_the_order() -> None:
    assert synthetic_roles(["a", "b", "c"], "b") == Roles("b", ("a", "c"))
    assert synthetic_roles(["b", "cls", "medi"]) == Roles("medi", ("cls", "b"))
    assert synthetic_roles(["b", "a"]) == Roles("b", ("a",))


def test_sets_of_other_names_give_the_same_numbers_and_a_verdict(world: World, tmp_path: Path) -> None:
    known = evaluate(world.settings("known", repeats=1), [filters()])
    synthetic = {"ours": str(world.medi), "theirs": str(world.cls)}
    result = evaluate(world.settings("others", repeats=1, synthetic=synthetic, candidate="ours"), [filters()])
    names = {"medi": "ours", "cls": "theirs"}

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = new if name == old else name.replace(f"_{old}", f"_{new}")
        return name

    before, after = known.downstream["filters"], result.downstream["filters"]
    assert set(after.training_sets) == set(map(renamed, before.training_sets))
    for name, found in before.training_sets.items():
        other = after.training_sets[renamed(name)]
        assert other.accuracy_shift == found.accuracy_shift
        assert other.role == found.role
    for first, row in before.differences.items():
        for second, difference in row.items():
            assert after.differences[renamed(first)][renamed(second)] == difference
    a, b = known.headline, result.headline
    assert (b.candidate, b.baseline) == ("ours", "theirs")
    assert (b.distance_unseen, b.recovery_site) == (a.distance_unseen, a.recovery_site)
    assert b.verdict.sentence == a.verdict.sentence.replace("MeDi", "ours")
    content = headline_json(b)
    assert list(content["distance_unseen"])[:4] == ["ours", "theirs", "real", "metric"]
    assert content["accuracy_shift"]["ours"] == headline_json(a)["accuracy_shift"]["medi"]
    page = render_report(result, tmp_path / "report.html", sections=["headline", "fidelity", "downstream"])
    text = page.read_text(encoding="utf-8")
    assert "ours" in text
    assert "MeDi" not in text
    with pytest.raises(UserError, match="candidate is 'our'"):
        open_study(world.settings("wrong", candidate="our"))
