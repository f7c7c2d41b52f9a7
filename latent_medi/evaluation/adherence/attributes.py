"""Whether synthetic samples of unseen combinations show the class, hospital and other attributes that were requested.

Linear probes are trained on real patches of other patients, held-out combinations included. Their accuracy on real test
patches of the same combinations is what samples are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from latent_medi.evaluation.adherence.records import CombinationRecovery, FieldRecovery, Recovery
from latent_medi.evaluation.cohort.combinations import Combination, among, describe, matches
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.statistics.intervals import SHARE, Estimate, estimate, share_of_samples
from latent_medi.statistics.linear_probe import fit_linear_probe
from latent_medi.statistics.patient_means import PatientTable
from latent_medi.statistics.shared_samples import Group, mean_over_groups

_MAX_TRAINING = 20_000


@dataclass(frozen=True)
class FieldPredictions:
    """What the linear probe of one field predicts.

    Args:
        values: Values that it knows.
        real: For each real test patch of ``study.reference``, [N].
        synthetic: For each sample, by synthetic set.
        converged: Whether its optimiser reached its tolerance.
        n_training: Real patches that it was trained on.
    """

    values: list[str]
    real: np.ndarray
    synthetic: dict[str, np.ndarray]
    converged: bool
    n_training: int


def predict_fields(study: Study, features: Features, regularisation: float, seed: int) -> dict[str, FieldPredictions]:
    """Predictions of a linear probe of each categorical field, for the samples and the real test patches.

    A field with fewer than two values among the training patches has none.
    """
    result: dict[str, FieldPredictions] = {}
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
        synthetic = {
            s.name: probe.predict(features.synthetic[s.name]) for s in study.synthetic.values() if len(s.index)
        }
        real = probe.predict(features.real[study.reference])
        result[name] = FieldPredictions(present, real, synthetic, probe.converged, len(training))
    return result


def recovery(study: Study, predictions: Mapping[str, FieldPredictions]) -> dict[str, FieldRecovery]:
    """Share of samples in which the linear probe finds the requested value, by field."""
    return {name: _field(study, name, found) for name, found in predictions.items()}


def _field(study: Study, name: str, predictions: FieldPredictions) -> FieldRecovery:
    values, reference = predictions.values, study.reference
    truth = study.index[name].to_numpy(dtype=str)[reference]
    right = (predictions.real == truth).astype(float)
    patients = np.unique(study.patients[reference], return_inverse=True)[1]
    combinations: list[CombinationRecovery] = []
    kept: list[np.ndarray] = []
    groups: dict[str, list[Group]] = {}
    for combination in study.held_out:
        rows = np.flatnonzero(study.having(combination)[reference] & np.isin(truth, values))
        found: dict[str, Recovery] = {}
        for samples in study.synthetic.values():
            group = _requested(samples, name, combination, predictions)
            if group is not None:
                groups.setdefault(samples.name, []).append(group)
                share = share_of_samples(int(group.hits.sum()), len(group.rows))
                found[samples.name] = Recovery(**vars(share), conditioned=name in samples.fields)
        real = _accuracy(right, patients, [rows])
        combinations.append(CombinationRecovery(describe(combination), combination, found, real))
        kept.append(rows)
    real = _accuracy(right, patients, kept)
    return FieldRecovery(
        values=values,
        chance=1.0 / len(values),
        synthetic={
            n: Recovery(
                **vars(mean_over_groups(own)), conditioned=name in study.synthetic[n].fields, n_combinations=len(own)
            )
            for n, own in groups.items()
        },
        real=real,
        combinations=combinations,
        confusion={
            REAL: _confusion(truth, predictions.real, values),
            **{
                s.name: _confusion(s.index[name].to_numpy(dtype=str), predictions.synthetic[s.name], values)
                for s in study.synthetic.values()
                if name in s.fields and s.name in predictions.synthetic
            },
        },
        converged=predictions.converged,
        n_training=predictions.n_training,
    )


def _accuracy(right: np.ndarray, patients: np.ndarray, combinations: list[np.ndarray]) -> Estimate:
    """Mean over combinations of the mean over patients of the patient's share of right predictions.

    Args:
        right: 1 where a prediction is right, else 0, [N].
        patients: Patient code of each, [N].
        combinations: Positions in these of each combination, which may share rows and patients.
    """
    nothing, n_groups = np.zeros(0, int), len(combinations)
    rows = np.concatenate([nothing, *combinations])
    which = np.concatenate([nothing, *(np.full(len(found), i) for i, found in enumerate(combinations))])
    n_patients = int(patients.max(initial=-1)) + 1
    table = PatientTable(which, patients[rows], np.full(len(rows), True), n_groups, n_patients)
    values = right[rows]
    n_patches = len(np.unique(rows))
    return estimate(table.mean(values), n_patches, table.n_patients, table.spread(values), SHARE, table.smallest_class)


def _requested(
    synthetic: SyntheticSet, name: str, combination: Combination, predictions: FieldPredictions
) -> Group | None:
    """What was requested of a set's samples of a combination and what was found; ``None`` where nothing was requested.

    A set whose model was not conditioned on the field is compared with the combination's value all the same: its share
    is what class alone achieves.
    """
    found = predictions.synthetic.get(synthetic.name)
    if found is None:
        return None
    known = {k: v for k, v in combination.items() if k in synthetic.fields}
    rows = np.flatnonzero(matches(synthetic.index, known))
    if name in synthetic.fields:
        requested = synthetic.index[name].to_numpy(dtype=str)[rows]
    elif name in combination:
        requested = np.full(len(rows), combination[name])
    else:
        return None
    kept = np.isin(requested, predictions.values)
    rows, requested = rows[kept], requested[kept]
    if len(rows) == 0:
        return None
    return Group(rows, found[rows], requested)


def _confusion(requested: np.ndarray, found: np.ndarray, values: list[str]) -> list[list[float | None]]:
    matrix: list[list[float | None]] = []
    for value in values:
        rows = requested == value
        matrix.append([float((found[rows] == other).mean()) if rows.any() else None for other in values])
    return matrix
