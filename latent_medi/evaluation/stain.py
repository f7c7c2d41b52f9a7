"""Stain that was asked for and stain that came: by optical density and by Macenko's vectors, no network in between."""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_medi.evaluation.measures import PatientResamples, PatientTable, measure, wilson
from latent_medi.evaluation.rivals import balanced_draw
from latent_medi.evaluation.study import Combination, Study, among, describe, matches
from latent_medi.features.colour import StainStats, fit_stain, stain_angles, tissue_density

_MOST = 160
"""Patches per site or combination and source; a stain needs no more."""


def stain(study: Study, resamples: int, seed: int) -> dict[str, Any]:
    """Colour of the samples of each site, and of each held-out combination, against real test patches of the same.

    Args:
        study: The cohort.
        resamples: Patient resamples for the interval of real patients.
        seed: Seed of the choice of patches, classes in equal parts, and of the resamples.

    Returns:
        ``cells``, each with ``name``, ``combination``, ``held_out``, ``density`` (of real test patches: mean decadic
        optical density of red, green and blue where there is tissue) and ``sources``: "real", further patients, and
        each arm, with ``asked`` (whether it was given the site), ``n``, ``density``; ``distance``, Euclidean, of its
        density to the test patches'; ``angles``, in degrees, between the haematoxylin and the eosin vectors (Macenko et
        al. 2009); ``strength``, the 99th percentile of either stain's concentration over the test patches'; and
        ``nearest``, a measure: the share of patches whose density is nearer to the mean of this site's training
        patches than to another site's. Without two sites in training, ``reason`` instead.
    """
    sites = study.index[study.site_field].to_numpy(str)
    classes = study.index[study.class_field].to_numpy(str)
    values = [v for v in study.real.schema.field(study.site_field).values if (sites[study.train] == v).any()]
    if len(values) < 2:
        return {"cells": [], "reason": "fewer than two sites in training"}
    read = _Reader(study, seed)
    centres = np.stack(
        [
            _mean(read.real(study.train[sites[study.train] == v])[0]) for v in values
        ]
    )  # fmt: skip
    wanted: list[tuple[Combination, bool]] = [({study.site_field: v}, False) for v in values]
    wanted += [(c, True) for c in study.held_out if c.get(study.site_field) in values]
    cells = []
    for combination, held_out in wanted:
        number = values.index(combination[study.site_field])
        target, rows = read.real(among(study.reference, matches(study.index, combination)))
        if not len(target):
            continue
        stats, density = fit_stain(target), _mean(target)
        cell: dict[str, Any] = {"name": describe(combination), "combination": combination, "held_out": held_out,
                                "density": density, "sources": {}}  # fmt: skip
        others = among(study.probe, matches(study.index, combination))
        present = set(classes[rows])
        if len(others):
            images, rows = read.real(others)
            people = PatientResamples(study.patients[rows], resamples, seed)
            cell["sources"]["real"] = _source(images, stats, density, centres, number, people)
        for arm in study.arms.values():
            known = {k: v for k, v in combination.items() if k in arm.fields}
            keep = matches(arm.index, known) & np.isin(arm.index[study.class_field].to_numpy(str), list(present))
            if keep.any():
                images = read.arm(arm.name, np.flatnonzero(keep))
                cell["sources"][arm.name] = _source(images, stats, density, centres, number) | {
                    "asked": study.site_field in arm.fields
                }
        cells.append(cell)
    return {"cells": cells}


class _Reader:
    """Reads some of the rows, classes in equal parts."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed = study, seed

    def real(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = self.study.index[self.study.class_field].to_numpy(str)[rows]
        rows = rows[self._some(labels)]
        return self.study.real.read(rows), rows

    def arm(self, name: str, rows: np.ndarray) -> np.ndarray:
        arm = self.study.arms[name]
        labels = arm.index[self.study.class_field].to_numpy(str)[rows]
        return arm.dataset.read(arm.rows[rows[self._some(labels)]])

    def _some(self, labels: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 43])
        return np.unique(balanced_draw(labels, min(_MOST, len(labels)), rng))


def _mean(images: np.ndarray) -> np.ndarray:
    return np.nanmean(tissue_density(images), axis=0)


def _source(
    images: np.ndarray,
    target: StainStats,
    density: np.ndarray,
    centres: np.ndarray,
    number: int,
    people: PatientResamples | None = None,
) -> dict[str, Any]:
    """Samples are independent draws; real patches are resampled by patient."""
    own, each = fit_stain(images), tissue_density(images)
    tissue = ~np.isnan(each).any(axis=1)
    if not tissue.any():
        return {"asked": True, "n": 0, "density": None, "distance": None, "angles": None, "strength": None,
                "nearest": measure(None, 0, 0)}  # fmt: skip
    away = np.linalg.norm(each[:, None] - centres[None], axis=2)
    right = np.where(tissue, np.nan_to_num(away, nan=np.inf).argmin(axis=1) == number, False)
    if people is None:
        hits, n = int(right.sum()), int(tissue.sum())
        nearest = measure(hits / n, n, 0) | {"interval": wilson(hits, n), "interval_over": "samples"}
    else:
        table = PatientTable(np.zeros(len(images), int), people.codes, tissue, 1, len(people.names))
        nearest = table.measure(right.astype(float), people.weights)
    mean = each[tissue].mean(axis=0)
    return {
        "asked": True, "n": len(images), "density": mean, "distance": float(np.linalg.norm(mean - density)),
        "angles": stain_angles(own, target), "strength": own.strength / target.strength, "nearest": nearest,
    }  # fmt: skip
