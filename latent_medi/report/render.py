"""``render_report``: metrics.json and patches in, one HTML file without any external request out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import HTML, check_file, write_text
from latent_medi.report import figures, patches
from latent_medi.report.colour import side_by_side
from latent_medi.report.compare import render_comparison
from latent_medi.report.page import BY_ENCODER, environment, foreign, read_metrics, shade
from latent_medi.report.settings import SECTIONS, ReportSettings

_MOST_SITES = 40
_PARTS = {
    "unseen": (
        "unseen combinations",
        "Unseen combinations: distance to real test patches of the same combination, every arm and the real patients "
        "at one n.",
    ),
    "per_class": ("each class", "Each class over all sites; MeDi's samples have the test patches' mix of sites."),
    "per_site": ("each site", "Each site over all classes."),
    "whole": ("all patches", "Every class and site together; samples have the test patches' mix."),
}
_MOST_MATRIX = 6  # values of a field whose matrix still fits a telephone as a table


def render_report(
    metrics: Mapping[str, Any] | str | Path,
    out: str | Path,
    title: str = "",
    real: str | Path | None = None,
    synthetic: Mapping[str, str | Path] | None = None,
    sections: Sequence[str] = SECTIONS,
    per_cell: int = 4,
    rows_per_class: int = 8,
    seed: int = 0,
) -> Path:
    """Write the report of an evaluation. What the metrics lack is left out; nothing is computed.

    Args:
        metrics: The content or the path of ``metrics.json``.
        out: The HTML file.
        title: Heading; the dataset's name if empty.
        real: Folder of the real dataset, by default the evaluated one; no images of it if it is not there.
        synthetic: Folder of each arm's dataset, likewise.
        sections: Parts to show, from :data:`latent_medi.report.settings.SECTIONS`.
        per_cell: Patches beside each other in the image grids.
        rows_per_class: Rows of the image grid of a class.
        seed: Seed of the choice of patches.

    Returns:
        The path of the page.

    Raises:
        UserError: The metrics are no evaluation's, or there is no such section.
    """
    content, file = read_metrics(metrics)
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise UserError(f"There is no report section {unknown[0]!r}.", f"Sections: {', '.join(SECTIONS)}.")
    pictured = {"patches", "memorisation"} & set(sections)
    # A record without a file has its folders as they are reached from the page, which lies where the file would.
    where = file or Path(out).with_name("metrics.json")
    opened = _datasets(content, where, real, synthetic or {}) if pictured else (None, {})
    page = environment().get_template("page.html").render(
        title=title or content["dataset"].get("name") or "Evaluation",
        metrics=content,
        headline=content["headline"],
        verdict=content["verdict"],
        sections=list(sections),
        colour=side_by_side(content),
        encoders=_encoders(content, sections, *opened),
        counts=_counts(content),
        grids=patches.grids(content, *opened, per_cell, rows_per_class, seed) if "patches" in sections else [],
    )  # fmt: skip
    write_text(check_file(out, "page", HTML), page)
    return Path(out)


def render(settings: ReportSettings) -> Path:
    """Write the report, or the comparison, that the settings describe."""
    if settings.compare:
        if settings.metrics:
            raise UserError("Both metrics and compare are given.", "A page shows one evaluation or compares several.")
        files = [file for each in settings.compare if (file := read_metrics(each)[1]) is not None]
        out = settings.out or files[0].with_name("comparison.html")
        with foreign(*files):
            return render_comparison(settings.compare, out, settings.title)
    if not settings.metrics:
        raise UserError("No metrics are given.", "Set metrics to the metrics.json of an evaluation.")
    file = read_metrics(settings.metrics)[1]
    assert file is not None
    with foreign(file):
        return render_report(
            settings.metrics, settings.out or file.with_name("report.html"), settings.title, settings.real or None,
            dict(settings.synthetic), settings.sections, settings.patches_per_cell, settings.rows_per_class,
            settings.seed,
        )  # fmt: skip


def _encoders(
    metrics: Mapping[str, Any],
    sections: Sequence[str],
    real: patches.PatchDataset | None,
    arms: Mapping[str, patches.PatchDataset],
) -> list[dict[str, Any]]:
    """What each encoder found, with the plots of the sections that are shown."""
    info = metrics["dataset"]
    result = []
    for name in metrics["encoders"]:
        found = {part: metrics[part].get(name, {}) if part in sections else {} for part in BY_ENCODER}
        downstream = found["downstream"].get("arms", {})
        projection = found["projection"]
        fields = found["adherence"].get("fields", {})
        memorisation = found["memorisation"]
        pairs, hidden = (
            patches.pairs(memorisation, real, arms, [info["class_field"], info["site_field"]])
            if memorisation
            else ([], 0)
        )
        result.append(
            {
                "name": name,
                "fidelity": {"unseen": None, "per_class": None, "overall": None} | dict(found["fidelity"]),
                "parts": [_part(key, found["fidelity"][key]) for key in _PARTS if found["fidelity"].get(key)],
                "downstream": found["downstream"] if downstream else None,
                "forest": figures.forest(downstream, "accuracy_shift") if downstream else None,
                "differences": figures.differences(found["downstream"].get("differences", {}), "accuracy_shift"),
                "adherence": fields,
                "leakage": found["adherence"].get("leakage"),
                "matrices": [_matrix(field, record) for field, record in fields.items()],
                "memorisation": _with_absent(memorisation) if memorisation else None,
                "pairs": pairs,
                "hidden_pairs": hidden,
                "projection": projection,
                "projections": {
                    info[f"{key}_field"]: uri
                    for key in ("class", "site")
                    if projection and (uri := figures.projection(projection, key))
                },
            }
        )
    return result


def _part(key: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """One comparison of the fidelity section: plot, caption, what was left out, and every number."""
    title, caption = _PARTS[key]
    n = max((m["n_patches"] for m in part["summary"].values()), default=0)
    rows = [
        {"name": c["name"], "arm": arm, "record": record} for c in part["cells"] for arm, record in c["arms"].items()
    ]
    skipped = [
        f"{c['name']}: " + "; ".join(f"{figures.name_of(a)}: {why}" if a else why for a, why in c["skipped"].items())
        for c in part["cells"]
        if c.get("skipped")
    ]
    return {
        "title": title,
        "metric": part["metric"],
        "figure": figures.distances(part),
        "alt": f"distance of MeDi, CLS and real patients to real test patches, {title}; the numbers are listed below",
        "caption": f"{caption} n = {n} samples per arm over all. {part['rule']}.",
        "rows": rows,
        "skipped": skipped,
    }


def _matrix(field: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Requested and found values of a field: each arm, and beside them the real patches as the ceiling."""
    confusion = record.get("confusion", {})
    panels = [
        {"source": figures.name_of(a), "title": f"{figures.name_of(a)}, all samples", "rows": rows}
        for a, rows in confusion.items()
        if a != "ceiling"
    ]
    if panels and "ceiling" in confusion:
        rows = confusion["ceiling"]
        panels.append({"source": "real patches", "title": "real patches (ceiling)", "rows": rows})
    values = list(record["values"])
    large = panels and len(values) > _MOST_MATRIX
    figure = figures.matrix(values, {p["source"]: p["rows"] for p in panels}) if large else None
    return {"field": field, "values": values, "panels": panels, "figure": figure}


