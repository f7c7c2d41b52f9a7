"""The plots of the report as PNG data URIs; narrow, so that they can be read on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe & Ito 2008: told apart with any colour vision; every series also has a marker of its own.
INK, MUTED, GRID = "#1b1f24", "#59616b", "#d9dde2"
COLOURS = {
    "medi": "#0072b2",
    "cls": "#d55e00",
    "floor": "#59616b",
    "real": "#59616b",
    "oversample": "#8a6d00",
    "stain_transfer": "#a8467f",
    "oracle": "#00785a",
}
MARKERS = {"medi": "o", "cls": "s", "floor": "|", "oracle": "D", "stain_transfer": "^", "oversample": "v", "real": "|"}
NAMES = {
    "medi": "MeDi",
    "cls": "CLS",
    "floor": "real vs real",
    "real": "real only",
    "oversample": "oversampling",
    "stain_transfer": "stain transfer",
    "oracle": "oracle",
}
_WIDTH = 4.8  # inches; at this width 9 pt stays legible when the page is 390 px wide


def name_of(arm: str) -> str:
    """An arm's name for people."""
    return NAMES.get(arm, arm)


def data_uri(png: bytes) -> str:
    """``data:`` URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def image_uri(image: np.ndarray) -> str:
    """``data:`` URI of a uint8 [H, W, 3] image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue())


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # No software tag: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    return data_uri(buffer.getvalue())


def _style(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set_size(9)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name may hold a dollar sign


def _point(axes: Any, y: float, record: Mapping[str, Any], arm: str, label: str | None = None) -> None:
    value, bounds = record["value"], record.get("interval")
    colour = COLOURS.get(arm, INK)
    if isinstance(bounds, Sequence) and not isinstance(bounds, str):
        axes.plot(bounds, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", alpha=0.75)
    size = 9 if MARKERS.get(arm) == "|" else 5.5
    axes.plot(
        [value],
        [y],
        MARKERS.get(arm, "o"),
        color=colour,
        markersize=size,
        markeredgewidth=1.8,
        label=label,
        linestyle="",
    )


def distances(part: Mapping[str, Any]) -> str | None:
    """Distance of each arm and of real patients, per cell and as a mean, with intervals; None if nothing is there.

    Args:
        part: "unseen" or "per_class" of one encoder in ``metrics.json``.
    """
    summary = {k: v for k, v in part["summary"].items() if k != "ratio"}
    rows = [(c["name"], c["arms"]) for c in part["cells"] if c["arms"]]
    if len(rows) > 1:
        rows.append(("mean", summary))
    if not rows:
        return None
    arms = [a for a in summary if any(a in r and r[a]["value"] is not None for _, r in rows)]
    figure = _figure(0.85 + 0.42 * len(rows))
    axes = figure.subplots()
    for i, (_, records) in enumerate(rows):
        for j, arm in enumerate(arms):
            if arm in records and records[arm]["value"] is not None:
                y = i + (j - (len(arms) - 1) / 2) * 0.24
                _point(axes, y, records[arm], arm, name_of(arm) if i == len(rows) - 1 else None)
    axes.set_yticks(range(len(rows)), [n for n, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    metric = {"fd": "Fréchet distance", "kid": "KID"}[part["metric"]]
    axes.set_xlabel(f"{metric} to real test patches (left is better)")
    _style(axes)
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
    figure.legend(
        loc="outside upper left", ncols=len(arms), frameon=False, fontsize=9, handletextpad=0.3, columnspacing=1.2
    )
    return _uri(figure)


def forest(arms: Mapping[str, Any], score: str) -> str | None:
    """A score per arm with its interval; the dashed line is the arm without added patches.

    Args:
        arms: "arms" of one encoder's downstream record.
        score: Such as "accuracy_shift".
    """
    order = [a for a in ("real", "oversample", "stain_transfer", "cls", "medi", "oracle") if a in arms]
    order += [a for a in arms if a not in order]
    order = [a for a in order if arms[a][score]["value"] is not None]
    if not order:
        return None
    figure = _figure(0.55 + 0.33 * len(order))
    axes = figure.subplots()
    for i, arm in enumerate(order):
        _point(axes, i, arms[arm][score], arm)
        axes.annotate(
            f"{arms[arm][score]['value']:.3f}", (1.0, i), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9, color=INK, annotation_clip=False,
        )  # fmt: skip
    if "real" in order:
        axes.axvline(arms["real"][score]["value"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(order)), [name_of(a) for a in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("balanced accuracy (right is better)")
    _style(axes)
    return _uri(figure)


def differences(record: Mapping[str, Any], score: str) -> str | None:
    """Paired differences of a score between arms, with intervals over patients; zero means no difference."""
    rows = [(n, d[score]) for n, d in record.items() if d[score]["value"] is not None]
    rows = [(n, d) for n, d in rows if n.startswith("medi - ")] + [(n, d) for n, d in rows if n == "oracle - real"]
    if not rows:
        return None
    figure = _figure(0.55 + 0.33 * len(rows))
    axes = figure.subplots()
    for i, (name, value) in enumerate(rows):
        _point(axes, i, value, name.split(" - ")[0])
        axes.annotate(
            f"{value['value']:+.3f}", (1.0, i), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9, color=INK, annotation_clip=False,
        )  # fmt: skip
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [" − ".join(name_of(a) for a in n.split(" - ")) for n, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference in balanced accuracy, paired by patient")
    _style(axes)
    return _uri(figure)
