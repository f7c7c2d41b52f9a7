"""Train a classifier on every training set and score it on real test patients.

The score that counts, ``accuracy_shift``, is the balanced accuracy over all classes of the test patches from sites that
have a held-out combination, averaged over patients first. Where a training set has several variants, such as two
methods of stain transfer, the test patients are divided into five folds: each fold is classified by the variant with
the best ``accuracy_shift`` on the patients of the other four, so that nobody takes part in the choice of a variant for
himself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.combinations import any_match, describe
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classification_scores import UnitScorer
from latent_medi.evaluation.downstream.classifiers import Classifier, Prediction
from latent_medi.evaluation.downstream.records import Differences, Downstream, HeldOutCombination, TrainingSetResult
from latent_medi.evaluation.downstream.registry import Entry, comparisons, entries
from latent_medi.evaluation.downstream.shift_accuracy import Scorer
from latent_medi.evaluation.downstream.training_sets import WITHOUT_DRAW, Build, Sources
from latent_medi.statistics.cross_fitting import cross_fitted, patient_folds
from latent_medi.statistics.differences import Draws, Scored


@dataclass
class Run:
    """One trained classifier.

    Args:
        prediction: Its answer for the test patches.
        distinct: Number of different added patches by held-out combination.
        n_training: Training patches.
        n_synthetic: Synthetic ones among them.
        pool: See :class:`~latent_medi.evaluation.downstream.training_sets.TrainingSet`.
    """

    prediction: Prediction
    distinct: list[int]
    n_training: int
    n_synthetic: int
    pool: float | None


@dataclass
class Compared:
    """Results and predictions of every training set.

    Args:
        results: Results by training set.
        predictions: Class values [repeats, n_test] by training set.
        probabilities: Mean class probabilities [n_test, K] by training set.
        scored: Accuracies in every repeat by training set.
        not_converged: Training sets, with their variant, whose classifier did not converge.
    """

    results: dict[str, TrainingSetResult] = field(default_factory=dict)
    scored: dict[str, dict[str, Scored]] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    not_converged: list[str] = field(default_factory=list)


def compare(
    sources: Sources,
    classifier: Classifier,
    fingerprint: str,
    repeats: int,
    seed: int,
    only: Sequence[str] = (),
) -> tuple[Downstream, pd.DataFrame]:
    """Train and score one classifier per training set and repeat.

    Args:
        sources: What training sets are made of.
        classifier: The classifier.
        fingerprint: The encoder's.
        repeats: Draws of added patches per training set, and seeds of a classifier that depends on one.
        seed: Seed of the draws.
        only: Names of the training sets to compare; empty for all that can be built.

    Returns:
        The record for metrics.json; and a table with a row per test patch: each training set's prediction, share of
        correct repeats and mean class probabilities.

    Raises:
        UserError: ``only`` names a training set that does not exist or cannot be built.
    """
    study, additions = sources.study, sources.additions
    chosen, reasons = choose(sources, only)
    runs = _train(chosen, sources, classifier, repeats, seed)
    scorer = Scorer(study, additions.combinations)
    compared = _score(sources, chosen, runs, scorer, seed)
    scored = compared.scored
    differences: dict[str, dict[str, Differences]] = {}
    for a, b in comparisons(study.roles):
        if a in scored and b in scored:
            differences.setdefault(a, {})[b] = scorer.difference(scored[a], scored[b])
    record = Downstream(
        fingerprint=fingerprint,
        classifier=classifier.record,
        classes=study.classes,
        affected_sites=scorer.affected_sites,
        combinations=[
            HeldOutCombination(describe(combination), combination, n, site)
            for combination, n, site in zip(
                additions.combinations, additions.counts, sources.nearest_sites, strict=True
            )
        ],
        n_train=len(study.train),
        test_patients=scorer.patients_by_class,
        training_sets=compared.results,
        differences=differences,
        unavailable=reasons,
        not_converged=compared.not_converged,
    )
    return record, _prediction_table(study, compared, scorer.truth)


def choose(sources: Sources, only: Sequence[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The training sets to compare; and, of those that cannot be built, the reason.

    Raises:
        UserError: ``only`` names a training set that does not exist or cannot be built.
    """
    every = entries(sources.study.synthetic)
    reasons = {name: entry.kind.unavailable(sources, entry.synthetic) for name, entry in every.items()}
    for name in only:
        if name not in every:
            raise UserError(f"There is no training set {name!r}; {nearest(name, every)}.")
        if reasons[name]:
            raise UserError(f"The training set {name!r} cannot be built: {reasons[name]}.")
    chosen = {name: entry for name, entry in every.items() if not reasons[name] and (not only or name in only)}
    return chosen, {name: reason for name, reason in reasons.items() if reason}


