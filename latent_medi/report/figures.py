"""The plots of the report as PNG data URIs; narrow, so that they can be read on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from latent_medi.core.errors import needs

with needs("The report", "matplotlib"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
# For values of a field: eight colours in eight shapes, so that neither alone carries the meaning.
SERIES = ("#0072b2", "#d55e00", "#00785a", "#a8467f", "#8a6d00", "#2f9bd6", "#59616b", "#1b1f24")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMES = {
    "medi": "MeDi",
    "cls": "CLS",
    "floor": "real vs real",
    "real": "real only",
    "oversample": "oversampling",
    "stain_transfer": "stain transfer",
    "stain_augmentation": "stain augmentation",
    "nearest_site": "nearest site",
    "reweight": "reweighting",
    "oracle": "oracle",
}
_WIDTH = 4.4  # inches; at this width the text is about 11 px high when the page is 390 px wide
_FONT = 10
_LONGEST = 24  # characters of a name in a plot
_MOST_ROWS = 40


def name_of(arm: str) -> str:
    """An arm's name for people."""
    for prefix, words in (("synthetic_only_", "{} alone"), ("pretrain_finetune_", "{}, then real")):
        if arm.startswith(prefix):
            return words.format(name_of(arm.removeprefix(prefix)))
    return NAMES.get(arm, arm)


def short(name: str, longest: int = _LONGEST) -> str:
    """A name with its middle left out if it is longer than ``longest`` characters."""
    head = (longest - 1) * 2 // 3
    return name if len(name) <= longest else f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


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
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return data_uri(buffer.getvalue())


