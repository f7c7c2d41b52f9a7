"""Two or more evaluations side by side, and which of their numbers may be compared at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import HTML, check_file, write_text
from latent_medi.evaluation.summary import RIVALS
from latent_medi.report import figures
from latent_medi.report.page import (
    DASH,
    bounds,
    distance,
    encoder_name,
    environment,
    flat,
    number,
    percent,
    read_metrics,
    share,
)

_LONGEST = 160  # characters of a setting on the page


MISSING = "missing in one run"


@dataclass(frozen=True)
class Side:
    """One number of one run.

    Args:
        run: Content of its ``metrics.json``.
        encoder: The encoder that it was taken in.
        record: The number's measure; None if it is not there.
        metric: "fd" or "kid" of a distance.
    """

    run: Mapping[str, Any]
    encoder: str
    record: Any
    metric: str | None


def render_comparison(metrics: Sequence[str | Path], out: str | Path, title: str = "") -> Path:
    """Write a page with the numbers of several evaluations, their differences to the first, and what else differs.

    Two numbers are not subtracted where the encoder, the metric, the number of patches or the real data differ; the
    page says why.

    Args:
        metrics: Two or more ``metrics.json`` or folders of runs.
        out: The HTML file.
        title: Heading.

    Returns:
        The path of the page.

    Raises:
        UserError: Fewer than two, or one that is no evaluation's.
    """
    if len(metrics) < 2:
        raise UserError("A comparison takes two runs or more.", "latent-medi report --compare runs/a runs/b")
    read = [read_metrics(m) for m in metrics]
    runs = [content for content, _ in read]
    names = run_names([file for _, file in read if file is not None])
    tables = compare(runs)
    warnings = _warnings(runs, names, tables)
    page = (
        environment()
        .get_template("compare.html")
        .render(
            title=title or "Evaluations side by side",
            names=names,
            verdicts=[(n, m["verdict"]) for n, m in zip(names, runs, strict=True)],
            tables=tables,
            warnings=warnings,
            figures=_figures(runs, names),
            differences=differing(runs),
            runs=[m["run"] for m in runs],
        )
    )
    write_text(check_file(out, "page", HTML), page)
    return Path(out)


def run_names(files: Sequence[Path]) -> list[str]:
    """Short names of runs: their folders' names, with as many parents as it takes to tell them apart."""
    parts = [f.resolve().parent.parts if f.name == "metrics.json" else f.resolve().with_suffix("").parts for f in files]
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[0]} ({i + 1})" for i in range(len(files))]  # the same file twice


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables of rows with each run's number, interval and n, and the difference to the first run.

    The first table has the headline numbers, in the feature space that each run judges by; one more follows for each
    encoder that several runs have.

    Args:
        runs: Contents of ``metrics.json``.

    Returns:
        Per table ``title`` and ``rows``; per row ``name`` and ``cells`` (``value``, ``bounds``, ``n``, ``difference``,
        ``reason``: why there is none).
    """
    own = [m["headline"].get("encoder") or next(iter(m["encoders"]), "") for m in runs]
    headline = [w for w in _wanted(runs, own) if w[2][0] != "adherence" and "per_site" not in w[2]]
    tables = [
        {"title": "the headline, in the feature space that each run judges by", "rows": _rows(runs, own, headline)}
    ]
    for encoder in dict.fromkeys(n for m in runs for n in m["encoders"]):
        if sum(encoder in m["encoders"] for m in runs) > 1:
            names = [encoder] * len(runs)
            tables.append(
                {"title": f"features: {encoder_name(encoder)}", "rows": _rows(runs, names, _wanted(runs, names))}
            )
    return [t for t in tables if t["rows"]]


def _rows(
    runs: Sequence[Mapping[str, Any]], encoders: Sequence[str], wanted: Sequence[tuple[str, str, tuple[str, ...]]]
) -> list[dict[str, Any]]:
    rows = []
    for name, kind, path in wanted:
        records = [_at(m, path[0], e, *path[1:]) for m, e in zip(runs, encoders, strict=True)]
        if all(_value(r) is None for r in records):
            continue
        metrics = [
            _at(m, path[0], e, path[1], "metric") if path[0] == "fidelity" else None
            for m, e in zip(runs, encoders, strict=True)
        ]
        sides = [Side(*side) for side in zip(runs, encoders, records, metrics, strict=True)]
        cells = [_cell(kind, side, None if i == 0 else reasons(sides[0], side), _value(records[0]))
                 for i, side in enumerate(sides)]  # fmt: skip
        rows.append({"name": name, "cells": cells})
    return rows


def reasons(first: Side, other: Side) -> list[str]:
    """Why two numbers cannot be compared; empty if they can."""
    run_a, a, run_b, b = first.run, first.record, other.run, other.record
    if _value(a) is None or _value(b) is None:
        return [MISSING]
    found = []
    prints = [side.run["encoders"].get(side.encoder, {}).get("fingerprint") for side in (first, other)]
    if prints[0] != prints[1]:
        found.append("another encoder")
    if first.metric != other.metric:
        found.append(f"{(other.metric or '').upper()} instead of {(first.metric or '').upper()}")
    for key, unit in (("n_patches", "patches"), ("n_patients", "patients")):
        if a.get(key) != b.get(key):
            found.append(f"n = {b.get(key)} instead of {a.get(key)} {unit}")
    if _real_data(run_a) != _real_data(run_b):
        found.append("other real data")
    return found


def differing(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings, encoders, data, models and versions that are not the same in all runs: name and text per run."""
    described = [_described(m) for m in runs]
    keys = list(dict.fromkeys(k for d in described for k in d))
    rows = [(k, [_clip(d.get(k, DASH)) for d in described]) for k in keys if len({d.get(k) for d in described}) > 1]
    return rows


