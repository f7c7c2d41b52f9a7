"""Feature space as a plane: real test patches and samples on the first two principal components of training patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.distance_to_real import Features
from latent_medi.statistics.distances import BLOCK, FeatureStatistics, blocks

MOST_POINTS = 400


def project(study: Study, features: Features, seed: int, most: int = MOST_POINTS) -> dict[str, Any]:
    """Coordinates of a few patches of each source on the first two principal components of real training features.

    The components are those of the patches that the models were trained on, so neither the test patches nor the samples
    choose the view. A source with more than ``most`` patches is thinned evenly over class and site.

    Args:
        study: The cohort.
        features: Features of one encoder.
        seed: Seed of the order within a combination.
        most: Points per source at most.

    Returns:
        ``method``, ``n_fitted`` (training patches), ``explained`` (share of their variance on each axis), ``classes``
        and ``sites`` (the values that the codes point to) and ``sources``: for "real" (test patches) and each arm ``n``
        (patches there are), ``x``, ``y``, and ``class`` and ``site`` as codes, -1 where it has none.
    """
    fitted = features.basis.project(features.real[study.train], 2)
    total = _variance(features.real, study.train)
    values = {
        "class": list(study.real.schema.field(study.class_field).values),
        "site": list(study.real.schema.field(study.site_field).values),
    }
    fields = {"class": study.class_field, "site": study.site_field}
    tables = {"real": (study.index.iloc[study.reference], features.real[study.reference])}
    tables |= {
        arm.name: (arm.index, features.synthetic[arm.name]) for arm in study.synthetic.values() if len(arm.index)
    }
    sources: dict[str, Any] = {}
    for name, (index, vectors) in tables.items():
        codes = {key: _codes(index, fields[key], values[key]) for key in fields}
        rows = evenly(codes["class"], codes["site"], most, seed)
        points = features.basis.project(vectors[rows], 2)
        sources[name] = {
            "n": len(index),
            "x": _rounded(points[:, 0]),
            "y": _rounded(points[:, 1]) if points.shape[1] > 1 else [0.0] * len(rows),
            **{key: codes[key][rows].tolist() for key in fields},
        }
    return {
        "method": "principal components of real training features",
        "n_fitted": len(study.train),
        "explained": [float(v) / total if total else None for v in fitted.var(axis=0)],
        "classes": values["class"],
        "sites": values["site"],
        "sources": sources,
    }


def _variance(features: np.ndarray, rows: np.ndarray) -> float:
    """Summed variance of all dimensions over some rows."""
    if len(rows) <= BLOCK:
        return float(np.asarray(features[rows], np.float64).var(axis=0).sum())
    whole = FeatureStatistics(features.shape[1])
    for part in blocks(len(rows)):
        whole.update(features[rows[part]])
    return float(np.trace(whole.cov)) * (whole.n - 1) / whole.n


def evenly(classes: np.ndarray, sites: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` row numbers, ascending, spread evenly over rows that are ordered by class, site and chance.

    Args:
        classes, sites: Codes of each row, [n].
        most: Rows at most.
        seed: Seed of the order within a combination.
    """
    order = np.lexsort((np.random.default_rng([seed, 23]).random(len(classes)), sites, classes))
    if len(order) <= most:
        return np.sort(order)
    return np.sort(order[np.linspace(0, len(order) - 1, most).round().astype(int)])


def _codes(index: pd.DataFrame, field: str, values: list[str]) -> np.ndarray:
    if field not in index.columns:
        return np.full(len(index), -1)
    return pd.Categorical(index[field].astype(str), categories=values).codes.astype(int)


def _rounded(values: np.ndarray) -> list[float]:
    """Four significant digits: a plot shows no more, and the file stays small."""
    return [float(f"{v:.4g}") for v in values]