def _style(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=_FONT, length=0)
    axes.xaxis.label.set_size(_FONT)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
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
        part: "unseen", "per_class" or "per_site" of one encoder in ``metrics.json``.
    """
    summary = {k: v for k, v in part["summary"].items() if k != "ratio"}
    rows = [(c["name"], c["arms"]) for c in part["cells"] if c["arms"]]
    if len(rows) > 1:
        rows = [*rows[:_MOST_ROWS], ("mean", summary)]
    if not rows:
        return None
    arms = [a for a in summary if any(a in r and r[a]["value"] is not None for _, r in rows)]
    figure = _figure(0.9 + 0.44 * len(rows))
    axes = figure.subplots()
    for i, (_, records) in enumerate(rows):
        for j, arm in enumerate(arms):
            if arm in records and records[arm]["value"] is not None:
                y = i + (j - (len(arms) - 1) / 2) * 0.24
                _point(axes, y, records[arm], arm, name_of(arm) if i == len(rows) - 1 else None)
    axes.set_yticks(range(len(rows)), [short(n) for n, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    metric = {"fd": "Fréchet distance", "kid": "KID"}[part["metric"]]
    axes.set_xlabel(f"{metric} (left is better)")
    _style(axes)
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
    figure.legend(
        loc="outside upper left", ncols=len(arms), frameon=False, fontsize=_FONT, handletextpad=0.3, columnspacing=1.2
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
            textcoords="offset points", va="center", fontsize=_FONT, color=INK, annotation_clip=False,
        )  # fmt: skip
    if "real" in order:
        axes.axvline(arms["real"][score]["value"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(order)), [short(name_of(a)) for a in order])
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
            textcoords="offset points", va="center", fontsize=_FONT, color=INK, annotation_clip=False,
        )  # fmt: skip
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [" − ".join(name_of(a) for a in n.split(" - ")) for n, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference in balanced accuracy")
    _style(axes)
    return _uri(figure)


def runs(rows: Sequence[tuple[str, str, Mapping[str, Any]]], label: str) -> str | None:
    """One number of several runs with its interval, a line each.

    Args:
        rows: Name of the run, arm and measure.
        label: What the axis shows.
    """
    rows = [r for r in rows if r[2].get("value") is not None]
    if not rows:
        return None
    figure = _figure(0.6 + 0.34 * len(rows))
    axes = figure.subplots()
    for i, (_, arm, record) in enumerate(rows):
        _point(axes, i, record, arm)
        axes.annotate(
            f"{record['value']:.3f}", (1.0, i), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=_FONT, color=INK, annotation_clip=False,
        )  # fmt: skip
        if i and rows[i - 1][0] != rows[i][0]:
            axes.axhline(i - 0.5, color=MUTED, linewidth=0.6)
    axes.set_yticks(range(len(rows)), [f"{short(run, 14)}: {short(name_of(arm), 14)}" for run, arm, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    _style(axes)
    return _uri(figure)


def projection(record: Mapping[str, Any], key: str, most: int = 12) -> str | None:
    """Points of each source on two principal components, a panel each with the same axes, by class or by site.

    Args:
        record: "projection" of one encoder.
        key: "class" or "site": what colour and shape stand for.
        most: Values with a colour of their own, the most frequent; the rest is grey dots.
    """
    sources = {n: s for n, s in record["sources"].items() if s["x"]}
    names = record["classes" if key == "class" else "sites"]
    codes = [c for s in sources.values() for c in s[key] if c >= 0]
    if not codes:
        return None
    used = sorted(set(codes), key=lambda c: (-codes.count(c), c))[:most]
    order = sorted(used)
    columns = 2 if len(sources) > 1 else 1
    rows = -(-len(sources) // columns)
    figure = _figure(1.95 * rows + 0.55 + 0.22 * -(-(len(order) + 1) // 2))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (name, source) in zip(panels, sources.items(), strict=False):
        x, y, values = (np.asarray(source[k]) for k in ("x", "y", key))
        rest = ~np.isin(values, order)
        panel.plot(x[rest], y[rest], ".", color="#a3abb4", markersize=3, label="other or not given")
        for i, code in enumerate(order):
            mine = values == code
            panel.plot(
                x[mine], y[mine], SHAPES[i % len(SHAPES)], color=SERIES[(i + i // len(SHAPES)) % len(SERIES)],
                markersize=3.6, markeredgewidth=0, alpha=0.75, label=short(names[code], 20),
            )  # fmt: skip
        panel.set_title("real test patches" if name == "real" else short(name_of(name)), fontsize=_FONT, color=INK)
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_color(GRID)
    for panel in panels[len(sources) :]:
        panel.set_visible(False)
    share = [f" ({100 * e:.0f} %)" if e is not None else "" for e in record["explained"]] + [" ", " "]
    figure.supxlabel(f"first component{share[0]}", fontsize=_FONT, color=MUTED)
    figure.supylabel(f"second component{share[1]}", fontsize=_FONT, color=MUTED)
    handles: dict[str, Any] = {}
    for panel in panels[: len(sources)]:
        handles |= {text: h for h, text in zip(*panel.get_legend_handles_labels(), strict=True) if len(h.get_xdata())}
    legend = figure.legend(
        # Above, since below lies the label of the axis.
        list(handles.values()), list(handles), loc="outside upper center", ncols=2, frameon=False, fontsize=_FONT,
        handletextpad=0.2, columnspacing=1.2, markerscale=1.7,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _uri(figure)


def matrix(values: Sequence[str], shares: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Shares of requested (down) and found (across) values for fields with many values, a panel each.

    Args:
        values: The field's values.
        shares: Per title rows that add to 1; None where nothing was requested.
    """
    columns = min(2, len(shares))
    rows = -(-len(shares) // columns)
    figure = _figure(2.6 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, (title, table) in zip(panels, shares.items(), strict=False):
        grid = np.array([[np.nan if v is None else v for v in row] for row in table], float)
        panel.imshow(grid, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        panel.set_title(short(title), fontsize=_FONT, color=INK, parse_math=False)
        every = range(len(values)) if len(values) <= 16 else range(0, len(values), -(-len(values) // 16))
        panel.set_xticks(every, [short(values[i], 12) for i in every], rotation=90, fontsize=7, parse_math=False)
        panel.set_yticks(every, [short(values[i], 12) for i in every], fontsize=7, parse_math=False)
        panel.tick_params(length=0)
    for panel in panels[len(shares) :]:
        panel.set_visible(False)
    return _uri(figure)
