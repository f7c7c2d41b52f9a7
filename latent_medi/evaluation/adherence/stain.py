"""Stain that was asked for and stain that came: by optical density and by Macenko's vectors, no network in between."""

from __future__ import annotations

from typing import Any

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, describe, matches
from latent_medi.evaluation.cohort.study import Study
from latent_medi.features.stain import fit_stain, stain_angles, tissue_density
from latent_medi.statistics.bootstrap import PatientResamples, PatientTable, measure, wilson
from latent_medi.statistics.subsampling import balanced_draw

_MOST = 160
"""Patches per site or combination and source; a stain needs no more."""


def stain(study: Study, resamples: int, seed: int) -> dict[str, Any]:
    """Colour of the samples of each site, and of each held-out combination, against real test patches of the same.

    Classes differ in density too. Every comparison is over the classes that both sides have, in equal parts, and which
    site a patch is nearest to is told after its class's part is taken off (site and class effects by least squares over
    training patches).

    Args:
        study: The cohort.
        resamples: Patient resamples for the interval of real patients.
        seed: Seed of the choice of patches and of the resamples.

    Returns:
        ``cells``, each with ``name``, ``combination``, ``held_out``, ``density`` (of real test patches: mean decadic
        optical density of red, green and blue where there is tissue) and ``sources``: "real", further patients, and
        each arm, with ``asked`` (whether it was given the site), ``n``, ``density``; ``distance``, Euclidean, of its
        density to the test patches'; ``angles``, in degrees, between the haematoxylin and the eosin vectors (Macenko et
        al. 2009); ``strength``, the 99th percentile of either stain's concentration over the test patches'; and
        ``nearest``, a measure: the share of patches whose density is nearer to this site's than to another's. Without
        two sites in training, ``reason`` instead.
    """
    sites = study.site_labels
    values = [v for v in study.real.schema.field(study.site_field).values if (sites[study.train] == v).any()]
    if len(values) < 2:
        return {"cells": [], "reason": "fewer than two sites in training"}
    read = _Reader(study, seed)
    centres, offsets = _effects([read.real(study.train[sites[study.train] == v]) for v in values])
    wanted: list[tuple[Combination, bool]] = [({study.site_field: v}, False) for v in values]
    wanted += [(c, True) for c in study.held_out if c.get(study.site_field) in values]
    cells = []
    for combination, held_out in wanted:
        number = values.index(combination[study.site_field])
        rows = study.rows_of(study.reference, combination)
        if not len(rows) or not len((target := read.real(rows)).rows):
            continue
        found: dict[str, _Patches] = {}
        if len(rows := study.rows_of(study.probe, combination)):
            found["real"] = read.real(rows)
        for arm in study.synthetic.values():
            known = {k: v for k, v in combination.items() if k in arm.fields}
            if len(rows := np.flatnonzero(matches(arm.index, known))):
                found[arm.name] = read.arm(arm.name, rows)
        cell: dict[str, Any] = {"name": describe(combination), "combination": combination, "held_out": held_out,
                                "density": target.mean(set(target.classes)), "sources": {}}  # fmt: skip
        for name, patches in found.items():
            shared = set(target.classes) & set(patches.classes)
            if shared:
                people = PatientResamples(study.patients[patches.rows], resamples, seed) if name == "real" else None
                cell["sources"][name] = _source(patches, target, shared, centres, offsets, number, people) | {
                    "asked": name == "real" or study.site_field in study.synthetic[name].fields
                }
        cells.append(cell)
    return {"cells": cells}


class _Patches:
    """Some patches with their class and density; ``rows`` number them in their index."""

    def __init__(self, images: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> None:
        self.density = tissue_density(images)
        tissue = ~np.isnan(self.density).any(axis=1)  # glass has no stain
        self.images, self.density = images[tissue], self.density[tissue]
        self.classes, self.rows = classes[tissue], rows[tissue]

    def mean(self, classes: set[str]) -> np.ndarray:
        """Density, each class once."""
        return np.mean([self.density[self.classes == c].mean(axis=0) for c in sorted(classes)], axis=0)

    def even(self, classes: set[str], rng: np.random.Generator) -> np.ndarray:
        """Images of these classes in equal parts."""
        here = np.flatnonzero(np.isin(self.classes, list(classes)))
        return self.images[here[balanced_draw(self.classes[here], len(here), rng)]]


class _Reader:
    """Reads some of the rows, classes in equal parts as far as they go."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed = study, seed

    def real(self, rows: np.ndarray) -> _Patches:
        labels = self.study.class_labels
        rows = rows[self._some(labels[rows])]
        return _Patches(self.study.real.read(rows), labels[rows], rows)

    def arm(self, name: str, rows: np.ndarray) -> _Patches:
        arm = self.study.synthetic[name]
        labels = arm.index[self.study.class_field].to_numpy(str)
        rows = rows[self._some(labels[rows])]
        return _Patches(arm.dataset.read(arm.rows[rows]), labels[rows], rows)

    def _some(self, labels: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 43])
        return np.unique(balanced_draw(labels, min(_MOST, len(labels)), rng))


def _effects(training: list[_Patches]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Density of each site, [S, 3], and what each class adds to it, so that sites compare though classes differ."""
    names = sorted({str(c) for patches in training for c in patches.classes})
    rows = [(i, names.index(c)) for i, patches in enumerate(training) for c in patches.classes]
    place, tumour = np.array(rows).T
    design = np.concatenate([np.eye(len(training))[place], np.eye(len(names))[tumour]], axis=1)
    # The shortest of all solutions: what is common to sites and classes is shared between them evenly.
    effects = np.linalg.lstsq(design, np.concatenate([p.density for p in training]), rcond=None)[0]
    return effects[: len(training)], dict(zip(names, effects[len(training) :], strict=True))


def _source(
    patches: _Patches,
    target: _Patches,
    shared: set[str],
    centres: np.ndarray,
    offsets: dict[str, np.ndarray],
    number: int,
    people: PatientResamples | None,
) -> dict[str, Any]:
    """Samples are independent draws; real patches are resampled by patient."""
    rng = np.random.default_rng(0)
    own, wanted = fit_stain(patches.even(shared, rng)), fit_stain(target.even(shared, rng))
    mean = patches.mean(shared)
    keep = np.isin(patches.classes, list(shared & set(offsets)))
    offset = np.array([offsets.get(c, np.zeros(3)) for c in patches.classes])
    away = np.linalg.norm((patches.density - offset)[:, None] - centres[None], axis=2)
    right = (away.argmin(axis=1) == number) & keep
    if people is None:
        hits, n = int(right.sum()), int(keep.sum())
        nearest = measure(hits / n if n else None, n, 0) | {"interval": wilson(hits, n), "interval_over": "samples"}
    else:
        table = PatientTable(np.zeros(len(keep), int), people.codes, keep, 1, len(people.names))
        nearest = table.measure(right.astype(float), people.weights)
    return {
        "n": int(np.isin(patches.classes, list(shared)).sum()), "density": mean,
        "distance": float(np.linalg.norm(mean - target.mean(shared))), "angles": stain_angles(own, wanted),
        "strength": own.strength / wanted.strength, "nearest": nearest,
    }  # fmt: skip
