"""Stain of the samples by optical density and by Macenko's vectors, without a network."""

from __future__ import annotations

import numpy as np

from latent_medi.evaluation.adherence.records import CombinationStain, SourceStain, Stain
from latent_medi.evaluation.cohort.combinations import Combination, describe, matches
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.study import Study
from latent_medi.features.stain import fit_stain, stain_angles, tissue_density
from latent_medi.statistics.additive_effects import least_squares
from latent_medi.statistics.intervals import Estimate, share_of_samples
from latent_medi.statistics.patient_means import PatientTable
from latent_medi.statistics.subsampling import balanced_draw

_MOST = 160
"""Patches per site or combination and source; a stain needs no more."""


def stain(study: Study, seed: int) -> Stain:
    """Stain of the samples of each site, and of each held-out combination, compared with real test patches of the same.

    Classes differ in density, too. Every comparison is over the classes that both sets have, in equal parts, and the
    nearest site of a patch is found after its class's effect is subtracted (site and class effects by least squares
    over training patches).

    Args:
        study: The cohort.
        seed: Seed of the choice of patches.
    """
    sites = study.site_labels
    values = [v for v in study.real.schema.field(study.site_field).values if (sites[study.train] == v).any()]
    if len(values) < 2:
        return Stain([], "fewer than two sites in training")
    wanted: list[tuple[Combination, bool]] = [({study.site_field: v}, False) for v in values]
    wanted += [(c, True) for c in study.held_out if c.get(study.site_field) in values]
    tested = [(study.rows_of(study.reference, combination), combination, held_out) for combination, held_out in wanted]
    if not any(len(rows) for rows, _, _ in tested):
        return Stain([], "no test patches of a site that training has")
    read = _Reader(study, seed)
    densities = _SiteDensities(values, [read.densities(study.train[sites[study.train] == v]) for v in values])
    combinations = []
    for rows, combination, held_out in tested:
        if not len(rows) or not len((target := read.real(rows)).rows):
            continue
        sources: dict[str, SourceStain] = {}
        for name, patches in _sources(study, read, combination).items():
            shared = set(target.classes) & set(patches.classes)
            if shared:
                is_real = name == REAL
                people = study.patients[patches.rows] if is_real else None
                nearest = densities.nearest(combination[study.site_field], patches, shared, people)
                conditioned = is_real or study.site_field in study.synthetic[name].fields
                sources[name] = _source(patches, target, shared, nearest, conditioned)
        density = target.mean(set(target.classes)).tolist()
        combinations.append(CombinationStain(describe(combination), combination, held_out, density, sources))
    return Stain(combinations)


def _sources(study: Study, read: _Reader, combination: Combination) -> dict[str, _Patches]:
    """Patches of further real patients, and of each synthetic set as far as its model was conditioned."""
    found: dict[str, _Patches] = {}
    if len(rows := study.rows_of(study.probe, combination)):
        found[REAL] = read.real(rows)
    for synthetic in study.synthetic.values():
        known = {k: v for k, v in combination.items() if k in synthetic.fields}
        if len(rows := np.flatnonzero(matches(synthetic.index, known))):
            found[synthetic.name] = read.synthetic(synthetic.name, rows)
    return found


class _Patches:
    """Some patches with their class and density; ``rows`` number them in their index."""

    def __init__(self, images: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> None:
        self.density = tissue_density(images)
        tissue = ~np.isnan(self.density).any(axis=1)  # glass has no stain
        self.images, self.density = images[tissue], self.density[tissue]
        self.classes, self.rows = classes[tissue], rows[tissue]

    def mean(self, classes: set[str]) -> np.ndarray:
        """Density, each class once."""
        result: np.ndarray = np.mean([self.density[self.classes == c].mean(axis=0) for c in sorted(classes)], axis=0)
        return result

    def even(self, classes: set[str], rng: np.random.Generator) -> np.ndarray:
        """Images of these classes in equal parts."""
        here = np.flatnonzero(np.isin(self.classes, list(classes)))
        result: np.ndarray = self.images[here[balanced_draw(self.classes[here], len(here), rng)]]
        return result


class _Reader:
    """Reads some of the rows, classes in equal parts as far as they go."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed = study, seed

    def real(self, rows: np.ndarray) -> _Patches:
        labels = self.study.class_labels
        rows = rows[self._some(labels[rows])]
        return _Patches(self.study.real.read(rows), labels[rows], rows)

    def densities(self, rows: np.ndarray) -> _Patches:
        """As :meth:`real`, without the images: those of hundreds of sites are gigabytes."""
        patches = self.real(rows)
        patches.images = patches.images[:0].copy()
        return patches

    def synthetic(self, name: str, rows: np.ndarray) -> _Patches:
        synthetic = self.study.synthetic[name]
        labels = synthetic.index[self.study.class_field].to_numpy(str)
        rows = rows[self._some(labels[rows])]
        return _Patches(synthetic.dataset.read(synthetic.rows[rows]), labels[rows], rows)

    def _some(self, labels: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 43])
        return np.unique(balanced_draw(labels, min(_MOST, len(labels)), rng))


class _SiteDensities:
    """Density of each site, [S, 3], and the effect of each class on it, by least squares over training patches, so that
    sites can be compared although their classes differ.

    Args:
        sites: Names of the sites.
        training: Training patches of each.
    """

    def __init__(self, sites: list[str], training: list[_Patches]) -> None:
        names = sorted({str(c) for patches in training for c in patches.classes})
        rows = [(i, names.index(c)) for i, patches in enumerate(training) for c in patches.classes]
        site, tumour = np.array(rows).T
        density = np.concatenate([p.density for p in training])
        # Without an intercept, what is common to sites and classes is shared between them evenly.
        self.of_site, of_class = least_squares(density, [site, tumour], [len(training), len(names)])
        self.sites, self.of_class = sites, dict(zip(names, of_class, strict=True))

    def nearest(self, site: str, patches: _Patches, classes: set[str], people: np.ndarray | None) -> Estimate:
        """Share of patches of some classes whose density is nearest to this site's: of samples, which are independent
        draws, or averaged over ``people``, the patient of each real patch.
        """
        keep = np.isin(patches.classes, list(classes & set(self.of_class)))
        effect = np.array([self.of_class.get(c, np.zeros(3)) for c in patches.classes])
        away = np.linalg.norm((patches.density - effect)[:, None] - self.of_site[None], axis=2)
        right = (away.argmin(axis=1) == self.sites.index(site)) & keep
        if people is None:
            return share_of_samples(int(right.sum()), int(keep.sum()))
        return PatientTable.of_one_group(people, keep).estimate(right.astype(float), share=True)


def _source(
    patches: _Patches, target: _Patches, classes: set[str], nearest: Estimate, conditioned: bool
) -> SourceStain:
    rng = np.random.default_rng(0)
    own, wanted = fit_stain(patches.even(classes, rng)), fit_stain(target.even(classes, rng))
    density = patches.mean(classes)
    return SourceStain(
        conditioned=conditioned,
        n=int(np.isin(patches.classes, list(classes)).sum()),
        density=density.tolist(),
        distance=float(np.linalg.norm(density - target.mean(classes))),
        angles=list(stain_angles(own, wanted)),
        strength=(own.strength / wanted.strength).tolist(),
        nearest=nearest,
    )
