"""Whether class and site, which were asked for apart, come apart: does a sample's site change its class?

Two probes that learned from real patients judge the samples. Where a generator has taken the site for a sign of the
class, as the classifiers that it is to help do, the verdicts on its samples hang together although nothing that was
asked for does, and the class is found less often where the site is not the one that it was trained at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.evaluation.adherence.attributes import Verdicts
from latent_medi.evaluation.cohort.study import Study
from latent_medi.metadata.audit import cramers_v
from latent_medi.statistics.bootstrap import LEVEL, PatientResamples, PatientTable, measure, wilson

_PERMUTATIONS = 200


def leakage(study: Study, verdicts: Mapping[str, Verdicts], resamples: int, seed: int) -> dict[str, Any]:
    """Class verdicts held against site verdicts and against the sites that were asked for.

    Args:
        study: The cohort.
        verdicts: What the probes of class and site see in the samples and in the real test patches.
        resamples: Patient resamples for the intervals of the real patches.
        seed: Seed of the permutations and resamples.

    Returns:
        ``training_tie``: Cramér's V, 0 to 1, of class and site over training patients. ``sources``: "real", the test
        patches, and each arm, with ``n`` (patches of values that the probes can tell); ``tie``, Cramér's V of the two
        verdicts; ``asked_tie``, of what was asked for (real: is true), None if no site was (then the others are, too);
        ``site_found`` and ``site_missed``, a measure each: how often the class is found where the site is, and where it
        is not; and ``moved``: the mean total variation distance, 0 to 1, of the class verdicts at a site from those
        over all sites, both of one asked class, with ``limit``, which 97.5 % of random assignments of sites stay below,
        and ``beyond``, whether it is above that and above the real patches'. Or ``reason`` alone.
    """
    names = (study.class_field, study.site_field)
    if missing := [name for name in names if name not in verdicts]:
        return {"reason": f"no probe of {missing[0]}"}
    tumour, site = (verdicts[name] for name in names)
    truth = [study.index[name].to_numpy(str) for name in names]
    rows = study.reference
    # What a probe cannot tell, missing values among it, says nothing of whether class and site come apart.
    keep = np.isin(truth[0][rows], tumour.values) & np.isin(truth[1][rows], site.values)
    if not keep.any():
        return {"reason": "no real test patch has a class and a site that the probes can tell"}
    people = PatientResamples(study.patients[rows[keep]], resamples, seed)
    real = (truth[0][rows[keep]], truth[1][rows[keep]]), (tumour.real[keep], site.real[keep])
    sources = {"real": _source(*real, seed, people)}
    for arm in study.synthetic.values():
        if arm.name not in tumour.arms or study.class_field not in arm.fields:
            continue
        asked = (
            arm.index[names[0]].to_numpy(str),
            arm.index[names[1]].to_numpy(str) if names[1] in arm.fields else None,
        )
        keep = np.isin(asked[0], tumour.values) & (True if asked[1] is None else np.isin(asked[1], site.values))
        if not keep.any():
            continue
        wanted = (asked[0][keep], None if asked[1] is None else asked[1][keep])
        sources[arm.name] = _source(wanted, (tumour.arms[arm.name][keep], site.arms[arm.name][keep]), seed)
    for record in sources.values():
        if record["moved"]:
            bound = max(record["moved"]["limit"], sources["real"]["moved"]["value"])
            record["moved"]["beyond"] = record["moved"]["value"] > bound
    training = cramers_v(study.index.iloc[study.train], *names)
    return {"training_tie": training, "sources": sources}


def _tie(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cramér's V over patches."""
    return cramers_v(pd.DataFrame({"patient": range(len(a)), "a": a, "b": b}), "a", "b")


def _source(
    asked: tuple[np.ndarray, np.ndarray | None],
    found: tuple[np.ndarray, np.ndarray],
    seed: int,
    people: PatientResamples | None = None,
) -> dict[str, Any]:
    """One source of patches: real ones with their patients, or samples, which are independent draws."""
    (tumour, site), (seen_tumour, seen_site) = asked, found
    record: dict[str, Any] = {"n": len(tumour), "tie": _tie(seen_tumour, seen_site), "asked_tie": None,
                              "site_found": None, "site_missed": None, "moved": None}  # fmt: skip
    if site is None:
        return record
    record["asked_tie"] = _tie(tumour, site)
    right = seen_tumour == tumour
    for name, here in (("site_found", seen_site == site), ("site_missed", seen_site != site)):
        if people is None:
            n, hits = int(here.sum()), int(right[here].sum())
            share = measure(hits / n if n else None, n, 0)
            record[name] = share | {"interval": wilson(hits, n), "interval_over": "samples"}
        else:
            table = PatientTable(np.zeros(len(here), int), people.codes, here, 1, len(people.names))
            record[name] = table.measure(right.astype(float), people.weights)
    units = np.arange(len(tumour)) if people is None else people.codes
    return record | {"moved": _moved(tumour, site, seen_tumour, units.astype(str), seed)}


def _moved(tumour: np.ndarray, site: np.ndarray, seen: np.ndarray, units: np.ndarray, seed: int) -> dict[str, Any]:
    _, classes = np.unique(tumour, return_inverse=True)
    _, verdicts = np.unique(seen, return_inverse=True)
    _, places = np.unique(site, return_inverse=True)
    # A patient's patches stay together; one who was seen at two sites counts as two.
    _, first, who = np.unique(
        np.char.add(np.char.add(units, "\x1f"), np.char.add(np.char.add(tumour, "\x1f"), site)),
        return_index=True, return_inverse=True,
    )  # fmt: skip
    rng = np.random.default_rng([seed, 41])

    def distance(at: np.ndarray) -> float:
        counts = np.zeros((classes.max() + 1, places.max() + 1, verdicts.max() + 1))
        np.add.at(counts, (classes, at, verdicts), 1.0)
        of_site = counts.sum(axis=2, keepdims=True)
        overall = counts.sum(axis=1, keepdims=True)
        overall = overall / overall.sum(axis=2, keepdims=True)
        shares = np.divide(counts, of_site, out=np.zeros_like(counts), where=of_site > 0)
        apart = np.abs(shares - overall).sum(axis=2, keepdims=True) / 2
        return float((apart * of_site).sum() / of_site.sum())

    draws = []
    for _ in range(_PERMUTATIONS):
        mixed = places[first].copy()
        for value in np.unique(classes):
            here = np.flatnonzero(classes[first] == value)
            mixed[here] = mixed[rng.permutation(here)]
        draws.append(distance(mixed[who]))
    return {"value": distance(places), "limit": float(np.quantile(draws, (1 + LEVEL) / 2))}
