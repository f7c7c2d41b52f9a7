"""Whether the site of a sample changes its class.

Two linear probes, of class and of site, are trained on real patches and applied to the samples. If a generator mistook
the site for a sign of the class, as the classifiers do that it is to help, the two predictions are associated although
the requested values are not, and the class is found less often where the site is another than in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from latent_medi.evaluation.adherence.attributes import FieldPredictions
from latent_medi.evaluation.adherence.records import ClassShift, Leakage, SourceLeakage
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.study import Study
from latent_medi.metadata.association import cramers_v
from latent_medi.statistics.intervals import LEVEL, Estimate, share_of_samples
from latent_medi.statistics.patient_means import PatientTable

_PERMUTATIONS = 200


@dataclass(frozen=True)
class _Patches:
    """Values of class and site that the patches of a source should show, and those that the linear probes predict.

    Args:
        classes: Requested (real patches: true) class, [N].
        sites: Requested site, [N]; ``None`` where none was requested.
        predicted_classes, predicted_sites: Predictions, [N].
    """

    classes: np.ndarray
    sites: np.ndarray | None
    predicted_classes: np.ndarray
    predicted_sites: np.ndarray

    def known(self, classes: list[str], sites: list[str]) -> np.ndarray:
        """Which patches have a class and a site that the linear probes know, bool [N]. The others, missing values among
        them, say nothing of whether the site changes the class.
        """
        return np.isin(self.classes, classes) & (True if self.sites is None else np.isin(self.sites, sites))

    def take(self, keep: np.ndarray) -> _Patches:
        """Some of them."""
        sites = None if self.sites is None else self.sites[keep]
        return _Patches(self.classes[keep], sites, self.predicted_classes[keep], self.predicted_sites[keep])


def leakage(study: Study, predictions: Mapping[str, FieldPredictions], seed: int) -> Leakage:
    """Class predictions by site prediction and by requested site.

    Args:
        study: The cohort.
        predictions: Predictions of the linear probes of class and site for samples and real test patches.
        seed: Seed of the permutations.
    """
    names = (study.class_field, study.site_field)
    if missing := [name for name in names if name not in predictions]:
        return Leakage(None, {}, f"no probe of {missing[0]}")
    of_class, of_site = (predictions[name] for name in names)
    rows = study.reference
    real = _Patches(study.class_labels[rows], study.site_labels[rows], of_class.real, of_site.real)
    keep = real.known(of_class.values, of_site.values)
    if not keep.any():
        return Leakage(None, {}, "no real test patch has a class and a site that the probes can tell")
    sources = {REAL: _source(real.take(keep), seed, study.patients[rows[keep]])}
    for synthetic in study.synthetic.values():
        if synthetic.name not in of_class.synthetic or study.class_field not in synthetic.fields:
            continue
        patches = _Patches(
            synthetic.index[names[0]].to_numpy(str),
            synthetic.index[names[1]].to_numpy(str) if names[1] in synthetic.fields else None,
            of_class.synthetic[synthetic.name],
            of_site.synthetic[synthetic.name],
        )
        keep = patches.known(of_class.values, of_site.values)
        if keep.any():
            sources[synthetic.name] = _source(patches.take(keep), seed)
    of_real = sources[REAL].class_shift
    for name, source in sources.items():
        if (shift := source.class_shift) and of_real:
            beyond = shift.value > max(shift.limit, of_real.value)
            sources[name] = replace(source, class_shift=replace(shift, beyond=beyond))
    return Leakage(cramers_v(study.index.iloc[study.train], *names), sources)


def _association(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cramér's V over patches."""
    return cramers_v(pd.DataFrame({"patient": range(len(a)), "a": a, "b": b}), "a", "b")


def _source(patches: _Patches, seed: int, people: np.ndarray | None = None) -> SourceLeakage:
    """One source of patches: real ones with their patients, or samples, which are independent draws."""
    n, association = len(patches.classes), _association(patches.predicted_classes, patches.predicted_sites)
    if patches.sites is None:
        return SourceLeakage(n, association)
    right = patches.predicted_classes == patches.classes
    site_right = patches.predicted_sites == patches.sites

    def found(here: np.ndarray) -> Estimate:
        if people is None:
            return share_of_samples(int(right[here].sum()), int(here.sum()))
        return PatientTable.of_one_group(people, here).estimate(right.astype(float), share=True)

    units = np.arange(n) if people is None else people
    return SourceLeakage(
        n=n,
        association=association,
        requested_association=_association(patches.classes, patches.sites),
        site_found=found(site_right),
        site_missed=found(~site_right),
        class_shift=_class_shift(patches.classes, patches.sites, patches.predicted_classes, units.astype(str), seed),
    )


def _class_shift(
    classes: np.ndarray, sites: np.ndarray, predicted: np.ndarray, units: np.ndarray, seed: int
) -> ClassShift:
    """How far class predictions of a site are from those of all sites; ``beyond`` compares with chance alone.

    Args:
        classes, sites: Requested (real patches: true) values of each patch, [N].
        predicted: Predicted class of each, [N].
        units: What is exchanged between sites as a whole, such as the patient of each patch, [N].
        seed: Seed of the permutations.
    """
    _, class_codes = np.unique(classes, return_inverse=True)
    _, predictions = np.unique(predicted, return_inverse=True)
    _, places = np.unique(sites, return_inverse=True)
    # A patient's patches stay together; a patient at two sites counts as two.
    joined = np.char.add(np.char.add(units, "\x1f"), np.char.add(np.char.add(classes, "\x1f"), sites))
    _, first, who = np.unique(joined, return_index=True, return_inverse=True)
    rng = np.random.default_rng([seed, 41])

    def distance(at: np.ndarray) -> float:
        counts = np.zeros((class_codes.max() + 1, places.max() + 1, predictions.max() + 1))
        np.add.at(counts, (class_codes, at, predictions), 1.0)
        of_site = counts.sum(axis=2, keepdims=True)
        overall = counts.sum(axis=1, keepdims=True)
        overall = overall / overall.sum(axis=2, keepdims=True)
        shares = np.divide(counts, of_site, out=np.zeros_like(counts), where=of_site > 0)
        variation = np.abs(shares - overall).sum(axis=2, keepdims=True) / 2
        return float((variation * of_site).sum() / of_site.sum())

    draws = []
    for _ in range(_PERMUTATIONS):
        mixed = places[first].copy()
        for value in np.unique(class_codes):
            here = np.flatnonzero(class_codes[first] == value)
            mixed[here] = mixed[rng.permutation(here)]
        draws.append(distance(mixed[who]))
    value, limit = distance(places), float(np.quantile(draws, (1 + LEVEL) / 2))
    return ClassShift(value, limit, value > limit)
