"""What there are too few real patients for, which can be said before anything is generated."""

from __future__ import annotations

import numpy as np

from latent_medi.evaluation.cells import MIN_SAMPLES
from latent_medi.evaluation.measures import MIN_PATIENTS
from latent_medi.evaluation.rivals import affected_sites
from latent_medi.evaluation.study import Study, among, describe, matches


def thin_support(study: Study) -> list[str]:
    """Sentences, one per number that will have no interval or not be there; empty if there are enough of all."""
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
    for combination in study.held_out:
        here = matches(index, combination)
        for rows, whose in ((study.reference, "test patches"), (study.probe, "patches of other real patients")):
            n = len(among(rows, here))
            if n < MIN_SAMPLES:
                lacks = "distance" if rows is study.reference else "floor"
                told.append(f"{describe(combination)} has no {lacks}: {n} {whose}, {MIN_SAMPLES} are needed.")
    return told
