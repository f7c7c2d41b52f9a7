"""Does it help a classifier? Every arm adds equally many patches to each held-out cell and is judged on real test
patients.

Arms: ``real`` (nothing added), ``oversample``, ``stain_transfer``, each synthetic dataset, and ``oracle`` (real
patches of the held-out cells from other patients). The score that counts, ``accuracy_shift``, is the balanced
accuracy over all classes of the test patches from sites that have a held-out combination, averaged over patients first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.evaluation.measures import PatientResamples, PatientTable
from latent_medi.evaluation.probes import fit_probe
from latent_medi.evaluation.rivals import (
    STAIN_METHODS,
    Transferred,
    affected_sites,
    balanced_draw,
    domain,
    expand_cells,
    repeated_draw,
    stain_transfer,
)
from latent_medi.evaluation.study import Arm, Combination, Study, among, any_match, describe, matches
from latent_medi.progress import get_logger

log = get_logger(__name__)

HEADLINE = "accuracy_shift"


@dataclass
class Added:
    """One draw of added patches.

    Args:
        features: [n, d].
        labels: Class value of each, [n].
        distinct: Different patches per cell, in the order of the plan's cells.
    """

    features: np.ndarray
    labels: np.ndarray
    distinct: list[int]


@dataclass
class Plan:
    """How many patches each held-out cell gets, the same for every arm.

    Args:
        cells: Held-out cells, each with a class.
        counts: Patches per cell.
        transferred: Stain-transferred patches per cell; None where no stain can be imitated.
        unavailable: Reason by arm that cannot take part.
    """

    cells: list[Combination]
    counts: list[int]
    transferred: list[Transferred | None] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


def make_plan(study: Study, added_per_cell: int, seed: int) -> Plan:
    """Fix cells, counts and the stain-transferred patches, which are made and embedded once."""
    cells = expand_cells(study)
    table = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str)
    typical = int(table.value_counts().median())
    counts = []
    for cell in cells:
        available = [len(_arm_rows(arm, cell)) for arm in study.arms.values() if _knows(arm, cell)]
        counts.append(added_per_cell or min([typical, *(a for a in available if a)]))
    plan = Plan(cells, counts)
    # A half more than needed, so that the draws of different seeds differ.
    plan.transferred = [
        stain_transfer(study, c, n + n // 2, seed + i) for i, (c, n) in enumerate(zip(cells, counts, strict=True))
    ]
    for arm in study.arms.values():
        for cell, n in zip(cells, counts, strict=True):
            here = len(_arm_rows(arm, cell))
            if here == 0:
                plan.unavailable[arm.name] = f"it has no sample for {describe(cell)}"
            elif here < n:
                log.warning("Arm %s has %d samples for %s and repeats them to %d.", arm.name, here, describe(cell), n)
    if study.oracle_reason:
        plan.unavailable["oracle"] = study.oracle_reason
    else:
        for cell in cells:
            if not matches(study.index, cell)[study.probe].any():
                plan.unavailable["oracle"] = f"no probe patient has {describe(cell)}"
    if not any(plan.transferred):
        plan.unavailable["stain_transfer"] = "no held-out cell names a site whose stain is known from training patches"
    return plan


def _knows(arm: Arm, cell: Combination) -> bool:
    return all(k in arm.fields for k in cell)


def _arm_rows(arm: Arm, cell: Combination) -> np.ndarray:
    return np.flatnonzero(matches(arm.index, {k: v for k, v in cell.items() if k in arm.fields}))


class Drawer:
    """Draws the added patches of each arm.

    Args:
        study: The cohort.
        plan: Cells and counts.
        real: Features of every real row, [N, d].
        arms: Features of every row of each synthetic dataset.
        transferred: Features of the stain-transferred patches, per method and cell.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        real: np.ndarray,
        arms: Mapping[str, np.ndarray],
        transferred: Mapping[str, Sequence[np.ndarray | None]],
    ) -> None:
        self.study, self.plan, self.real, self.arms, self.transferred = study, plan, real, arms, transferred

    def variants(self) -> dict[str, list[str]]:
        """Variants of each arm that can take part; of several, the best is headlined."""
        arms: dict[str, list[str]] = {
            "real": ["real"],
            "oversample": ["duplicate", "balance"],
            "stain_transfer": list(STAIN_METHODS),
        }
        arms |= {name: [name] for name in self.study.arms} | {"oracle": ["oracle"]}
        return {a: v for a, v in arms.items() if a not in self.plan.unavailable}

    def draw(self, arm: str, variant: str, seed: int) -> Added:
        """The patches that an arm adds, with one seed."""
        rng = np.random.default_rng([seed, 5])
        taken: dict[str, set[int]] = {}
        parts, labels, distinct = [np.zeros((0, self.real.shape[1]))], [np.zeros(0, str)], []
        for i, (cell, n) in enumerate(zip(self.plan.cells, self.plan.counts, strict=True)):
            value = cell[self.study.class_field]
            source, rows = self._rows(arm, variant, i, n, rng, taken.setdefault(value, set()))
            parts.append(source[rows])
            labels.append(np.full(len(rows), value))
            distinct.append(len(np.unique(rows)))
        return Added(np.concatenate(parts), np.concatenate(labels), distinct)

    def _rows(
        self, arm: str, variant: str, i: int, n: int, rng: np.random.Generator, taken: set[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        study, cell = self.study, self.plan.cells[i]
        if arm in ("real",) or variant == "balance":
            return self.real, np.zeros(0, int)
        if arm == "oracle":
            return self.real, repeated_draw(among(study.probe, matches(study.index, cell)), n, rng)
        if arm == "stain_transfer" and (features := self.transferred[variant][i]) is not None:
            return features, repeated_draw(np.arange(len(features)), n, rng)
        if arm in ("oversample", "stain_transfer"):
            own = among(study.train, matches(study.index, {study.class_field: cell[study.class_field]}))
            sites = study.index[study.site_field].to_numpy(str)[own]
            return self.real, own[balanced_draw(sites, n, rng)] if len(own) else own
        rows = _arm_rows(study.arms[arm], cell)
        # An arm that knows only the class serves all cells of a class from one pool: without repeats while it lasts.
        fresh = np.array([r for r in rows if r not in taken], dtype=int)
        rows = repeated_draw(fresh if len(fresh) >= n else rows, n, rng)
        taken.update(rows.tolist())
        return self.arms[arm], rows


def balancing_weights(study: Study) -> np.ndarray:
    """Weight of each training row that makes all seen class × site cells count the same; mean 1."""
    cell = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str).agg("|".join, axis=1)
    weights = 1.0 / cell.map(cell.value_counts()).to_numpy(float)
    return weights * len(weights) / weights.sum()


class Scorer:
    """Scores of predictions on the test patients; all intervals and differences share one patient bootstrap."""

    def __init__(self, study: Study, cells: Sequence[Combination], resamples: int, seed: int) -> None:
        self.study, self.cells = study, list(cells)
        index = study.index
        self.truth = index[study.class_field].to_numpy(str)[study.test]
        classes = {v: i for i, v in enumerate(study.classes)}
        self.codes = np.array([classes[v] for v in self.truth])
        self.bootstrap = PatientResamples(study.patients[study.test], resamples, seed)
        sites = index[study.site_field].to_numpy(str)[study.test]
        held = any_match(index, study.held_out)[study.test]
        self.affected = sorted(affected_sites(study))
        shift = np.isin(sites, self.affected)
        self.tables = {
            HEADLINE: self._table(shift),
            "accuracy_in_distribution": self._table(~shift),
            "accuracy_seen": self._table(~held),
            "accuracy_unseen": self._table(held),
        }
        self.recalls, self.alarms = [], []
        for cell in self.cells:
            here = matches(index, domain(study, cell))[study.test]
            of_class = self.truth == cell[study.class_field]
            self.recalls.append(self._table(here & of_class))
            self.alarms.append(self._table(here & ~of_class, one_group=True))

    def _table(self, keep: np.ndarray, one_group: bool = False) -> PatientTable:
        codes = np.zeros_like(self.codes) if one_group else self.codes
        groups = 1 if one_group else len(self.study.classes)
        return PatientTable(codes, self.bootstrap.codes, keep, groups, len(self.bootstrap.names))

    def score(self, predicted: np.ndarray) -> dict[str, Any]:
        """Measures of an arm.

        Args:
            predicted: Class values, [repeats, n_test].
        """
        right = (predicted == self.truth).mean(axis=0)
        result: dict[str, Any] = {name: t.measure(right, self.bootstrap.weights) for name, t in self.tables.items()}
        result[HEADLINE]["by_repeat"] = [
            float(self.tables[HEADLINE].mean((p == self.truth).astype(float))[0]) for p in predicted
        ]
        result["cells"] = []
        for cell, recall, alarm in zip(self.cells, self.recalls, self.alarms, strict=True):
            false = (predicted == cell[self.study.class_field]).mean(axis=0)
            result["cells"].append(
                {
                    "name": describe(cell),
                    "combination": cell,
                    "recall": recall.measure(right, self.bootstrap.weights),
                    "false_positive_rate": alarm.measure(false, self.bootstrap.weights),
                }
            )
        return result

    def difference(self, a: np.ndarray, b: np.ndarray, name: str = HEADLINE) -> dict[str, Any]:
        """Paired difference a − b of a score, with the interval over patients; arguments as in :meth:`score`."""
        table = self.tables[name]
        delta = (a == self.truth).mean(axis=0) - (b == self.truth).mean(axis=0)
        return table.measure(delta, self.bootstrap.weights)


def compare(
    study: Study, drawer: Drawer, regularisation: float, repeats: int, resamples: int, seed: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train and judge every arm on one encoder's features.

    Returns:
        The record for metrics.json, and a row per test patch with each arm's prediction and share of right repeats.
    """
    plan = drawer.plan
    scorer = Scorer(study, plan.cells, resamples, seed)
    train_x = drawer.real[study.train]
    train_y = study.index[study.class_field].to_numpy(str)[study.train]
    test_x = drawer.real[study.test]
    arms: dict[str, Any] = {}
    predictions: dict[str, np.ndarray] = {}
    not_converged: list[str] = []
    for arm, variants in drawer.variants().items():
        best: tuple[float, str] | None = None
        scores: dict[str, float] = {}
        for variant in variants:
            predicted, distinct, converged = [], [0] * len(plan.cells), True
            fixed = arm == "real" or variant == "balance"
            for r in range(1 if fixed else repeats):
                added = drawer.draw(arm, variant, seed + r)
                distinct = added.distinct
                weights = balancing_weights(study) if variant == "balance" else None
                probe = fit_probe(
                    np.concatenate([train_x, added.features]),
                    np.concatenate([train_y, added.labels]),
                    regularisation,
                    weights,
                )
                converged &= probe.converged
                predicted.append(probe.predict(test_x).astype(str))
            table = np.stack(predicted)
            result = scorer.score(table)
            scores[variant] = result[HEADLINE]["value"]
            if not converged:
                not_converged.append(f"{arm}/{variant}")
            if best is None or scores[variant] > best[0]:
                best = (scores[variant], variant)
                predictions[arm] = table
                arms[arm] = result | {"variant": variant, "repeats": len(table), "distinct_added": distinct}
        arms[arm]["variants"] = scores
    record = {
        "classes": study.classes,
        "affected_sites": scorer.affected,
        "cells": [
            {"name": describe(c), "combination": c, "added": n} for c, n in zip(plan.cells, plan.counts, strict=True)
        ],
        "n_train": len(study.train),
        "arms": arms,
        "differences": _differences(scorer, predictions),
        "unavailable": dict(plan.unavailable),
        "not_converged": not_converged,
    }
    return record, _prediction_table(study, predictions, scorer.truth)


def _differences(scorer: Scorer, predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    pairs = [
        (a, b) for a in ("medi", "cls", "oracle") for b in ("real", "oversample", "stain_transfer", "cls") if a != b
    ]
    return {
        f"{a} - {b}": {name: scorer.difference(predictions[a], predictions[b], name) for name in scorer.tables}
        for a, b in pairs
        if a in predictions and b in predictions
    }


def _prediction_table(study: Study, predictions: Mapping[str, np.ndarray], truth: np.ndarray) -> pd.DataFrame:
    table = study.index.iloc[study.test][["key", "patient", *study.categorical()]].reset_index(drop=True)
    table["unseen"] = any_match(study.index, study.held_out)[study.test]
    for arm, predicted in predictions.items():
        table[f"predicted_{arm}"] = predicted[0]
        table[f"right_{arm}"] = np.round((predicted == truth).mean(axis=0), 4)
    return table
