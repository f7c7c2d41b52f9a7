"""Does it help a classifier? Every arm adds equally many patches to each held-out cell and is judged on real test
patients.

What the arms train on is in :mod:`latent_medi.evaluation.downstream.training_sets`. The score that counts,
``accuracy_shift``, is the balanced accuracy over all classes of the test patches from sites that have a held-out
combination, averaged over patients first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.combinations import any_match, describe
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classifiers import Learned, Learner, ProbeLearner
from latent_medi.evaluation.downstream.shift_accuracy import Scorer
from latent_medi.evaluation.downstream.training_sets import FIRST, ONLY, Drawer, Plan, make_plan

__all__ = ["Drawer", "Plan", "Scorer", "compare", "make_plan"]

RIVALS = ("real", "oversample", "stain_transfer", "reweight", "stain_augmentation", "nearest_site")
"""What a generator must beat, apart from the other generators."""


def compare(
    study: Study,
    drawer: Drawer,
    learner: Learner | float,
    repeats: int,
    resamples: int,
    seed: int,
    only: Sequence[str] = (),
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train and judge every arm on one encoder's features.

    Args:
        study: The cohort.
        drawer: What each arm trains on.
        learner: The classifier, or C of a linear probe on the drawer's features.
        repeats: Draws of added patches per arm, and seeds of a learner that depends on one.
        resamples: Patient resamples.
        seed: Seed of draws and resamples.
        only: Names of the arms to train; empty for all that can take part.

    Returns:
        The record for metrics.json, and a row per test patch with each arm's prediction, share of right repeats and
        mean class probabilities.

    Raises:
        UserError: ``only`` names an arm that does not exist or cannot take part.
    """
    plan = drawer.plan
    scorer = Scorer(study, plan.cells, resamples, seed)
    if isinstance(learner, (int, float)):
        learner = ProbeLearner(drawer.real[study.test], study.classes, learner)
    arms: dict[str, Any] = {}
    predictions: dict[str, np.ndarray] = {}
    probabilities: dict[str, np.ndarray] = {}
    not_converged: list[str] = []
    variants = _chosen(drawer, only)
    done: dict[tuple[str, str, int], tuple[Learned, dict[str, Any]]] = {}
    jobs = [
        (arm, variant, r)
        for arm, names in variants.items()
        for variant in names
        for r in range(1 if (arm == "real" or variant == "balance") and not learner.random else repeats)
    ]
    results: dict[tuple[str, str], list[tuple[Learned, dict[str, Any]]]] = {}
    # A network shows its own progress, by steps.
    shown = jobs if learner.random else progress(jobs, desc="downstream classifiers", unit="classifier")
    for arm, variant, r in shown:
        # Reweighting is a variant of oversampling too: one lesson, learnt once.
        key = ("" if variant == "balance" else arm, variant, r)
        if key not in done:
            lesson = drawer.lesson(arm, variant, seed + r)
            about = {
                "distinct_added": lesson.distinct,
                "n_training": len(lesson.labels) + (len(lesson.first[1]) if lesson.first else 0),
                "n_synthetic": lesson.n_synthetic,
            }
            done[key] = learner.learn(lesson, seed + r), about
        results.setdefault((arm, variant), []).append(done[key])
    for arm, names in variants.items():
        scores: dict[str, float] = {}
        for variant in names:
            found = results[arm, variant]
            table = np.stack([learned.predicted for learned, _ in found])
            scores[variant] = scorer.headline(table)
            if not all(learned.converged for learned, _ in found):
                not_converged.append(f"{arm}/{variant}")
        best = max(scores, key=lambda v: scores[v])
        found = results[arm, best]
        predictions[arm] = np.stack([learned.predicted for learned, _ in found])
        probabilities[arm] = np.mean([learned.probabilities for learned, _ in found], axis=0)
        arms[arm] = scorer.score(predictions[arm], probabilities[arm]) | {
            "variant": best, "repeats": len(found), **found[-1][1], "variants": scores,
        }  # fmt: skip
    record = {
        "classes": study.classes,
        "affected_sites": scorer.affected,
        "cells": [
            {"name": describe(c), "combination": c, "added": n, "nearest_site": near}
            for c, n, near in zip(plan.cells, plan.counts, drawer.nearest, strict=True)
        ],
        "n_train": len(study.train),
        **learner.about,
        "arms": arms,
        "differences": _differences(study, scorer, predictions),
        "unavailable": dict(drawer.unavailable),
        "not_converged": not_converged,
    }
    return record, _prediction_table(study, predictions, probabilities, scorer.truth)


def _chosen(drawer: Drawer, only: Sequence[str]) -> dict[str, list[str]]:
    variants = drawer.variants()
    for name in only:
        if name in drawer.unavailable:
            raise UserError(f"The downstream arm {name!r} cannot take part: {drawer.unavailable[name]}.")
        if name not in variants:
            raise UserError(f"There is no downstream arm {name!r}; {nearest(name, variants)}.")
    return {a: v for a, v in variants.items() if not only or a in only}


def _differences(study: Study, scorer: Scorer, predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    generators = [*dict.fromkeys(["medi", "cls", *study.synthetic])]
    pairs = [(a, b) for a in (*generators, "oracle") for b in (*RIVALS, "cls") if a != b]
    pairs += [(prefix + a, b) for prefix in (ONLY, FIRST) for a in generators for b in ("real", a)]
    return {
        f"{a} - {b}": {name: scorer.difference(predictions[a], predictions[b], name) for name in scorer.tables}
        for a, b in pairs
        if a in predictions and b in predictions
    }


def _prediction_table(
    study: Study,
    predictions: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    truth: np.ndarray,
) -> pd.DataFrame:
    fixed = study.index.iloc[study.test][["key", "patient", *study.categorical()]].reset_index(drop=True)
    fixed["unseen"] = any_match(study.index, study.held_out)[study.test]
    columns: dict[str, np.ndarray] = {}
    for arm, predicted in predictions.items():
        columns[f"predicted_{arm}"] = predicted[0]
        columns[f"right_{arm}"] = np.round((predicted == truth).mean(axis=0), 4)
    for arm, found in probabilities.items():
        for i, value in enumerate(study.classes):
            columns[f"probability_{arm}_{value}"] = np.round(found[:, i], 6)
    return pd.concat([fixed, pd.DataFrame(columns)], axis=1)
