"""Which numbers will be missing, or have no interval, because there are too few real patients; known before anything is
generated.
"""

from __future__ import annotations

import numpy as np

from latent_medi.evaluation.cohort.combinations import describe
from latent_medi.evaluation.cohort.comparison_sets import MIN_SAMPLES
from latent_medi.evaluation.cohort.study import Study, affected_sites
from latent_medi.statistics.intervals import MIN_PATIENTS


def thin_support(study: Study, downstream: bool = True) -> list[str]:
    """A sentence per class, site or held-out combination with too few real patients for a number or its interval.

    Args:
        study: The cohort.
        downstream: Whether classifiers are to be compared.
    """
    texts = _thin_shift(study) if downstream else []
    for combination in study.held_out:
        name = describe(combination)
        for what, part, whose in (
            ("distance", study.reference, "test patients"),
            ("real-vs-real distance", study.probe, "other real patients"),
        ):
            rows = study.rows_of(part, combination)
            people = len(set(study.patients[rows]))
            if len(rows) < MIN_SAMPLES:
                texts.append(f"{name} has no {what}: {len(rows)} patches of {whose}, {MIN_SAMPLES} are needed.")
            elif people < MIN_PATIENTS:
                texts.append(f"The {what} of {name} has no interval: {people} {whose}, {MIN_PATIENTS} are needed.")
    return texts


def _thin_shift(study: Study) -> list[str]:
    texts = []
    sites = sorted(affected_sites(study))
    affected = study.test[np.isin(study.site_labels[study.test], sites)]
    classes, patients = study.class_labels[affected], study.patients[affected]
    counts = {value: len(set(patients[classes == value])) for value in study.classes}
    few = {value: count for value, count in counts.items() if 0 < count < MIN_PATIENTS}
    if few:
        listed = ", ".join(f"{count} of {value}" for value, count in few.items())
        texts.append(
            f"Accuracy under shift has no interval: of the test patients at {', '.join(sites)} only {listed} "
            f"({MIN_PATIENTS} are needed)."
        )
    if absent := [value for value, count in counts.items() if not count]:
        texts.append(f"Accuracy under shift leaves out {', '.join(absent)}: no test patient at {', '.join(sites)}.")
    return texts
