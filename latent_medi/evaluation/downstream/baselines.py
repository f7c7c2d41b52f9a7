"""Baselines that need no generator: repeated patches, stain augmentation, stain transfer, patches of the nearest site.

Each baseline gets every advantage: stain statistics come from classes that both sites share, in equal parts, and of
several variants each test patient is classified by the one that is best on other test patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, describe
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.training_sets import DerivedPatches, Draw, Drawn, Request, Sources
from latent_medi.statistics.differences import pool_factor
from latent_medi.statistics.subsampling import balanced_draw, repeated_draw


def sources_of_class(study: Study, combination: Combination, site: str | None = None) -> np.ndarray:
    """Training rows of a combination's class from one site, or from all sites but the combination's own.

    If some of them have the combination's other values (a frozen section, say), the others are left out.
    """
    rows = study.rows_of(study.train, {study.class_field: combination[study.class_field]})
    sites = study.site_labels[rows]
    rows = rows[sites == site] if site is not None else rows[sites != combination.get(study.site_field)]
    others = {k: v for k, v in combination.items() if k not in (study.class_field, study.site_field)}
    alike = study.rows_of(rows, others)
    return alike if len(alike) else rows


def stain_augmentation(
    study: Study, combination: Combination, n: int, seed: int, sigma: float
) -> DerivedPatches | None:
    """Training patches of a combination's class, sites in equal parts, each with randomly changed stain.

    Args:
        study: The cohort.
        combination: The held-out combination.
        n: Number of patches.
        seed: Seed of the draw and of the stain.
        sigma: See :func:`latent_medi.features.stain.jitter_stains`.

    Returns:
        ``n`` patches; None if the class has no training patch.
    """
    from latent_medi.features.stain import jitter_stains

    rng = np.random.default_rng([seed, 13])
    rows = sources_of_class(study, {k: v for k, v in combination.items() if k != study.site_field})
    if len(rows) == 0:
        return None
    rows = rows[balanced_draw(study.site_labels[rows], n, rng)]
    return DerivedPatches({"jitter": jitter_stains(study.real.read(rows), sigma, rng)}, rows, math.inf)


def stain_transfer(
    study: Study, combination: Combination, n: int, seed: int, sigma: float = 0.0
) -> DerivedPatches | None:
    """Training patches of a combination's class from other sites, mapped to the stain of the combination's site.

    Returns:
        ``n`` patches by method, sites in equal parts; None if the combination names no site, or its site or its class
        at other sites has no training patch. ``sigma`` has no effect.
    """
    from latent_medi.features.stain import SiteStains

    if study.site_field not in combination:
        return None
    rng = np.random.default_rng([seed, 7])
    target = combination[study.site_field]
    sites = study.site_labels
    rows = sources_of_class(study, combination)
    if len(rows) == 0 or not (sites[study.train] == target).any():
        return None
    population = len(rows)
    rows = rows[balanced_draw(sites[rows], n, rng)]
    images = study.real.read(rows)

    def read(positions: np.ndarray) -> np.ndarray:
        return study.real.read(study.train[positions])

    stains = SiteStains(read, sites[study.train], study.class_labels[study.train], seed)
    return DerivedPatches(stains.transferred(images, sites[rows], target), rows, population)


def draw_derived(name: str, variant: str) -> Draw:
    """A :data:`Draw` from the patches that a training set's :attr:`derive` computed."""

    def draw(sources: Sources, request: Request) -> Drawn | None:
        features, part = sources.derived[name][variant][request.number], sources.additions.derived[name][request.number]
        if features is None or part is None:
            return None
        rows = repeated_draw(np.arange(len(features)), request.n, request.rng)
        return Drawn(features, rows, pool_factor(request.n, len(features), part.population))

    return draw


def draw_nearest_site(sources: Sources, request: Request) -> Drawn | None:
    """Real training patches of the class from the site most similar to the combination's own."""
    site = sources.nearest_sites[request.number]
    if site is None:
        return None
    rows = sources_of_class(sources.study, request.combination, site)
    return Drawn(sources.real, repeated_draw(rows, request.n, request.rng))


def draw_held_out(sources: Sources, request: Request) -> Drawn:
    """Real patches of the held-out combination from patients of the reference part."""
    study = sources.study
    rows = study.rows_of(study.probe, request.combination)
    return Drawn(sources.real, repeated_draw(rows, request.n, request.rng))


def nothing_derived(name: str, reason: str) -> Callable[[Sources, str], str]:
    """A check that gives ``reason`` if no patch could be derived for a training set."""
    return lambda sources, synthetic: "" if any(sources.additions.derived[name]) else reason


def no_nearest_site(sources: Sources, synthetic: str) -> str:
    """Why there is no nearest site; empty if there is one."""
    if any(sources.nearest_sites):
        return ""
    return "no site with the class shares a class with the site of a held-out combination"


def no_oracle(sources: Sources, synthetic: str) -> str:
    """Why there is no oracle; empty if there is one."""
    study = sources.study
    if study.oracle_reason:
        return study.oracle_reason
    lacking = [c for c in sources.additions.combinations if not len(study.rows_of(study.probe, c))]
    return f"no probe patient has {describe(lacking[-1])}" if lacking else ""


def nearest_sites(study: Study, combinations: list[Combination], features: np.ndarray) -> list[str | None]:
    """The most similar site to each held-out combination's own, among the sites that have its class in training.

    The distance between two sites is the root mean square, over the classes that both have, of the distance between
    their mean features of training patches, standardised over the training patches.

    Args:
        study: The cohort.
        combinations: Held-out combinations.
        features: Features of every real row, [N, d].

    Returns:
        None where the combination names no site, its site has no training patch, or no other site with the class shares
        a class with it.
    """
    sites, classes = study.site_labels[study.train], study.class_labels[study.train]
    x = np.asarray(features[study.train], np.float64)
    x = x / np.maximum(x.std(axis=0), 1e-12)
    pairs = sorted(set(zip(sites.tolist(), classes.tolist(), strict=True)))
    means = {(s, c): x[(sites == s) & (classes == c)].mean(axis=0) for s, c in pairs}
    result: list[str | None] = []
    for combination in combinations:
        target, value = combination.get(study.site_field), combination[study.class_field]
        distances: dict[str, float] = {}
        for site in sorted({s for s, c in means if c == value and s != target}):
            shared = [c for s, c in means if s == site and (target, c) in means]
            if shared:
                squares = [((means[site, c] - means[str(target), c]) ** 2).sum() for c in shared]
                distances[site] = float(np.sqrt(np.mean(squares)))
        result.append(min(distances, key=lambda s: distances[s]) if distances else None)
    return result
