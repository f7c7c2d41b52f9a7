"""What there are too few real patients for, which can be said before anything is generated."""

from __future__ import annotations

import numpy as np

from latent_medi.evaluation.cohort.combinations import among, describe
from latent_medi.evaluation.cohort.comparison_sets import MIN_SAMPLES
from latent_medi.evaluation.cohort.study import Study, affected_sites
from latent_medi.statistics.bootstrap import MIN_PATIENTS


def thin_support(study: Study, downstream: bool = True) -> list[str]:
    """Sentences on the classes, sites and held-out combinations of which there are too few real patients for a number
    or its interval; empty if there are enough of all.

    Args:
        study: Who plays which part.
        downstream: Whether classifiers are to be compared.
    """
    told = _thin_shift(study) if downstream else []
    for combination in study.held_out:
        here = study.having(combination)
        for what, rows, whose in (
            ("distance", study.reference, "test patients"), ("floor", study.probe, "other real patients")
        ):  # fmt: skip
            mine = among(rows, here)
            people = len(set(study.patients[mine]))
            if len(mine) < MIN_SAMPLES:
                told.append(
                    f"{describe(combination)} has no {what}: {len(mine)} patches of {whose}, {MIN_SAMPLES} are needed."
                )
            elif people < MIN_PATIENTS:
                told.append(
                    f"The {what} of {describe(combination)} has no interval: {people} {whose}, {MIN_PATIENTS} are "
                    "needed."
                )
    return told


def _thin_shift(study: Study) -> list[str]:
    told = []
    index, patients = study.index, study.patients
    sites = sorted(affected_sites(study))
    affected = study.test[np.isin(index[study.site_field].to_numpy(str)[study.test], sites)]
    classes = index[study.class_field].to_numpy(str)
    counts = {value: len(set(patients[affected[classes[affected] == value]])) for value in study.classes}
    few = {value: count for value, count in counts.items() if 0 < count < MIN_PATIENTS}
    if few:
        listed = ", ".join(f"{count} of {value}" for value, count in few.items())
        told.append(
            f"Accuracy under shift has no interval: of the test patients at {', '.join(sites)} only {listed} "
            f"({MIN_PATIENTS} are needed)."
        )
    if absent := [value for value, count in counts.items() if not count]:
        told.append(f"Accuracy under shift leaves out {', '.join(absent)}: no test patient at {', '.join(sites)}.")
    return told
