"""``render_report``: metrics.json and patches in, one HTML file without any external request out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from latent_medi.errors import UserError
from latent_medi.evaluation.headline import distance_text
from latent_medi.files import read_json, write_text
from latent_medi.progress import duration
from latent_medi.report import figures, patches
from latent_medi.report.settings import SECTIONS, ReportSettings

_TWIN = ":haematoxylin"
_MOST_SITES = 40
DASH = "–"


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
    content = metrics if isinstance(metrics, Mapping) else read_json(metrics)
    if not isinstance(content, Mapping) or not {"dataset", "encoders", "headline", "verdict"} <= content.keys():
        raise UserError("The metrics are not those of an evaluation.", "Give the metrics.json that `evaluate` wrote.")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise UserError(f"There is no report section {unknown[0]!r}.", f"Sections: {', '.join(SECTIONS)}.")
    # What an evaluation left out is left out here, too.
    absent: dict[str, Any] = {"run": None, "notes": []}
    absent |= {part: {} for part in ("synthetic", "fidelity", "adherence", "downstream")}
    content = absent | dict(content)
    page = _environment().get_template("page.html").render(
        title=title or content["dataset"].get("name") or "Evaluation",
        metrics=content,
        headline=content["headline"],
        verdict=content["verdict"],
        sections=list(sections),
        encoders=_encoders(content, sections),
        counts=_counts(content),
        grids=_grids(content, real, synthetic or {}, per_cell, rows_per_class, seed)
        if "patches" in sections
        else [],
    )  # fmt: skip
    write_text(out, page)
    return Path(out)


def render(settings: ReportSettings) -> Path:
    """Write the report that the settings describe."""
    if not settings.metrics:
        raise UserError("No metrics are given.", "Set metrics to the metrics.json of an evaluation.")
    out = settings.out or Path(settings.metrics).with_name("report.html")
    return render_report(
        settings.metrics, out, settings.title, settings.real or None, dict(settings.synthetic), settings.sections,
        settings.patches_per_cell, settings.rows_per_class, settings.seed,
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shade"] = _shade
    environment.filters |= {
        "number": number,
        "distance": distance,
        "bounds": bounds,
        "percent": percent,
        "duration": duration,
        "arm": figures.name_of,
        "encoder": _encoder_name,
    }
    return environment


def number(value: Any, digits: int = 3) -> str:
    """A number (or a measure's value) with fixed decimals and a true minus sign; a dash if it is not available."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")


def distance(value: Any) -> str:
    """A distance with three significant digits and a true minus sign; a dash if it is not available."""
    return distance_text(value).replace("-", "−")


def bounds(record: Any, digits: int = 3) -> str:
    """A measure's interval in words; empty if it has none."""
    interval = record.get("interval") if isinstance(record, Mapping) else None
    if interval is None:
        return ""
    if isinstance(interval, str):
        return interval
    return f"{number(interval[0], digits)} to {number(interval[1], digits)}"


def percent(value: Any) -> str:
    """A share as a whole percentage; a dash if it is not available."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return DASH if value is None else f"{100 * value:.0f} %"


def _encoder_name(name: str) -> str:
    return name.removesuffix(_TWIN) + " on the haematoxylin channel alone" if name.endswith(_TWIN) else name


def _encoders(metrics: Mapping[str, Any], sections: Sequence[str]) -> list[dict[str, Any]]:
    """What each encoder found, with the plots of the sections that are shown."""
    result = []
    for name in metrics["encoders"]:
        fidelity = metrics.get("fidelity", {}).get(name, {}) if "fidelity" in sections else {}
        downstream = metrics.get("downstream", {}).get(name, {}) if "downstream" in sections else {}
        arms = downstream.get("arms", {})
        result.append(
            {
                "name": name,
                "fidelity": {"unseen": None, "per_class": None, "overall": None} | dict(fidelity),
                "unseen": figures.distances(fidelity["unseen"]) if fidelity.get("unseen") else None,
                "per_class": figures.distances(fidelity["per_class"]) if fidelity.get("per_class") else None,
                "downstream": downstream if arms else None,
                "forest": figures.forest(arms, "accuracy_shift") if arms else None,
                "differences": figures.differences(downstream.get("differences", {}), "accuracy_shift"),
                "adherence": metrics.get("adherence", {}).get(name, {}).get("fields", {}),
            }
        )
    return result


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
                    "colour": _shade(share),
                    "light": share > 0.55,
                    "held_out": (tumour, info["sites"][i]) in held_pairs,
                }
            )
        rows.append({"name": tumour, "cells": cells})
    return {
        "sites": [info["sites"][i] for i in order],
        "rows": rows,
        "omitted": len(totals) - len(order),
        "other": [" × ".join(c.values()) for c in info["held_out"] if c not in held],
    }


def _shade(share: float) -> str:
    """White to deep blue."""
    low, high = (255, 255, 255), (8, 81, 140)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def _grids(
    metrics: Mapping[str, Any],
    real: str | Path | None,
    synthetic: Mapping[str, str | Path],
    per_cell: int,
    rows_per_class: int,
    seed: int,
) -> list[patches.Grid]:
    folder = real or metrics["dataset"].get("folder")
    folders = {n: a.get("folder") for n, a in metrics.get("synthetic", {}).items()} | dict(synthetic)
    opened = {n: patches.open_or_none(f) for n, f in folders.items() if f}
    arms = {n: d for n, d in opened.items() if d is not None}
    return patches.grids(
        metrics, patches.open_or_none(folder) if folder else None, arms, per_cell, rows_per_class, seed
    )
