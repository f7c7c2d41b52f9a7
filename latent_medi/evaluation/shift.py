"""``benchmark-shift``: the direct test of "unseen".

Class and site are tied together more and more, in training sets of one size; at each level models are trained, patches
generated, and classifiers judged on the real patients of every combination, those of the targets among them. What a
level runs is an experiment like any other, which is handed in: this file makes the splits and reads the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.errors import UserError, nearest
from latent_medi.evaluation.shift_settings import ShiftSettings
from latent_medi.files import atomic_path, read_json, write_json
from latent_medi.metadata.dose import rotating_targets, tie, training_patients
from latent_medi.progress import get_logger
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

log = get_logger(__name__)

SHOWN = ("real", "oversample", "nearest_site", "stain_transfer", "cls", "medi", "oracle")
"""Arms of the curve, if they took part."""

RunLevel = Callable[[dict[str, Any]], Any]


def benchmark_shift(settings: ShiftSettings, run_level: RunLevel) -> dict[str, Any]:
    """Run every level that is not finished, and write ``shift.json``, ``shift.csv`` and ``shift.png``.

    Args:
        settings: The dataset, the levels and what each runs.
        run_level: Runs one experiment, given changes to the settings' experiment (``out``, ``data``, ``latents``,
            ``split``, ``held_out``, ``seed``, ``evaluate``); it returns at once if that is finished.

    Returns:
        The content of ``shift.json``: ``settings``, ``targets``, and ``levels``, each with ``level``, ``tie`` (Cramér's
        V of class and site over training patients), ``n_patients``, ``n_patches``, ``arms`` (``accuracy_shift``,
        ``recall`` and ``false_positive_rate`` of the targets), ``distance`` and ``recovery``; ``loss`` by arm: the mean
        over levels above 0 of accuracy over the real patches' accuracy at level 0, less 1.

    Raises:
        UserError: Settings that cannot be followed, or another benchmark in that folder.
    """
    dataset = PatchDataset.open(settings.data)
    column = _pool(dataset, settings)
    out = Path(settings.out)
    record_file = out / "settings.json"
    asked = asdict(settings)
    if record_file.is_file() and read_json(record_file) != asked:
        raise UserError(f"{out} holds another benchmark.", "Choose another folder, or remove this one first.")
    pool = dataset.index[column == "train"]
    levels = sorted(set(map(float, settings.levels)))
    targets = settings.held_out or rotating_targets(
        pool, settings.class_field, settings.site_field, settings.rotation, settings.per_site
    )
    chosen = training_patients(pool, settings.class_field, settings.site_field, targets, levels, settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(record_file, asked)
    records = []
    for level, patients in zip(levels, chosen, strict=True):
        part = np.where((column == "train") & ~dataset.index["patient"].isin(patients), "", column)
        name = f"shift_{round(1000 * level):04d}_{_short(settings, targets, levels)}"
        recipe = {"kind": "class and site tied", "level": level, "targets": targets, "pool": settings.split,
                  "seed": settings.seed}  # fmt: skip
        if name not in dataset.splits:
            dataset.add_split(name, part.tolist(), recipe)
        folder = out / f"level-{level:.3f}"
        log.info("Level %.2f: %d training patients", level, len(patients))
        run_level(
            {"out": str(folder), "data": settings.data, "latents": settings.latents or str(out / "latents"),
             "split": name, "held_out": targets, "seed": settings.seed, "site_field": settings.site_field,
             "evaluate": {"unseen": False}}
        )  # fmt: skip
        training = pool[pool["patient"].isin(patients)]
        records.append(
            {"level": level, "tie": tie(training, settings.class_field, settings.site_field),
             "n_patients": len(patients), "n_patches": len(training), **_result(folder)}
        )  # fmt: skip
    result = {"settings": asked, "targets": targets, "levels": records, "loss": _loss(records)}
    write_json(out / "shift.json", result)
    table = _table(records)
    with atomic_path(out / "shift.csv") as temporary:
        table.to_csv(temporary, index=False)
    _curve(records, out / "shift.png")
    print(shift_text(result))
    return result


def _pool(dataset: PatchDataset, settings: ShiftSettings) -> np.ndarray:
    """The part of each row in the split that levels draw from."""
    if settings.split not in dataset.splits:
        raise UserError(
            f"{settings.data} has no split {settings.split!r}; {nearest(settings.split, dataset.splits)}.",
            "Its training part is what levels draw from: `latent-medi split` makes one.",
        )
    column = dataset.index[SPLIT_PREFIX + settings.split].to_numpy(str)
    for part in ("train", "test"):
        if not (column == part).any():
            raise UserError(f"Split {settings.split!r} of {settings.data} has no {part!r} patches.")
    for name in (settings.class_field, settings.site_field):
        if name not in dataset.schema.names:
            raise UserError(f"{settings.data} has no field {name!r}; {nearest(name, dataset.schema.names)}.")
    return column


def _short(settings: ShiftSettings, targets: list[dict[str, str]], levels: list[float]) -> str:
    """A few letters that differ where another choice of patients would: how many there are depends on all levels."""
    text = repr((settings.split, settings.seed, settings.class_field, settings.site_field, targets, levels))
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _result(folder: Path) -> dict[str, Any]:
    """What one level's experiment found, with its first encoder."""
    metrics = read_json(folder / "metrics.json")
    encoder = next(iter(metrics["downstream"]))
    compared = metrics["downstream"][encoder]["arms"]
    arms = {}
    for name in SHOWN:
        if name not in compared:
            continue
        entry = compared[name]
        cells = entry["cells"]
        arms[name] = {
            "accuracy_shift": entry["accuracy_shift"]["value"],
            "interval": entry["accuracy_shift"]["interval"],
            **{what: _mean(cell[what]["value"] for cell in cells) for what in ("recall", "false_positive_rate")},
        }
    part = metrics["fidelity"][encoder]["unseen"]
    distance = {name: part["summary"][name]["value"] for name in ("medi", "cls", "floor") if name in part["summary"]}
    fields = metrics["adherence"][encoder]["fields"]
    keys = {"class": metrics["dataset"]["class_field"], "site": metrics["dataset"]["site_field"]}
    recovery = {
        what: {arm: entry["value"] for arm, entry in fields[name]["arms"].items()}
        for what, name in keys.items()
        if name in fields
    }
    return {"encoder": encoder, "arms": arms, "distance": {"metric": part["metric"], **distance}, "recovery": recovery}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _loss(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean over levels above the lowest of accuracy over the real patches' at the lowest, less 1 (after PathoROB)."""
    base = records[0]["arms"]["real"]["accuracy_shift"]
    names = [name for name in SHOWN if all(name in record["arms"] for record in records)]
    tied = records[1:]
    return {
        name: float(np.mean([record["arms"][name]["accuracy_shift"] / base - 1 for record in tied])) if tied else None
        for name in names
    }


def _table(records: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {"level": record["level"], "tie": record["tie"], "n_patients": record["n_patients"], "arm": name,
         "accuracy_shift": arm["accuracy_shift"], "recall": arm["recall"],
         "false_positive_rate": arm["false_positive_rate"]}
        for record in records for name, arm in record["arms"].items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def shift_text(result: Mapping[str, Any]) -> str:
    """The curve as a table for a terminal."""
    records = result["levels"]
    names = [name for name in SHOWN if any(name in record["arms"] for record in records)]
    lines = ["Balanced accuracy at the targets' sites, all classes, as class and site are tied together", ""]
    lines.append(f"  {'level':>6}{'tie':>6}{'patients':>10}" + "".join(f"{name:>16}" for name in names))
    for record in records:
        values = [record["arms"].get(name, {}).get("accuracy_shift") for name in names]
        cells = "".join(f"{'–' if value is None else f'{value:.3f}':>16}" for value in values)
        lines.append(f"  {record['level']:>6.2f}{record['tie']:>6.2f}{record['n_patients']:>10}{cells}")
    losses = [result["loss"].get(name) for name in names]
    lines.append(f"  {'mean change':<22}" + "".join(f"{'–' if x is None else f'{x:+.1%}':>16}" for x in losses))
    lines += ["", "tie: Cramér's V of class and site over training patients; mean change: over the levels above the",
              "lowest, against the real patches alone at the lowest."]  # fmt: skip
    return "\n".join(lines)


def _curve(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over level, a line and a marker per arm."""
    from matplotlib.figure import Figure

    styles = {"real": ("#000000", "o", "-"), "oversample": ("#999999", "v", ":"), "nearest_site": ("#E69F00", "^", ":"),
              "stain_transfer": ("#D55E00", "s", "--"), "cls": ("#56B4E9", "D", "--"), "medi": ("#0072B2", "*", "-"),
              "oracle": ("#009E73", "P", ":")}  # fmt: skip
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in SHOWN:
        points = [(r["level"], r["arms"][name]["accuracy_shift"]) for r in records if name in r["arms"]]
        if points:
            colour, marker, line = styles[name]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=name)
    axes.set_xlabel("tie of class and site in training (0 none, 1 targets absent)")
    axes.set_ylabel("balanced accuracy under shift")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
