"""The shift benchmark's result: accuracy by association of class and site; table, curve, mean of several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.checksums import read_result
from latent_medi.core.errors import UserError, needs
from latent_medi.core.files import atomic_path, refuse_foreign, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.evaluation.cohort.roles import synthetic_roles
from latent_medi.evaluation.downstream.registry import KINDS, REAL, label_of, style_of
from latent_medi.metadata.tables import write_for_people

_EQUAL_SETTINGS = ("split", "per_site", "class_field", "site_field", "experiment", "changes")
"""Settings in which benchmarks to average must not differ."""
SCORES = ("accuracy_shift", "recall", "false_positive_rate")


def in_all(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the training sets that took part at every level, in the order of the curve's legend."""
    return [name for name in records[0]["arms"] if all(name in record["arms"] for record in records)]


def in_any(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the training sets that took part at some level."""
    return list(dict.fromkeys(name for record in records for name in record["arms"]))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def loss(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Relative change of accuracy by training set: the mean, over levels above the lowest, of accuracy divided by that
    of the real patches alone at the lowest level, minus 1 (after PathoROB); None where these did not take part.
    """
    base = records[0]["arms"].get(REAL.name, {}).get("accuracy_shift")
    names, higher = in_all(records), records[1:]
    if not higher or not base:
        return dict.fromkeys(names)
    return {
        name: float(np.mean([record["arms"][name]["accuracy_shift"] / base - 1 for record in higher])) for name in names
    }


def write_result(result: Mapping[str, Any], out: Path) -> None:
    """Write ``shift.json``, ``shift.csv`` and ``shift.png``, and print the table."""
    refuse_foreign(out, {"shift.json": "levels"}, ["shift.*"])
    write_sealed(out / "shift.json", result)
    write_for_people(_table(result["levels"]), out / "shift.csv")
    _curve(result["levels"], out / "shift.png")
    print(shift_text(result))


def mean_of_seeds(folders: Sequence[str], out: str) -> dict[str, Any]:
    """Average finished benchmarks of several seeds or rotations, and write the result like that of one benchmark.

    Args:
        folders: Folders of finished benchmarks, two or more, with the same levels, or their ``shift.json``.
        out: Folder for ``shift.json``, ``shift.csv`` and ``shift.png``.

    Returns:
        As of one benchmark: scores are means, and ``…_sem`` is the standard error of each over the benchmarks. The
        ``over_stain_transfer`` of a training set is the mean of its paired differences in accuracy from stain transfer,
        ``over_stain_transfer_sem`` its standard error. ``seeds`` and ``targets`` are lists over the benchmarks.

    Raises:
        UserError: Fewer than two, one that is not finished, other levels or settings, the same benchmark twice, or a
            folder ``out`` that is one of them.
    """
    if len(folders) < 2:
        raise UserError("A mean takes two benchmarks or more.", "latent-medi benchmark-shift --mean RUN RUN … out=…")
    files = [path if (path := Path(folder)).suffix == ".json" else path / "shift.json" for folder in folders]
    runs = [read_result(file, "Make it again with `latent-medi benchmark-shift`.") for file in files]
    for file, run in zip(files, runs, strict=True):
        _check_comparable(file, run, files[0], runs[0])
        if file.parent.resolve() == Path(out).resolve():
            raise UserError(f"The mean would replace {file}.", "Give another folder with out=…")
    made_of = [(run["settings"]["seed"], str(run["targets"]), run["settings"]["data"]) for run in runs]
    if twice := [key for key in made_of if made_of.count(key) > 1]:
        raise UserError(f"A benchmark of seed {twice[0][0]} is given twice.", "Name each benchmark once.")
    result = {
        "seeds": [run["settings"]["seed"] for run in runs],
        "targets": [run["targets"] for run in runs],
        "levels": [_averaged(records) for records in zip(*(run["levels"] for run in runs), strict=True)],
        "loss": {name: mean(run["loss"].get(name) for run in runs) for name in runs[0]["loss"]},
    }
    with output_lock(out):
        write_result(result, Path(out))
    return result


def _check_comparable(file: Path, run: Mapping[str, Any], first: Path, other: Mapping[str, Any]) -> None:
    """Refuse a benchmark that cannot be averaged with the first one."""
    if "seeds" in run:
        raise UserError(f"{file} is a mean itself.", "Name the benchmarks that it was made of.")
    levels, others = ([record["level"] for record in one["levels"]] for one in (run, other))
    if levels != others:
        raise UserError(f"{file} has the levels {levels}, {first} {others}.", "Average benchmarks of equal levels.")
    ours, theirs = run["settings"], other["settings"]
    if differ := [key for key in _EQUAL_SETTINGS if ours.get(key) != theirs.get(key)]:
        key = differ[0]
        raise UserError(
            f"{file} has {key}={ours.get(key)!r}, {first} {theirs.get(key)!r}.",
            "Benchmarks to average differ in seed, patients and targets alone.",
        )


def _averaged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One level of all benchmarks."""
    results: dict[str, Any] = {}
    names = in_all(records)
    decisive = [kind.name for kind in KINDS if kind.decisive and kind.name in names]
    for name in names:
        found = [record["arms"][name] for record in records]
        results[name] = {}
        for score in SCORES:
            results[name] |= _with_error(score, [entry[score] for entry in found])
        for other in decisive:
            if name != other:
                pairs = [(record["arms"][name], record["arms"][other]) for record in records]
                gains = [a["accuracy_shift"] - b["accuracy_shift"] for a, b in pairs]
                results[name] |= _with_error(f"over_{other}", gains)
    return {
        "level": records[0]["level"],
        "tie": mean(r["tie"] for r in records),
        "n_patients": round(float(np.mean([r["n_patients"] for r in records]))),
        "arms": results,
    }


def _with_error(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    error = float(np.std(known, ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None
    return {name: mean(values), f"{name}_sem": error}


def _table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for record in records:
        of_level = {key: record[key] for key in ("level", "tie", "n_patients")}
        for name, entry in record["arms"].items():
            rows.append(of_level | {"arm": name} | {key: value for key, value in entry.items() if key != "interval"})
    return pd.DataFrame(rows)


def shift_text(result: Mapping[str, Any]) -> str:
    """The curve as a table for a terminal."""
    records = result["levels"]
    names = in_any(records)
    lines = ["Balanced accuracy over all classes at the targets' sites, by association of class and site in training"]
    if "seeds" in result:
        lines[0] += f"; mean of {len(result['seeds'])} benchmarks ± standard error"
    lines += ["", f"  {'level':>6}{'V':>6}{'patients':>10}" + "".join(f"{label_of(name)[:15]:>16}" for name in names)]
    for record in records:
        cells = "".join(f"{_cell(record['arms'].get(name, {})):>16}" for name in names)
        lines.append(f"  {record['level']:>6.2f}{record['tie']:>6.2f}{record['n_patients']:>10}{cells}")
    losses = [result["loss"].get(name) for name in names]
    lines.append(f"  {'mean change':<22}" + "".join(f"{'–' if x is None else f'{x:+.1%}':>16}" for x in losses))
    lines.append("\nV: Cramér's V, bias-corrected, of class and site over training patients; mean change: over the")
    lines.append("levels above the lowest, against the real patches alone at the lowest.")
    return "\n".join(lines)


def _cell(scores: Mapping[str, Any]) -> str:
    value, error = scores.get("accuracy_shift"), scores.get("accuracy_shift_sem")
    return "–" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy by level, a line and a marker per training set, with standard errors where there are several seeds."""
    with needs("The curve's picture", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names, known = in_any(records), {kind.name for kind in KINDS}
    roles = synthetic_roles(name for name in names if name not in known)
    for name in names:
        points = [(r["level"], r["arms"][name]) for r in records if name in r["arms"]]
        style = style_of(name, roles)
        errors = [entry.get("accuracy_shift_sem") for _, entry in points]
        axes.errorbar(
            [level for level, _ in points],
            [entry["accuracy_shift"] for _, entry in points],
            yerr=None if None in errors else errors,
            capsize=2,
            color=style.colour,
            marker=style.marker,
            linestyle="-" if name in (REAL.name, roles.candidate) else "--",
            label=label_of(name),
        )
    axes.set_xlabel("association of class and site in training (0 none, 1 targets absent)")
    axes.set_ylabel("balanced accuracy under shift")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
