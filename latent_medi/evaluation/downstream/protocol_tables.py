"""Results of MeDi's protocol as tables: in the layout of the paper's CSV files, and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.evaluation.downstream.records import MediProtocol, MediProtocolRow, Protocols
from latent_medi.evaluation.downstream.registry import label_of
from latent_medi.statistics.seeds import MeanOverSeeds

RESULTS, SUMMARY = "medi_results.csv", "medi_summary.csv"
_METRICS = {
    "overall_bal": "balanced_accuracy",
    "tss_avg_bal": "site_averaged_balanced_accuracy",
    "mcc": "mcc",
}


def medi_tables(protocols: Mapping[str, MediProtocol]) -> dict[str, pd.DataFrame]:
    """The two tables of the paper by file name, for all settings of the sweep; none without the protocol.

    ``medi_results.csv`` has a row per seed with the columns of the paper's results.csv, ``medi_summary.csv`` a row per
    score with those of its summary.csv; the columns before them say which setting a row is of.
    """
    results, summary = [], []
    for encoder, record in protocols.items():
        for row in record.rows:
            setting: dict[str, object] = {"encoder": encoder, "task": row.task, "training_set": row.training_set}
            setting |= {"pool": row.pool, "sites": row.sites, "max_real": row.max_real, "ratio": row.ratio}
            draws = record.tasks[row.task].draws.get(str(row.sites), []) if row.task in record.tasks else []
            for seed in range(len(row.mcc.by_seed)):
                scores = {name: getattr(row, key).by_seed[seed] for name, key in _METRICS.items()}
                subset = str(draws[seed]) if draws else "all"
                numbers = {"n_real": row.n_real[seed], "n_synthetic": row.n_synthetic[seed]}
                results.append({**setting, **numbers, "seed": seed, "tss_subset": subset, **scores})
            for name, key in _METRICS.items():
                score: MeanOverSeeds = getattr(row, key)
                summary.append({**setting, "metric": name, "mean": score.mean, "sem": score.sem})
    return {RESULTS: pd.DataFrame(results), SUMMARY: pd.DataFrame(summary)} if results else {}


def protocol_text(protocols: Protocols) -> str:
    """Balanced accuracies of MeDi's protocol for a terminal, a table per task; empty without the protocol."""
    lines = []
    for encoder, record in protocols.medi.items():
        for name, task in record.tasks.items():
            rows = [row for row in record.rows if row.task == name]
            seeds = len(rows[0].mcc.by_seed)
            title = f"MeDi's protocol, {f'task {name}: ' if name else ''}{len(task.classes)} classes, {encoder}"
            lines += ["", f"{title}: balanced accuracy, mean ± SEM of {seeds} seeds"]
            lines += _table(rows)
            patients = counted(task.test.n_patients, "patient")
            lines.append(f"  {counted(task.test.n_patches, 'test patch')} of {patients}")
    return "\n".join(lines)


def _table(rows: list[MediProtocolRow]) -> list[str]:
    columns = list(dict.fromkeys(set_label(row) for row in rows))
    keys = list(dict.fromkeys((row.sites, row.max_real, row.ratio) for row in rows))
    found = {((row.sites, row.max_real, row.ratio), set_label(row)): row.balanced_accuracy for row in rows}
    lines = [f"  {'sites':>5} {'real/class':>10} {'ratio':>5}" + "".join(f"{column[:16]:>17}" for column in columns)]
    for key in keys:
        sites, most, ratio = key
        cells = "".join(f"{score_text(found.get((key, column))):>17}" for column in columns)
        lines.append(f"  {sites:>5} {most or 'all':>10} {ratio:>5g}{cells}")
    return lines


def set_label(row: MediProtocolRow) -> str:
    """The training set of a row in words."""
    return label_of(row.training_set) + (f" ({row.pool})" if row.pool == "separate" else "")


def score_text(score: MeanOverSeeds | None) -> str:
    """A mean over seeds with its standard error; a dash without a score."""
    if score is None:
        return "–"
    return f"{score.mean:.3f}" + ("" if score.sem is None else f" ± {score.sem:.3f}")