def jobs(
    chosen: Mapping[str, Entry], sources: Sources, random: bool, repeats: int
) -> dict[tuple[Build, str, int], list[tuple[str, str]]]:
    """What is trained: by build, synthetic set and repeat the names and variants of the training sets that it gives.

    Repeats take the training seeds of a synthetic set in turn, each equally often.

    Args:
        chosen: The training sets.
        sources: What they are made of.
        random: Whether the classifier depends on a seed.
        repeats: Number of repeats of what depends on chance.
    """
    found: dict[tuple[Build, str, int], list[tuple[str, str]]] = {}
    for name, entry in chosen.items():
        seeds = sources.training_seeds(entry.synthetic)
        for variant, build in entry.variants.items():
            for r in range(-(-repeats // seeds) * seeds if random or build not in WITHOUT_DRAW else 1):
                found.setdefault((build, entry.synthetic, r), []).append((name, variant))
    return found


def _train(
    chosen: Mapping[str, Entry], sources: Sources, classifier: Classifier, repeats: int, seed: int
) -> dict[tuple[str, str], list[Run]]:
    """Predictions of each training set's variants, one per repeat."""
    todo = jobs(chosen, sources, classifier.random, repeats)
    of_seed = cache(sources.of_seed)
    results: dict[tuple[str, str], list[Run]] = {}
    # A network shows its own progress, by steps.
    shown = todo if classifier.random else progress(todo, desc="downstream classifiers", unit="classifiers")
    for build, synthetic, r in shown:
        training_set = build(of_seed(synthetic, r % sources.training_seeds(synthetic)), synthetic, seed + r)
        prediction = classifier.fit_predict(training_set, seed + r)
        # A network changes with its seed, also where nothing is drawn.
        pool = training_set.pool or 0.0 if classifier.random else training_set.pool
        run = Run(prediction, training_set.distinct, training_set.size, training_set.n_synthetic, pool)
        for key in todo[build, synthetic, r]:
            results.setdefault(key, []).append(run)
    return results


def _score(
    sources: Sources,
    chosen: Mapping[str, Entry],
    runs: Mapping[tuple[str, str], list[Run]],
    scorer: Scorer,
    seed: int,
) -> Compared:
    """Score each training set, every fold of test patients with the variant that is best on the others."""
    study = sources.study
    units = UnitScorer(study, scorer.codes, scorer.shift, scorer.patients)
    sites = study.site_labels[study.test]
    strata = np.array([f"{value}|{site}" for value, site in zip(scorer.truth, sites, strict=True)])
    folds = patient_folds(scorer.patients, strata, seed)
    compared = Compared()
    for name, entry in chosen.items():
        found = {v: runs[name, v] for v in entry.variants}
        repeats = max(map(len, found.values()))
        variants = {v: np.stack([run.prediction.predicted for run in own]) for v, own in found.items()}
        masks = cross_fitted(variants, folds, scorer.accuracy_shift)
        predicted = np.empty((repeats, len(folds)), dtype=np.result_type(*variants.values()))
        probabilities = np.empty((len(folds), len(study.classes)))
        for v, mask in masks.items():
            predicted[:, mask] = variants[v][:, mask]
            probabilities[mask] = np.mean([run.prediction.probabilities[mask] for run in found[v]], axis=0)
        folds_of = {v: len(np.unique(folds[mask])) for v, mask in masks.items()}
        best = max(folds_of, key=lambda variant: folds_of[variant])
        # Training seeds may have pools of different size.
        pools = [run.pool for v, own in found.items() if folds_of[v] for run in own if run.pool is not None]
        seeds = sources.training_seeds(entry.synthetic)
        draws = Draws(max(pools, default=None), [r % seeds for r in range(repeats)], bool(entry.synthetic))
        scored = scorer.scored(predicted, draws)
        stuck = [v for v, own in found.items() if not all(run.prediction.converged for run in own)]
        compared.not_converged += [f"{name}/{v}" for v in stuck]
        compared.predictions[name], compared.probabilities[name] = predicted, probabilities
        compared.scored[name] = scored
        last = found[best][-1]
        compared.results[name] = TrainingSetResult(
            **vars(scorer.accuracies(scored)),
            by_repeat=scored["accuracy_shift"].by_repeat.tolist(),
            combinations=scorer.by_combination(predicted, draws),
            scores=units.score(probabilities),
            role=entry.role(study.roles),
            variant=best,
            folds=folds_of,
            variants={v: scorer.accuracy_shift(one) for v, one in variants.items()},
            repeats=repeats,
            training_seeds=seeds,
            distinct_added=last.distinct,
            n_training=last.n_training,
            n_synthetic=last.n_synthetic,
        )
    return compared


def _prediction_table(study: Study, compared: Compared, truth: np.ndarray) -> pd.DataFrame:
    fixed = study.index.iloc[study.test][["key", "patient", *study.categorical()]].reset_index(drop=True)
    fixed["unseen"] = any_match(study.index, study.held_out)[study.test]
    columns: dict[str, np.ndarray] = {}
    for name, predicted in compared.predictions.items():
        columns[f"predicted_{name}"] = predicted[0]
        columns[f"right_{name}"] = np.round((predicted == truth).mean(axis=0), 4)
    for name, found in compared.probabilities.items():
        for i, value in enumerate(study.classes):
            columns[f"probability_{name}_{value}"] = np.round(found[:, i], 6)
    return pd.concat([fixed, pd.DataFrame(columns)], axis=1)