def _with_absent(memorisation: Mapping[str, Any]) -> dict[str, Any]:
    """The memorisation record with None for what an evaluation may not have."""
    arms: dict[str, Any] = {
        name: {"auth_pct": None, "ct": None, "cells": [], "copies": 0} | dict(arm)
        for name, arm in memorisation.get("arms", {}).items()
    }
    return {"rule": "", "threshold": None, "held_out_flagged": None} | dict(memorisation) | {"arms": arms}


def _counts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Training counts per class and site, ready to be drawn: share of the fullest cell, and what is held out."""
    info = metrics["dataset"]
    split = metrics.get("settings", {}).get("train_value", "train")
    patch_counts, patient_counts = (info["counts"][unit].get(split) for unit in ("patches", "patients"))
    if patch_counts is None:
        return {}
    totals = [sum(row[i] for row in patch_counts) for i in range(len(info["sites"]))]
    held = [c for c in info["held_out"] if set(c) == {info["class_field"], info["site_field"]}]
    held_pairs = {(c[info["class_field"]], c[info["site_field"]]) for c in held}
    held_sites = {site for _, site in held_pairs}
    order = sorted(range(len(totals)), key=lambda i: (info["sites"][i] not in held_sites, -totals[i]))[:_MOST_SITES]
    order = sorted(order) if len(totals) <= _MOST_SITES else order
    most = max((patch_counts[r][i] for r in range(len(patch_counts)) for i in order), default=0) or 1
    rows = []
    for r, tumour in enumerate(info["classes"]):
        cells = []
        for i in order:
            # The square root, so that a rare cell differs from an empty one.
            share = (patch_counts[r][i] / most) ** 0.5
            cells.append(
                {
                    "patches": patch_counts[r][i],
                    "patients": patient_counts[r][i],
                    "colour": shade(share),
                    "light": share > 0.55,
                    "held_out": (tumour, info["sites"][i]) in held_pairs,
                }
            )
        rows.append({"name": tumour, "cells": cells})
    return {
        "sites": [info["sites"][i] for i in order],
        "rows": rows,
        "omitted": len(totals) - len(order),
        "none_shown": not any(c["patches"] for row in rows for c in row["cells"] if c["held_out"]),
        "other": [" × ".join(c.values()) for c in info["held_out"] if c not in held],
    }


def _datasets(
    metrics: Mapping[str, Any], file: Path, real: str | Path | None, synthetic: Mapping[str, str | Path]
) -> tuple[patches.PatchDataset | None, dict[str, patches.PatchDataset]]:
    """The real dataset and each arm's, as far as they are on this machine."""
    made_in = metrics.get("settings", {}).get("out", "")
    named = {"": metrics["dataset"].get("folder")} | {n: a.get("folder") for n, a in metrics["synthetic"].items()}
    folders = {n: patches.locate(f, made_in, file) for n, f in named.items() if f} | dict(synthetic)
    if real:
        folders[""] = real
    opened = {n: patches.open_or_none(f) for n, f in folders.items()}
    return opened.pop("", None), {n: d for n, d in opened.items() if d is not None}
