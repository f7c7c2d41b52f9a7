"""Scores of synthetic patches, and the filters that they must pass, both derived from real training patches.

Centroids and linear probes consider one field at a time (or groups of fields that real patches have together), so that
they can score combinations that no real training patch has: such a patch must resemble its class, whatever the site,
and its site, whatever the class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.selection.inputs import BY_DISTANCE, MIN_PATIENTS_OF_VALUE, Inputs, column, joined, joined_all
from latent_medi.selection.result import ProbeReport
from latent_medi.selection.settings import Filter, Score, SelectSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.additive_effects import Effects, additive_effects, patient_weights
from latent_medi.statistics.group_distances import distance_in_groups
from latent_medi.statistics.linear_probe import fit_validated_linear_probe
from latent_medi.statistics.neighbours import nearest_cosine_distance, normalise, squared_distances
from latent_medi.statistics.subsampling import patients_in_turn

_BETTER_SAMPLES = (
    "Look at some, then train the model for longer or sample with more steps; farthest=0 selects all the same. "
    "Nothing was written."
)
_LEAST_IN_KERNEL, _MOST_IN_KERNEL = 20, 2000
_LEAST_ABOVE_CHANCE = 0.05
"""A linear probe whose accuracy exceeds chance by less than this is reported: it cannot recognise its field."""


@dataclass
class Scored:
    """Scores of the synthetic patches, and which filters they pass.

    Args:
        passed: Which patches pass, bool [N], by filter.
        scores: The lower the better, float64 [N]; NaN where a patch states no value that could be scored.
        thresholds: Cosine distances by filter.
        probes: Linear probes by field.
        warnings: What a reader must know.
        identities: Per patch what patches of the same pixels share; empty unless a filter compares pixels.
        exact_copies: Patches with the pixels of a real one; None without the filter "copies".
        distance_ratio: How far the patches are from tissue, see :func:`check_tissue`; None if that is unknown.
    """

    passed: dict[Filter, np.ndarray] = field(default_factory=dict)
    scores: dict[Score, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, float | None] = field(default_factory=dict)
    probes: dict[str, ProbeReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    identities: list[bytes] = field(default_factory=list)
    exact_copies: int | None = None
    distance_ratio: float | None = None


def score(inputs: Inputs, features: np.ndarray, real_features: np.ndarray, settings: SelectSettings) -> Scored:
    """Score all synthetic patches, and apply every filter but "duplicates", which depends on what passes the others.

    Args:
        inputs: The patches.
        features: Features of the synthetic patches, float32 [N, d]; normalised in place.
        real_features: Features of the real training patches, float32 [M, d]; normalised in place.
        settings: Filters and their thresholds.

    Raises:
        UserError: A filter cannot be applied to these data, or the patches are far from tissue.
    """
    scored = Scored()
    scored.distance_ratio = check_tissue(inputs, features, real_features, settings)
    needed = {*settings.filters, settings.rank}
    if "confidence" in needed:
        _confidence(inputs, features, real_features, settings, scored)
    # In place: hundreds of thousands of features are gigabytes. Only probes take them before.
    normalise(features)
    normalise(real_features)
    if "centroid" in needed:
        _centroids(inputs, features, real_features, settings, scored)
    if needed & {"outliers", "copies", "distance"}:
        scored.scores["distance"] = nearest_cosine_distance(features, real_features, device=settings.device)
    if not needed & {*BY_DISTANCE}:
        return scored
    between_patients = _distances_between_patients(inputs, real_features, settings)
    if "outliers" in needed:
        limit = scored.thresholds["outliers"] = float(np.quantile(between_patients, settings.outliers))
        limit_unseen = scored.thresholds["outliers_unseen_cells"] = _limit_of_unseen(inputs, real_features, settings)
        limits = np.where(inputs.unseen, np.inf if limit_unseen is None else limit_unseen, limit)
        scored.passed["outliers"] = scored.scores["distance"] <= limits[inputs.cell]
        _check_near(scored.passed["outliers"], settings)
    for name in ("copies", "duplicates"):
        if name in needed:
            scored.thresholds[name] = float(np.quantile(between_patients, getattr(settings, name)))
    if needed & {"copies", "duplicates"}:
        everything = np.arange(len(features))
        scored.identities = pixel_identities(inputs.synthetic, everything, settings.batch, settings.workers)
    if "copies" in needed:
        real = set(pixel_identities(inputs.real_dataset, inputs.real_rows, settings.batch, settings.workers))
        exact = np.array([identity in real for identity in scored.identities])
        scored.exact_copies = int(exact.sum())
        scored.passed["copies"] = ~exact & (scored.scores["distance"] >= scored.thresholds["copies"])
    return scored


def check_tissue(inputs: Inputs, features: np.ndarray, real: np.ndarray, settings: SelectSettings) -> float | None:
    """Refuse a dataset that is far from tissue as a whole: the best of noise is noise.

    Returns:
        Kernel distance of the patches to real training patches, over that between real patches: of the combination that
        is farthest from all others, or of a patient to all others (median), whichever is larger. None if it is unknown
        or there are fewer than 20 patches, or a single patient.

    The default of ``farthest``: on procedural tissue test patients of a single combination reach 0.8, the samples of a
    trained model's farthest combination 1.1; models after 60 steps 1.2 to 2.6, noise in stain colours 1.2 to 3.

    Raises:
        UserError: More than ``farthest``.
    """
    rng = np.random.default_rng([settings.seed, 13])
    patients = column(inputs.real, "patient")
    rows = patients_in_turn(patients, _MOST_IN_KERNEL, rng)
    drawn = np.sort(rng.permutation(len(features))[:_MOST_IN_KERNEL])
    if len(drawn) < _LEAST_IN_KERNEL or len(np.unique(patients)) < 2:
        return None
    groups = joined_all(inputs.real, inputs.cells)[rows]
    ratio = distance_in_groups(features[drawn], real[rows], groups, patients[rows]).ratio
    if settings.farthest and ratio is not None and ratio > settings.farthest:
        raise UserError(
            f"The patches of {settings.data} are far from tissue: their distance (KID) to real training patches is "
            f"{ratio:.1f} times the largest between real combinations, or patients, and the others; up to "
            f"{settings.farthest:g} is taken for tissue. The best of them would be no better.",
            _BETTER_SAMPLES,
        )
    return ratio


def _check_near(near: np.ndarray, settings: SelectSettings) -> None:
    """Refuse a dataset of which less than half as many patches pass the filter "outliers" as real patches do. On
    procedural tissue 96 % of a trained model's pass, 24 % after 60 steps, and of noise in the colours of a stain 35 %
    at most.

    Raises:
        UserError: As said.
    """
    share = float(near.mean())
    if settings.farthest and share < settings.outliers / 2:
        raise UserError(
            f"The patches of {settings.data} are far from tissue: {share:.0%} of them are as near to a real one as "
            f"{settings.outliers:.0%} of real patches are to one of another patient, less than half as many. The best "
            "of them would be no better.",
            _BETTER_SAMPLES,
        )


def _effects(inputs: Inputs, real: np.ndarray, settings: SelectSettings) -> Effects | None:
    """What the fields that form combinations, or are scored, do to the features of real patches."""
    fields = list(dict.fromkeys([*inputs.cells, *inputs.fields]))
    return additive_effects(real, inputs.real, fields) if settings.adjust and len(fields) > 1 else None


def _adjusted(effects: Effects | None, scored: Sequence[str], features: np.ndarray, index: pd.DataFrame) -> np.ndarray:
    """Features without the effects of the fields that are not scored.

    A probe of the class that never saw the class at a site would take the site for evidence against it.
    """
    if effects is None:
        return features
    return effects.subtract(features, index, [name for name in effects.values if name not in scored])


def _confidence(
    inputs: Inputs, features: np.ndarray, real: np.ndarray, settings: SelectSettings, scored: Scored
) -> None:
    """Whether a linear probe of each field recognises the stated value, and minus the mean log probability."""
    patients = column(inputs.real, "patient")
    effects = _effects(inputs, real, settings)
    logs = np.full((len(inputs.fields), len(features)), np.nan)
    for row, name in zip(logs, inputs.fields, strict=True):
        labels, stated = column(inputs.real, name), column(inputs.synthetic.index, name)
        count = pd.Series(labels).map(pd.Series(patients).groupby(labels).nunique()).to_numpy()
        rows = np.flatnonzero((labels != UNKNOWN_WORD) & (count >= MIN_PATIENTS_OF_VALUE))
        rows = rows[_some(patients[rows], settings)]
        training = _adjusted(effects, [name], real[rows], inputs.real.iloc[rows])
        probe = fit_validated_linear_probe(
            training, labels[rows], patients[rows], settings.regularisation, settings.seed
        )
        report = scored.probes[name] = ProbeReport.of(probe)
        if report.accuracy < report.chance + _LEAST_ABOVE_CHANCE:
            scored.warnings.append(
                f"The linear probe of {name} classifies {report.accuracy:.0%} of held-out patients' patches correctly "
                f"({report.chance:.0%} is chance): with this encoder's features it cannot score {name}."
            )
        known = stated != UNKNOWN_WORD
        own = _adjusted(effects, [name], features[known], inputs.synthetic.index[known])
        row[known] = probe.log_probability(own, stated[known])
    low = np.log(max(settings.confidence, 1e-300))
    scored.passed["confidence"] = (np.isnan(logs) | (logs >= low)).all(axis=0)
    scored.scores["confidence"] = -_mean_known(logs)


def _centroids(
    inputs: Inputs, features: np.ndarray, real: np.ndarray, settings: SelectSettings, scored: Scored
) -> None:
    """Whether in every group of fields the nearest centroid is the patch's own, and the mean squared distance to it."""
    passed, distances = np.ones(len(features), bool), np.zeros((len(inputs.groups), len(features)))
    patients = column(inputs.real, "patient")
    effects = _effects(inputs, real, settings)
    for distance, group in zip(distances, inputs.groups, strict=True):
        labels = joined(inputs.real, group)
        known = np.array([label is not None for label in labels])
        training = _adjusted(effects, group, real[known], inputs.real[known])
        names, centroids = class_centroids(training, labels[known], patients[known])
        codes = {name: i for i, name in enumerate(names)}
        own = np.array([codes.get(label, -1) for label in joined(inputs.synthetic.index, group)])
        squared = squared_distances(_adjusted(effects, group, features, inputs.synthetic.index), centroids)
        passed &= (own < 0) | (squared.argmin(axis=1) == own)  # a patch that states no value cannot miss it
        distance[:] = np.where(own < 0, np.nan, squared[np.arange(len(own)), own])
    scored.passed["centroid"], scored.scores["centroid"] = passed, _mean_known(distances)


