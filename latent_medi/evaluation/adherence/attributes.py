"""Whether synthetic samples of unseen combinations show the class, hospital and other attributes that were asked for.

Probes learn the attributes from real patches of other patients, held-out combinations included; their accuracy on
real test patches of the same combinations is the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_medi.evaluation.cohort.combinations import among, any_match, describe, matches
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.fidelity.distance_to_real import Features
from latent_medi.statistics.bootstrap import PatientResamples, PatientTable, measure, wilson
from latent_medi.statistics.linear_probe import fit_linear_probe

_MAX_TRAINING = 20_000


@dataclass
class Verdicts:
    """What the probe of one field sees.

    Args:
        values: Values that it can tell.
        real: In each real test patch of ``study.reference``, [N].
        arms: In each sample, by arm.
        converged: Whether its optimiser reached its tolerance.
        n_training: Real patches that it learned from.
    """

    values: list[str]
    real: np.ndarray
    arms: dict[str, np.ndarray]
    converged: bool
    n_training: int


def look(study: Study, features: Features, regularisation: float, seed: int) -> dict[str, Verdicts]:
    """Let a probe of each categorical field judge the samples and the real test patches.

    A field with fewer than two values among the probes' training patches has none.
    """
    result: dict[str, Verdicts] = {}
    for name in study.categorical():
        values = study.real.schema.field(name).values
        truth = study.index[name].to_numpy(dtype=str)
        training = among(study.probe_train, np.isin(truth, values))
        present = [v for v in values if (truth[training] == v).any()]
        if len(present) < 2:
            continue
        if len(training) > _MAX_TRAINING:
            rng = np.random.default_rng([seed, 3])
            training = np.sort(rng.choice(training, _MAX_TRAINING, replace=False))
        probe = fit_linear_probe(features.real[training], truth[training], regularisation)
        found = {a.name: probe.predict(features.synthetic[a.name]) for a in study.synthetic.values() if len(a.index)}
        real = probe.predict(features.real[study.reference])
        result[name] = Verdicts(present, real, found, probe.converged, len(training))
    return result


def recovery(study: Study, verdicts: Mapping[str, Verdicts], resamples: int, seed: int) -> dict[str, Any]:
    """Share of samples in which a probe finds the requested value, per field.

    Returns:
        Per field: ``arms`` (a measure each; the interval is over samples, which have no patients), ``ceiling``
        (patients first), ``chance``, ``values``, per-combination ``cells``, and ``confusion`` per arm over all its
        samples (row: requested, column: found, as shares of the row).
    """
    return {
        name: _field(study, name, seen, resamples, seed)
        | {"converged": seen.converged, "n_training": seen.n_training}
        for name, seen in verdicts.items()
    }  # fmt: skip


def _field(study: Study, name: str, seen: Verdicts, resamples: int, seed: int) -> dict[str, Any]:
    values, found_real, found = seen.values, seen.real, seen.arms
    truth = study.index[name].to_numpy(dtype=str)
    right_real = (found_real == truth[study.reference]).astype(float)
    bootstrap = PatientResamples(study.patients[study.reference], resamples, seed)
    cells: list[dict[str, Any]] = []
    tables: list[PatientTable] = []
    for combination in study.held_out:
        keep = study.having(combination)[study.reference] & np.isin(truth[study.reference], values)
        # One group per combination: the mean over patients, not over the values within it.
        table = PatientTable(np.zeros(len(keep), int), bootstrap.codes, keep, 1, len(bootstrap.names))
        tables.append(table)
        cell: dict[str, Any] = {"name": describe(combination), "combination": combination, "arms": {}}
        cell["ceiling"] = table.measure(right_real, bootstrap.weights, rate=True)
        for arm in study.synthetic.values():
            share = _cell_share(arm, name, combination, values, found.get(arm.name))
            if share is not None:
                cell["arms"][arm.name] = share
        cells.append(cell)
    arms: dict[str, Any] = {}
    for arm in study.synthetic.values():
        shares = [c["arms"][arm.name] for c in cells if arm.name in c["arms"]]
        if shares:
            n = sum(s["n_patches"] for s in shares)
            value = float(np.mean([s["value"] for s in shares]))
            arms[arm.name] = measure(value, n, 0, n_cells=len(shares), asked=name in arm.fields)
            arms[arm.name] |= {"interval": wilson(round(value * n), n), "interval_over": "samples"}
    ceilings = [t.mean(right_real, bootstrap.weights) for t in tables if t.n_patches]
    points = [c["ceiling"]["value"] for c in cells if c["ceiling"]["value"] is not None]
    rows = among(study.reference, any_match(study.index, study.held_out))
    return {
        "values": values,
        "chance": 1.0 / len(values),
        "arms": arms,
        "ceiling": measure(
            float(np.mean(points)) if points else None, len(rows), len(set(study.patients[rows])),
            np.mean(ceilings, axis=0) if ceilings else None, n_cells=len(points),
        ),
        "cells": cells,
        "confusion": {
            "ceiling": _confusion(truth[study.reference], found_real, values),
            **{a.name: _confusion(a.index[name].to_numpy(dtype=str), found[a.name], values)
               for a in study.synthetic.values() if name in a.fields and a.name in found},
        },
    }  # fmt: skip


def _cell_share(
    arm: SyntheticSet, name: str, combination: dict[str, str], values: list[str], found: np.ndarray | None
) -> dict[str, Any] | None:
    """Recovery of one field in an arm's samples of a combination; None where nothing was asked for.

    An arm without the field is still held against the combination's value: its score is what class alone achieves.
    """
    if found is None:
        return None
    known = {k: v for k, v in combination.items() if k in arm.fields}
    rows = np.flatnonzero(matches(arm.index, known))
    if name in arm.fields:
        asked = arm.index[name].to_numpy(dtype=str)[rows]
    elif name in combination:
        asked = np.full(len(rows), combination[name])
    else:
        return None
    asked_for = np.isin(asked, values)
    rows, asked = rows[asked_for], asked[asked_for]
    if len(rows) == 0:
        return None
    hits = int((found[rows] == asked).sum())
    share = measure(hits / len(rows), len(rows), 0, asked=name in arm.fields)
    return share | {"interval": wilson(hits, len(rows)), "interval_over": "samples"}


def _confusion(asked: np.ndarray, found: np.ndarray, values: list[str]) -> list[list[float | None]]:
    matrix: list[list[float | None]] = []
    for a in values:
        rows = asked == a
        matrix.append([float((found[rows] == f).mean()) if rows.any() else None for f in values])
    return matrix
