"""The cheap rivals: jittered stain, the most similar site, and what no arm may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluation_world import World

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.downstream import baselines
from latent_medi.evaluation.downstream.classifiers import Learned
from latent_medi.evaluation.downstream.compare import compare
from latent_medi.evaluation.downstream.training_sets import Drawer, make_plan
from latent_medi.features.stain import STAINS, jitter_stains


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
    made = baselines.stain_augmentation(study, {"class": "stripes", "site": "south"}, 20, 0, 0.2)
    assert made is not None
    table = study.index.iloc[made.rows]
    assert set(table["class"]) == {"stripes"}
    assert dict(table["site"].value_counts()) == {"east": 10, "north": 10}
    assert set(made.rows) <= set(study.train)
    assert made.images["jitter"].shape == (20, 32, 32, 3)


def test_nearest_site_by_hand(world: World) -> None:
    """Sites are compared over shared classes only; the class that the target lacks must not count."""
    study = open_study(world.settings("nearest"))
    sites, classes = (study.index[f].to_numpy(str) for f in ("site", "class"))
    features = np.zeros((len(study.index), 1))
    features[sites == "south"] = 1.0
    features[sites == "east"] = 1.5
    features[sites == "north"] = 3.0
    features[(sites == "east") & (classes == "stripes")] = 90.0  # south has no stripes in training
    cells = [{"class": "stripes", "site": "south"}, {"class": "stripes", "preparation": "frozen"}]
    assert baselines.nearest_sites(study, cells, features) == ["east", None]
    features[sites == "north"] = 1.2
    assert baselines.nearest_sites(study, cells[:1], features) == ["north"]
    rows = baselines.alike_sources(study, {"class": "blobs", "site": "south", "preparation": "frozen"}, "north")
    table = study.index.iloc[rows]
    assert set(table["site"]) == {"north"}
    assert set(table["preparation"]) == {"frozen"}


class Listening:
    """A learner that keeps what it was given."""

    random = False

    def __init__(self, n_test: int) -> None:
        self.about: dict[str, Any] = {"classifier": "none"}
        self.seen: list[np.ndarray] = []
        self.n_test = n_test

    def learn(self, lesson: Any, seed: int) -> Learned:
        self.seen += [lesson.features, *([lesson.first[0]] if lesson.first else [])]
        return Learned(np.full(self.n_test, "blobs"), np.full((self.n_test, 3), 1 / 3), True)


def test_no_test_patient_is_ever_learnt_from(world: World) -> None:
    """Real rows carry their number as the feature, whatever else an arm trains on a negative one."""
    study = open_study(world.settings("leak"))
    plan = make_plan(study, 0, 0)
    made = plan.made(lambda images: np.full((len(images), 1), -1.0))
    arms = {a.name: np.full((len(a.index), 1), -1.0) for a in study.synthetic.values()}
    drawer = Drawer(study, plan, np.arange(len(study.index), dtype=float)[:, None], arms, made)
    learner = Listening(len(study.test))
    record, table = compare(study, drawer, learner, 2, 20, 0)
    assert set(record["arms"]) == set(drawer.variants())
    rows = np.unique(np.concatenate([s[:, 0] for s in learner.seen])).astype(int)
    rows = rows[rows >= 0]
    assert len(rows) > len(study.train)
    assert not set(study.patients[rows]) & set(study.patients[study.test])
    # The patches that rivals made of real ones come from training patients too.
    sources = np.concatenate([t.rows for t in (*plan.transferred, *plan.augmented) if t])
    assert set(sources) <= set(study.train)
    assert len(table) == len(study.test)

    only, _ = compare(study, drawer, learner, 1, 20, 0, ["real", "medi"])
    assert set(only["arms"]) == {"real", "medi"}
    with pytest.raises(UserError, match="no downstream arm 'meddi'; closest: 'medi'"):
        compare(study, drawer, learner, 1, 20, 0, ["meddi"])
    with pytest.raises(UserError, match="cannot take part: no patch with jittered stain"):
        compare(study, Drawer(study, plan, drawer.real, arms, {}), learner, 1, 20, 0, ["stain_augmentation"])


def test_an_arm_without_a_class_cannot_stand_alone(world: World) -> None:
    study = open_study(world.settings("lacking"))
    medi = study.synthetic["medi"]
    kept = medi.rows[medi.index["class"].to_numpy(str) != "blobs"]
    study.synthetic["medi"] = replace(medi, rows=kept)
    study.held_out[:] = [{"class": "stripes", "site": "south"}]
    plan = make_plan(study, 0, 0)
    assert plan.unavailable["synthetic_only_medi"] == "medi has no sample of blobs"
    assert "medi" not in plan.unavailable
