"""What a team without a generator would do: repeat patches it has, jitter their stain or map it to the missing site's,
or take them from the site most like it.

The rivals get every advantage: stain statistics come from classes that both sites share, in equal parts, and of several
variants the better one on the test patients is headlined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, among
from latent_medi.evaluation.cohort.study import Study
from latent_medi.features.stain import SiteStains, jitter_stains
from latent_medi.statistics.subsampling import balanced_draw


@dataclass
class Transferred:
    """Real training patches in a held-out cell's stain.

    Args:
        images: By method, uint8 [n, H, W, 3].
        rows: Real row that each patch comes from, [n].
    """

    images: dict[str, np.ndarray]
    rows: np.ndarray


def alike_sources(study: Study, cell: Combination, site: str | None = None) -> np.ndarray:
    """Training rows of a cell's class from sites other than its own, or from one site.

    Those that already have the cell's other values (a frozen section, say) are preferred: the others are left out if
    there are any.
    """
    sites = study.site_labels
    rows = study.rows_of(study.train, {study.class_field: cell[study.class_field]})
    rows = rows[sites[rows] == site] if site is not None else rows[sites[rows] != cell.get(study.site_field)]
    others = {k: v for k, v in cell.items() if k not in (study.class_field, study.site_field)}
    alike = among(rows, study.having(others))
    return alike if len(alike) else rows


def stain_augmentation(study: Study, cell: Combination, n: int, seed: int, sigma: float) -> Transferred | None:
    """Training patches of the cell's class, sites in equal parts, each with jittered stain.

    Args:
        study: The cohort.
        cell: The held-out cell.
        n: Patches to make.
        seed: Seed of draw and jitter.
        sigma: See :func:`latent_medi.features.stain.jitter_stains`.

    Returns:
        ``n`` patches; None if the class has no training patch.
    """
    rng = np.random.default_rng([seed, 13])
    sources = alike_sources(study, {k: v for k, v in cell.items() if k != study.site_field})
    if len(sources) == 0:
        return None
    rows = sources[balanced_draw(study.site_labels[sources], n, rng)]
    return Transferred({"jitter": jitter_stains(study.real.read(rows), sigma, rng)}, rows)


def nearest_sites(study: Study, cells: list[Combination], features: np.ndarray) -> list[str | None]:
    """Per held-out cell the site that has its class in training and looks most like the cell's own site.

    Sites are compared by the mean features of the training patches of each class that both have, standardised over the
    training patches: the root mean square distance over the shared classes.

    Args:
        study: The cohort.
        cells: Held-out cells.
        features: Features of every real row, [N, d].

    Returns:
        None where the cell names no site, its site has no training patch, or no other site with the class shares a
        class with it.
    """
    sites = study.site_labels[study.train]
    classes = study.class_labels[study.train]
    x = np.asarray(features[study.train], np.float64)
    x = x / np.maximum(x.std(axis=0), 1e-12)
    pairs = sorted(set(zip(sites.tolist(), classes.tolist(), strict=True)))
    means = {(s, c): x[(sites == s) & (classes == c)].mean(axis=0) for s, c in pairs}
    result: list[str | None] = []
    for cell in cells:
        target, value = cell.get(study.site_field), cell[study.class_field]
        distances: dict[str, float] = {}
        for site in sorted({s for s, c in means if c == value and s != target}):
            shared = [c for s, c in means if s == site and (target, c) in means]
            if shared:
                squares = [((means[site, c] - means[str(target), c]) ** 2).sum() for c in shared]
                distances[site] = float(np.sqrt(np.mean(squares)))
        result.append(min(distances, key=lambda s: distances[s]) if distances else None)
    return result


def stain_transfer(study: Study, cell: Combination, n: int, seed: int) -> Transferred | None:
    """Training patches of the cell's class from other sites, mapped to the stain of the cell's site.

    Patches that already have the cell's other values (a frozen section, say) are preferred.

    Returns:
        ``n`` patches per method, sites in equal parts; None if the cell names no site or there is nothing to map.
    """
    if study.site_field not in cell:
        return None
    rng = np.random.default_rng([seed, 7])
    target = cell[study.site_field]
    sites = study.site_labels
    sources = alike_sources(study, cell)
    if len(sources) == 0 or not (sites[study.train] == target).any():
        return None
    rows = sources[balanced_draw(sites[sources], n, rng)]
    images = study.real.read(rows)
    classes = study.class_labels[study.train]
    stains = SiteStains(lambda positions: study.real.read(study.train[positions]), sites[study.train], classes, seed)
    return Transferred(stains.transferred(images, sites[rows], target), rows)