def _described(run: Mapping[str, Any]) -> dict[str, str]:
    parts: dict[str, Any] = {
        "settings": run.get("settings", {}),
        "real data": _real_data(run) | {"folder": run["dataset"].get("folder")},
        "encoder": {n: {k: e.get(k) for k in ("fingerprint", "preprocessing", "dim")}
                    for n, e in run["encoders"].items()},
        "samples": {n: {"n": a.get("n_patches"), "fields": a.get("fields"), **a.get("provenance", {})}
                    for n, a in run["synthetic"].items()},
        "run": run["run"] or {},
    }  # fmt: skip
    return flat(parts)


def _real_data(run: Mapping[str, Any]) -> dict[str, Any]:
    info = run["dataset"]
    # As text, so that tables of counts are compared whole instead of being counted.
    counts = str(info.get("counts"))
    return {k: info.get(k) for k in ("name", "classes", "sites", "split", "n_patches", "n_patients", "held_out")} | {
        "counts": counts
    }


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _wanted(runs: Sequence[Mapping[str, Any]], encoders: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, kind and path of each number that is set side by side."""
    wanted: list[tuple[str, str, tuple[str, ...]]] = []
    for part, title in (("unseen", "unseen combinations"), ("per_class", "per class"), ("per_site", "per site")):
        for arm in _names(runs, encoders, "fidelity", part, "summary"):
            kind = "ratio" if arm == "ratio" else "distance"
            name = f"distance, {title}: {figures.name_of(arm)}" if arm != "ratio" else f"ratio, {title}"
            wanted.append((name, kind, ("fidelity", part, "summary", arm)))
    for arm in _names(runs, encoders, "downstream", "arms"):
        name = f"accuracy under shift: {figures.name_of(arm)}"
        wanted.append((name, "number", ("downstream", "arms", arm, "accuracy_shift")))
    for rival in RIVALS:
        name = f"accuracy under shift: MeDi − {figures.name_of(rival)}"
        wanted.append((name, "number", ("downstream", "differences", f"medi - {rival}", "accuracy_shift")))
    for field in _names(runs, encoders, "adherence", "fields"):
        for arm in _names(runs, encoders, "adherence", "fields", field, "arms"):
            wanted.append((f"{field} found: {figures.name_of(arm)}", "percent",
                           ("adherence", "fields", field, "arms", arm)))  # fmt: skip
        wanted.append((f"{field} found: ceiling", "percent", ("adherence", "fields", field, "ceiling")))
    for arm in _names(runs, encoders, "memorisation", "arms"):
        name = f"copy rate: {figures.name_of(arm)}"
        wanted.append((name, "percent", ("memorisation", "arms", arm, "copy_rate")))
    return wanted


def _at(run: Mapping[str, Any], *path: str) -> Any:
    record: Any = run
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _names(runs: Sequence[Mapping[str, Any]], encoders: Sequence[str], section: str, *path: str) -> list[str]:
    """Keys at a path in a section, over all runs."""
    both = zip(runs, encoders, strict=True)
    return list(dict.fromkeys(k for run, encoder in both for k in (_at(run, section, encoder, *path) or {})))


def _value(record: Any) -> float | None:
    return record.get("value") if isinstance(record, Mapping) else None


def _cell(kind: str, side: Side, reason: list[str] | None, first: float | None) -> dict[str, Any]:
    record, metric, value = side.record, side.metric, _value(side.record)
    texts = {"distance": distance(value), "ratio": number(value, 2), "percent": percent(value, 1)}
    interval = share(record) if kind == "percent" else bounds(record, {"distance": None, "ratio": 2}.get(kind, 3))
    difference = ""
    if value is not None and first is not None and reason == []:
        gap = value - first
        sign = "+" if gap > 0 else ""
        difference = {
            "distance": sign + distance(gap),
            "ratio": number(gap, 2, sign=True),
            "percent": f"{number(100 * gap, 1, sign=True)} points",
        }.get(kind, number(gap, sign=True))
    n = f"n = {record['n_patches']}" if value is not None and record.get("n_patches") else ""
    if n and record.get("n_patients"):
        n += f", {record['n_patients']} patients"
    label = f" {metric.upper()}" if kind == "distance" and metric and value is not None else ""
    return {
        "value": texts.get(kind, number(value)) + label,
        "bounds": interval,
        "n": n,
        "difference": difference,
        "reason": ", ".join(reason or []),
    }


def _warnings(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str], tables: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One sentence per run that tells what keeps numbers from being compared with those of the first run."""
    texts = []
    for i, name in enumerate(names[1:], 1):
        rows = [row for table in tables for row in table["rows"]]
        barred = [row for row in rows if row["cells"][i]["reason"]]
        why = dict.fromkeys(part for row in barred for part in row["cells"][i]["reason"].split(", "))
        kinds = list(dict.fromkeys("another n" if w.startswith("n = ") else w for w in why))
        if barred:
            texts.append(
                f"{name} and {names[0]}: {len(barred)} of {len(rows)} numbers cannot be compared "
                f"({', '.join(kinds)}); they are shown without a difference."
            )
        prints = [{e.get("fingerprint") for e in run["encoders"].values()} for run in (runs[0], runs[i])]
        if not prints[0] & prints[1]:
            texts.append(f"{name} and {names[0]} have no encoder in common: distances and accuracies are of two kinds.")
    return texts


def _figures(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, str]]:
    """Accuracy under shift of each run, a plot per encoder."""
    result = []
    prints = dict.fromkeys((n, e.get("fingerprint")) for m in runs for n, e in m["encoders"].items())
    for encoder, fingerprint in prints:
        rows = []
        for name, run in zip(names, runs, strict=True):
            # Two sets of weights under one name are two encoders, whose accuracies have no axis in common.
            if run["encoders"].get(encoder, {}).get("fingerprint") != fingerprint:
                continue
            for arm in ("real", "stain_transfer", "cls", "medi"):
                record = _at(run, "downstream", encoder, "arms", arm, "accuracy_shift")
                if _value(record) is not None:
                    rows.append((name, arm, record))
        uri = figures.runs(rows, "balanced accuracy under shift")
        if uri:
            alone = sum(name == encoder for name, _ in prints) == 1
            weights = "" if alone else f" (weights {str(fingerprint)[:8]})"
            result.append({"encoder": encoder_name(encoder) + weights, "uri": uri})
    return result
