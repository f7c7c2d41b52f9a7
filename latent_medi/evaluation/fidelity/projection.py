"""Feature space as a plane: real test patches and samples on two components of training patches, or by t-SNE."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.manifold import TSNE

from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.records import TSNE_METHOD, ProjectedPoints, Projection
from latent_medi.statistics.distances import BLOCK, FeatureStatistics, blocks

MOST_POINTS = 400
_METHODS = {"components": "principal components of real training features", "tsne": TSNE_METHOD}
_FEWEST = 8  # points of a t-SNE
_DIMS = 50  # principal components that t-SNE starts from, as van der Maaten and Hinton took 30


def project(
    study: Study,
    features: Features,
    fingerprint: str,
    seed: int,
    most: int = MOST_POINTS,
    method: Literal["components", "tsne"] = "components",
) -> Projection:
    """Coordinates of some patches of each source in a plane.

    "components" are the first two principal components of the patches that the models were trained on, so neither the
    test patches nor the samples choose the plane. "tsne" puts patches with similar features near each other (van der
    Maaten & Hinton 2008), those of all sources at once; its distances between groups mean nothing.
    A source with more than ``most`` patches is thinned evenly over class and site.

    Args:
        study: The cohort.
        features: Features of one encoder.
        fingerprint: The encoder's.
        seed: Seed of the order within a combination, and of t-SNE.
        most: Points per source at most.
        method: How the plane is chosen.
    """
    classes, sites = (list(study.real.schema.field(name).values) for name in (study.class_field, study.site_field))
    tables = {REAL: (study.index.iloc[study.reference], features.real[study.reference])}
    tables |= {s.name: (s.index, features.synthetic[s.name]) for s in study.synthetic.values() if len(s.index)}
    sources, chosen = {}, {}
    for name, (index, vectors) in tables.items():
        class_codes, site_codes = _codes(index, study.class_field, classes), _codes(index, study.site_field, sites)
        rows = evenly(class_codes, site_codes, most, seed)
        chosen[name] = features.basis.project(vectors[rows], 2 if method == "components" else _DIMS)
        sources[name] = ProjectedPoints(
            n=len(index), x=[], y=[], class_codes=class_codes[rows].tolist(), site_codes=site_codes[rows].tolist()
        )
    if method == "tsne":
        chosen = _neighbours_together(chosen, seed)
    for name, points in chosen.items():
        y = _rounded(points[:, 1]) if points.shape[1] > 1 else [0.0] * len(points)
        sources[name] = replace(sources[name], x=_rounded(points[:, 0]), y=y)
    explained: list[float | None] = [None, None]
    if method == "components":
        fitted, total = features.basis.project(features.real[study.train], 2), _variance(features.real, study.train)
        explained = [float(v) / total if total else None for v in fitted.var(axis=0)]
    return Projection(
        fingerprint=fingerprint,
        method=_METHODS[method],
        n_fitted=len(study.train) if method == "components" else sum(len(points) for points in chosen.values()),
        explained=explained,
        classes=classes,
        sites=sites,
        sources=sources,
    )


def _neighbours_together(chosen: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """t-SNE of the rows of all sources, float [n, 2] each; few points have no neighbourhoods, and all are at 0."""
    together = np.concatenate(list(chosen.values()))
    if len(together) < _FEWEST:
        return {name: np.zeros((len(points), 2)) for name, points in chosen.items()}
    fit = TSNE(2, perplexity=min(30.0, (len(together) - 1) / 3), init="pca", random_state=seed)
    ends = np.cumsum([len(points) for points in chosen.values()])[:-1]
    return dict(zip(chosen, np.split(fit.fit_transform(together), ends), strict=True))


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
    result: np.ndarray = pd.Categorical(index[field].astype(str), categories=values).codes.astype(int)
    return result


def _rounded(values: np.ndarray) -> list[float]:
    """Four significant digits: a plot shows no more, and the file stays small."""
    return [float(f"{v:.4g}") for v in values]
