"""The shift benchmark's result: accuracy over how far class and site are tied; table, curve, mean of several seeds."""

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
from latent_medi.metadata.tables import write_for_people

SHOWN = ("real", "oversample", "nearest_site", "stain_transfer", "cls", "medi", "oracle")
"""Arms of the curve, if they took part."""
_LOOKS = {
    "real": ("real only", "#000000", "o", "-"), "oversample": ("oversampling", "#999999", "v", ":"),
    "nearest_site": ("nearest site", "#E69F00", "^", ":"), "stain_transfer": ("stain transfer", "#D55E00", "s", "--"),
    "cls": ("CLS", "#56B4E9", "D", "--"), "medi": ("MeDi", "#0072B2", "*", "-"),
    "oracle": ("oracle", "#009E73", "P", ":"),
}  # fmt: skip
_ALIKE = ("split", "per_site", "class_field", "site_field", "experiment", "changes")
"""Settings that benchmarks with a mean share."""
SCORES = ("accuracy_shift", "recall", "false_positive_rate")


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def loss(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean over levels above the lowest of accuracy over the real patches' at the lowest, less 1 (after PathoROB)."""
    base = records[0]["arms"].get("real", {}).get("accuracy_shift")
    names = [name for name in SHOWN if all(name in record["arms"] for record in records)]
    tied = records[1:]
    if not tied or not base:  # the real patches alone were not asked for
        return dict.fromkeys(names)
    return {
        name: float(np.mean([record["arms"][name]["accuracy_shift"] / base - 1 for record in tied])) for name in names
    }


def write_result(result: Mapping[str, Any], out: Path) -> None:
    """Write ``shift.json``, ``shift.csv`` and ``shift.png``, and print the table."""
    refuse_foreign(out, {"shift.json": "levels"}, ["shift.*"])
    write_sealed(out / "shift.json", result)
    write_for_people(_table(result["levels"]), out / "shift.csv")
    _curve(result["levels"], out / "shift.png")
    print(shift_text(result))


def mean_of_seeds(folders: Sequence[str], out: str) -> dict[str, Any]:
    """Average finished benchmarks of several seeds or rotating targets, and write the result as one benchmark's.

    Args:
        folders: Folders of finished benchmarks, two or more, with the same levels, or their ``shift.json``.
        out: Folder for ``shift.json``, ``shift.csv`` and ``shift.png``.

    Returns:
        As of one benchmark: scores are means, and beside each ``…_sem`` is its standard error over the benchmarks. An
        arm's ``over_stain_transfer`` is the mean of the paired differences in accuracy from stain transfer,
        ``over_stain_transfer_sem`` its standard error. ``seeds`` and ``targets`` are lists over the benchmarks.

    Raises:
        UserError: Fewer than two, one that is not finished, other levels or settings, the same benchmark twice, or a
            folder ``out`` that is one of them.
    """
    if len(folders) < 2:
        raise UserError("A mean takes two benchmarks or more.", "latent-medi benchmark-shift --mean RUN RUN … out=…")
    files = [path if (path := Path(folder)).suffix == ".json" else path / "shift.json" for folder in folders]
    runs = [read_result(file, "Make it again with `latent-medi shift`.") for file in files]
    levels = [[record["level"] for record in run["levels"]] for run in runs]
    for file, run, own in zip(files, runs, levels, strict=True):
        if "seeds" in run:
            raise UserError(f"{file} is a mean itself.", "Name the benchmarks that it was made of.")
        if own != levels[0]:
            raise UserError(f"{file} has the levels {own}, {files[0]} {levels[0]}.", "Only equal levels have a mean.")
        if other := [key for key in _ALIKE if run["settings"].get(key) != runs[0]["settings"].get(key)]:
            raise UserError(
                f"{file} has {other[0]}={run['settings'].get(other[0])!r}, {files[0]} "
                f"{runs[0]['settings'].get(other[0])!r}.",
                "Benchmarks that differ in more than seed, patients and targets have no mean.",
            )
        if file.parent.resolve() == Path(out).resolve():
            raise UserError(f"The mean would replace {file}.", "Give another folder with out=…")
    seeds = [run["settings"]["seed"] for run in runs]
    made_of = [(run["settings"]["seed"], str(run["targets"]), run["settings"]["data"]) for run in runs]
    if twice := [key for key in made_of if made_of.count(key) > 1]:
        raise UserError(f"A benchmark of seed {twice[0][0]} is given twice.", "Name each benchmark once.")
    records = [_averaged([run["levels"][i] for run in runs]) for i in range(len(levels[0]))]
    result = {"seeds": seeds, "targets": [run["targets"] for run in runs], "levels": records,
              "loss": {name: mean(run["loss"].get(name) for run in runs) for name in runs[0]["loss"]}}  # fmt: skip
    with output_lock(out):
        write_result(result, Path(out))
    return result


def _averaged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One level of all benchmarks."""
    arms: dict[str, Any] = {}
    for name in [n for n in SHOWN if all(n in record["arms"] for record in records)]:
        found = [record["arms"][name] for record in records]
        arms[name] = {}
        for score in SCORES:
            arms[name] |= _with_error(score, [entry[score] for entry in found])
        if name != "stain_transfer" and all("stain_transfer" in record["arms"] for record in records):
            apart = [
                entry["accuracy_shift"] - record["arms"]["stain_transfer"]["accuracy_shift"]
                for entry, record in zip(found, records, strict=True)
            ]
            arms[name] |= _with_error("over_stain_transfer", apart)
    return {"level": records[0]["level"], "tie": mean(r["tie"] for r in records),
            "n_patients": round(float(np.mean([r["n_patients"] for r in records]))), "arms": arms}  # fmt: skip


def _with_error(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    error = float(np.std(known, ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None
    return {name: mean(values), f"{name}_sem": error}


def _table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = [
        {"level": record["level"], "tie": record["tie"], "n_patients": record["n_patients"], "arm": name,
         **{key: value for key, value in arm.items() if key != "interval"}}
        for record in records for name, arm in record["arms"].items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def shift_text(result: Mapping[str, Any]) -> str:
    """The curve as a table for a terminal."""
    records = result["levels"]
    names = [name for name in SHOWN if any(name in record["arms"] for record in records)]
    lines = ["Balanced accuracy at the targets' sites, all classes, as class and site are tied together"]
    if "seeds" in result:
        lines[0] += f"; mean of {len(result['seeds'])} benchmarks ± standard error"
    lines += ["", f"  {'level':>6}{'tie':>6}{'patients':>10}" + "".join(f"{_LOOKS[name][0]:>16}" for name in names)]
    for record in records:
        cells = "".join(f"{_cell(record['arms'].get(name, {})):>16}" for name in names)
        lines.append(f"  {record['level']:>6.2f}{record['tie']:>6.2f}{record['n_patients']:>10}{cells}")
    losses = [result["loss"].get(name) for name in names]
    lines.append(f"  {'mean change':<22}" + "".join(f"{'–' if x is None else f'{x:+.1%}':>16}" for x in losses))
    lines += ["", "tie: Cramér's V of class and site over training patients; mean change: over the levels above the",
              "lowest, against the real patches alone at the lowest."]  # fmt: skip
    return "\n".join(lines)


def _cell(arm: Mapping[str, Any]) -> str:
    value, error = arm.get("accuracy_shift"), arm.get("accuracy_shift_sem")
    return "–" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over level, a line and a marker per arm, with standard errors where there are several seeds."""
    with needs("The curve's picture", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in SHOWN:
        points = [(r["level"], r["arms"][name]) for r in records if name in r["arms"]]
        if points:
            label, colour, marker, line = _LOOKS[name]
            errors = [arm.get("accuracy_shift_sem") for _, arm in points]
            axes.errorbar(
                [level for level, _ in points], [arm["accuracy_shift"] for _, arm in points],
                yerr=None if None in errors else errors, capsize=2, color=colour, marker=marker, linestyle=line,
                label=label,
            )  # fmt: skip
    axes.set_xlabel("tie of class and site in training (0 none, 1 targets absent)")
    axes.set_ylabel("balanced accuracy under shift")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