def class_centroids(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The labels in order, and the mean normalised feature of each, every patient weighing the same, float64 [G, d]."""
    weights = patient_weights(labels, patients)
    names = sorted(set(labels.tolist()))
    centroids = [weights[labels == name] @ features[labels == name].astype(np.float64) for name in names]
    return names, np.stack(centroids)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all are NaN."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _some(patients: np.ndarray, settings: SelectSettings) -> np.ndarray:
    """Positions of the real patches that train a probe, or whose distances give thresholds."""
    return patients_in_turn(patients, settings.most, np.random.default_rng([settings.seed, 11]))


def _distances_between_patients(inputs: Inputs, real: np.ndarray, settings: SelectSettings) -> np.ndarray:
    """Cosine distances of real training patches to the nearest one of another patient."""
    _, patients = np.unique(column(inputs.real, "patient"), return_inverse=True)
    rows = _some(column(inputs.real, "patient"), settings)
    exclude = [(patients[rows], patients)]
    return nearest_cosine_distance(real[rows], real, exclude, settings.device, "distances between patients")


def _limit_of_unseen(inputs: Inputs, real: np.ndarray, settings: SelectSettings) -> float | None:
    """Threshold of "outliers" in combinations without real training patches; None if there are no such combinations.

    It comes from the distances of real training patches to the nearest one of another patient and another combination:
    what is usual where the training data have no patch of a combination.
    """
    if not inputs.unseen.any():
        return None
    _, patients = np.unique(column(inputs.real, "patient"), return_inverse=True)
    _, cells = np.unique(joined_all(inputs.real, inputs.cells), return_inverse=True)
    rows = _some(column(inputs.real, "patient"), settings)
    exclude = [(patients[rows], patients), (cells[rows], cells)]
    found = nearest_cosine_distance(real[rows], real, exclude, settings.device, "distances between combinations")
    found = found[np.isfinite(found)]
    if not len(found):
        raise UserError(
            "The filter outliers cannot be applied to combinations without training patches: all training patches have "
            "one combination.",
            "Leave outliers out of filters.",
        )
    return float(np.quantile(found, settings.outliers))


def pixel_identities(dataset: PatchDataset, rows: np.ndarray, batch: int, workers: int = 0) -> list[bytes]:
    """Per patch a hash that patches with the same pixels share, also rotated or mirrored: the least of the 8 views."""
    result = []
    batches = dataset.iterate(rows, batch, workers)
    for _, images in progress(batches, len(rows), f"pixels of {dataset.name}", "patches", batch):
        for image in images:
            rotated = [np.rot90(image, k) for k in range(4)]
            views = [*rotated, *(view[:, ::-1] for view in rotated)]
            result.append(min(hashlib.sha256(np.ascontiguousarray(view).tobytes()).digest() for view in views))
    return result
