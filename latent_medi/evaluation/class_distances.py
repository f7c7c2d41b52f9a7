"""Distances by class, as a table for a spreadsheet: a row per class and reference, and their mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.fidelity.records import Distance, DistanceTable, Fidelity, MeanDistance
from latent_medi.evaluation.results import Metrics

FILE = "per_class_distance.csv"
MEAN = "mean"
"""Name of the row that has the mean over the classes which a source has."""
HELD_OUT_PATIENTS, TRAINING = "held-out patients", "training images"


def distance_text(value: float | None) -> str:
    """A distance as files have it, with three significant digits, since its scale depends on the encoder."""
    if value is None:
        return "–"
    if abs(value) < 1e-4:
        return f"{value:.1e}" if value else "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def references(fidelity: Fidelity) -> dict[str, DistanceTable]:
    """Distances by class, by what the reference is, in words."""
    tables = {TRAINING: fidelity.training.per_class} if fidelity.training else {}
    return tables | {HELD_OUT_PATIENTS: fidelity.per_class}


def class_distances(metrics: Metrics) -> pd.DataFrame:
    """Kernel and Fréchet distances of each source, by encoder, reference and class.

    Each source has the columns ``kid``, ``kid_low`` and ``kid_high`` (its 95 % interval), ``fd`` (where there are too
    few patches the rank-deficient one, if the evaluation has it), ``fd_rank_deficient`` and ``n``, with its name before
    them.
    """
    sources = [*reversed(metrics.roles.names), REAL]
    rows = []
    for encoder, fidelity in metrics.fidelity.items():
        for reference, table in references(fidelity).items():
            for row in _rows(table, sources):
                rows.append({"encoder": encoder, "reference": reference} | row)
    table = pd.DataFrame(rows)
    return table.astype({"n_reference": "Int64", "n_patients": "Int64"})


def _rows(table: DistanceTable, sources: list[str]) -> Iterator[dict[str, Any]]:
    for found in table.combinations:
        row: dict[str, Any] = {"class": found.name, "n_reference": found.n_reference, "n_patients": found.n_patients}
        for name in sources:
            row |= _columns(name, found.sources.get(name))
        yield row | {"not_compared": table.left_out.get(found.name, "")}
    row = {"class": MEAN, "n_reference": None, "n_patients": None}
    for name in sources:
        row |= _columns(name, table.means.get(name))
    yield row | {"not_compared": ""}


def _columns(name: str, found: Distance | MeanDistance | None) -> dict[str, Any]:
    bounds = found.interval if found and isinstance(found.interval, tuple) else (None, None)
    raw = found.fd_raw if found and found.fd is None else None
    return {
        f"{name}_kid": found.value if found else None,
        f"{name}_kid_low": bounds[0],
        f"{name}_kid_high": bounds[1],
        f"{name}_fd": found.fd if found and raw is None else raw,
        f"{name}_fd_rank_deficient": raw is not None,
        f"{name}_n": found.n_patches if found else 0,
    }
