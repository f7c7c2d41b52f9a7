"""The plots of the report as PNG data URIs; narrow, so that they can be read on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from latent_medi.core.errors import needs
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.roles import Roles
from latent_medi.evaluation.downstream.registry import KINDS, Style, label_of, names_of, style_of, summarised
from latent_medi.evaluation.fidelity.records import DistanceTable, Projection
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.kernel_distance import KID_UNIT

with needs("The report", "matplotlib"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

# Okabe & Ito 2008: distinct for any colour vision; every series also has a marker of its own.
INK, MUTED, GRID = "#1b1f24", "#59616b", "#d9dde2"
# For values of a field: eight colours in eight shapes, so that neither alone carries the meaning.
SERIES = ("#0072b2", "#d55e00", "#00785a", "#a8467f", "#8a6d00", "#2f9bd6", "#59616b", "#1b1f24")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDTH = 4.4  # inches; at this width the text is about 11 px high when the page is 390 px wide
_LEGEND = 3  # names in a row: more are wider than a figure
_FONT = 10
_LONGEST = 24  # characters of a name in a plot
_MOST_ROWS = 40


def source_name(name: str, training: bool = False) -> str:
    """The name of a source of distances for people; ``training`` if these are to training images."""
    return ("test patients" if training else "real vs real") if name == REAL else label_of(name)


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


def _point(axes: Any, y: float, found: Estimate, style: Style, label: str | None = None) -> None:
    """An estimate with its interval."""
    colour, marker = style.colour, style.marker
    if isinstance(found.interval, tuple):
        axes.plot(found.interval, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", alpha=0.75)
    look = {"color": colour, "markersize": 9 if marker == "|" else 5.5, "markeredgewidth": 1.8, "linestyle": ""}
    axes.plot([found.value], [y], marker, label=label, **look)


def _thousandths(axes: Any) -> None:
    """Ticks of an axis of kernel distances in :data:`~latent_medi.statistics.kernel_distance.KID_UNIT`."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:.6g}".replace("e+0", "e")))


def distances(table: DistanceTable, roles: Roles, training: bool = False) -> str | None:
    """Distance of each source in each combination and as a mean, with intervals; ``None`` if there is none.

    Args:
        table: The distances.
        roles: Which set is the candidate.
        training: Whether the distances are to training images.
    """
    rows: list[tuple[str, Mapping[str, Estimate]]] = [(c.name, c.sources) for c in table.combinations if c.sources]
    if len(rows) > 1:
        rows = [*rows[:_MOST_ROWS], ("mean", table.means)]
    if not rows:
        return None
    names = [n for n in table.means if any(n in found and found[n].value is not None for _, found in rows)]
    figure = _figure(0.9 + 0.44 * len(rows))
    axes = figure.subplots()
    for i, (_, found) in enumerate(rows):
        for j, name in enumerate(names):
            if name in found and found[name].value is not None:
                y = i + (j - (len(names) - 1) / 2) * 0.24
                label = source_name(name, training)
                _point(axes, y, found[name], style_of(name, roles), label if i == len(rows) - 1 else None)
    axes.set_yticks(range(len(rows)), [short(n) for n, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _thousandths(axes)
    axes.set_xlabel(f"{KID_UNIT} to training images" if training else f"{KID_UNIT} (left is better; real: about 0)")
    _style(axes)
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
    figure.legend(
        loc="outside upper left", ncols=_LEGEND, frameon=False, fontsize=_FONT, handletextpad=0.3, columnspacing=1.2
    )
    return _uri(figure)


def class_bars(tables: Mapping[str, DistanceTable], roles: Roles) -> str | None:
    """Distance of each synthetic set in each class as bars, one panel per reference; ``None`` if there is none.

    Args:
        tables: Distances by class, by what the reference is.
        roles: Which set is the candidate, which comes first.
    """
    first = next(iter(tables.values()))
    sets = [n for n in reversed(roles.names) if any(n in c.sources for t in tables.values() for c in t.combinations)]
    if not sets:
        return None
    names = [c.name for c in first.combinations]
    figure = _figure(0.5 + len(tables) * (0.5 + 0.34 * (len(names) + 1)))
    panels = figure.subplots(len(tables), 1, squeeze=False).ravel()
    height = 0.8 / len(sets)
    for panel, (reference, table) in zip(panels, tables.items(), strict=True):
        rows: list[tuple[str, Mapping[str, Estimate]]] = [(c.name, c.sources) for c in table.combinations]
        rows.append(("mean", table.means))
        for j, name in enumerate(sets):
            known = [(i, found[name]) for i, (_, found) in enumerate(rows) if name in found]
            known = [(i, estimate) for i, estimate in known if estimate.value is not None]
            places = [i + (j - (len(sets) - 1) / 2) * height for i, _ in known]
            style = style_of(name, roles)
            panel.barh(places, [e.value for _, e in known], height, color=style.colour, label=label_of(name))
            for place, (_, estimate) in zip(places, known, strict=True):
                if isinstance(estimate.interval, tuple):
                    panel.plot(estimate.interval, [place, place], color=INK, linewidth=0.8)
        panel.set_yticks(range(len(rows)), [short(n) for n, _ in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
        _thousandths(panel)
        panel.set_xlabel(f"{KID_UNIT} to {reference} (left is better)")
        _style(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=_LEGEND, frameon=False, fontsize=_FONT)
    return _uri(figure)


@dataclass(frozen=True)
class _Line:
    """One line of a list of estimates.

    Args:
        label: At its left.
        style: Its colour and shape.
        estimate: The number.
    """

    label: str
    style: Style
    estimate: Estimate


def _list_of_estimates(lines: Sequence[_Line], xlabel: str, number: str, height: float = 0.55) -> tuple[Figure, Any]:
    """A line per estimate with its interval, and the number at its right.

    Args:
        lines: From top to bottom.
        xlabel: What the axis shows.
        number: Format of the numbers.
        height: Of what surrounds the lines, inches.
    """
    figure = _figure(height + 0.29 * len(lines))
    axes = figure.subplots()
    for i, line in enumerate(lines):
        _point(axes, i, line.estimate, line.style)
        axes.annotate(
            format(line.estimate.value, number),
            (1.0, i),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_FONT,
            color=INK,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    _style(axes)
    return figure, axes


def forest(accuracies: Mapping[str, Estimate], roles: Roles) -> str | None:
    """Accuracy of each training set with its interval; the dashed line is that of the real patches alone."""
    first = [n for n in names_of(summarised(KINDS), roles) if n in accuracies]
    order = [*first, *(n for n in accuracies if n not in first)]
    known = {n: accuracies[n] for n in order if accuracies[n].value is not None}
    lines = [_Line(short(label_of(n)), style_of(n, roles), estimate) for n, estimate in known.items()]
    if not lines:
        return None
    figure, axes = _list_of_estimates(lines, "balanced accuracy (right is better)", ".3f")
    if REAL in known:
        axes.axvline(known[REAL].value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    return _uri(figure)


def differences(found: Mapping[str, Mapping[str, Estimate]], roles: Roles) -> str | None:
    """Paired differences of a score, by first and second training set, with intervals over patients; zero means no
    difference.
    """
    lines = [
        _Line(f"{label_of(a)} − {label_of(b)}", style_of(a, roles), estimate)
        for a, others in found.items()
        for b, estimate in others.items()
        if estimate.value is not None
    ]
    if not lines:
        return None
    figure, axes = _list_of_estimates(lines, "difference in balanced accuracy", "+.3f")
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    return _uri(figure)


def runs(rows: Sequence[tuple[str, str, Style, Estimate]], xlabel: str) -> str | None:
    """One number of several runs with its interval, a line each.

    Args:
        rows: Name of the run, of the training set, its style, and estimate.
        xlabel: What the axis shows.
    """
    rows = [row for row in rows if row[3].value is not None]
    if not rows:
        return None
    lines = [_Line(f"{short(run, 14)}: {short(label_of(name), 14)}", style, found) for run, name, style, found in rows]
    figure, axes = _list_of_estimates(lines, xlabel, ".3f", height=0.6)
    for i in range(1, len(rows)):
        if rows[i - 1][0] != rows[i][0]:
            axes.axhline(i - 0.5, color=MUTED, linewidth=0.6)
    return _uri(figure)


@dataclass(frozen=True)
class SweepLine:
    """One line of a sweep.

    Args:
        label: In the legend.
        style: Its colour and shape.
        x: Places, ascending.
        means: Mean at each.
        errors: Standard error at each; None for a single run.
        dashed: Whether the line is dashed.
    """

    label: str
    style: Style
    x: list[float]
    means: list[float]
    errors: list[float | None]
    dashed: bool


def sweep(lines: Sequence[SweepLine], xlabel: str, ylabel: str) -> str:
    """Mean ± standard error of a score against a setting, a line each; places are evenly spaced."""
    places = sorted({x for line in lines for x in line.x})
    figure = _figure(2.9 + 0.22 * -(-len(lines) // 2))
    axes = figure.subplots()
    for i, line in enumerate(lines):
        x = [places.index(at) + 0.05 * (i - (len(lines) - 1) / 2) for at in line.x]  # so that bars do not overlap
        errors = [error or 0.0 for error in line.errors]
        dash = (0, (4, 3)) if line.dashed else "solid"
        look: dict[str, Any] = {
            "color": line.style.colour,
            "marker": line.style.marker,
            "linestyle": dash,
            "markersize": 5.5,
        }
        axes.errorbar(x, line.means, errors, linewidth=1.4, elinewidth=1.2, label=short(line.label), **look)
    axes.set_xticks(range(len(places)), [f"{at:g}" for at in places])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel, fontsize=_FONT, color=INK)
    _style(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    legend = figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=_FONT, columnspacing=1.2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _uri(figure)


def projection(record: Projection, key: Literal["class", "site"], most: int = 12) -> str | None:
    """Points of each source in a plane, a panel each with the same axes, by class or by site.

    Args:
        record: Of one encoder.
        key: What colour and shape stand for.
        most: Values with a colour of their own, the most frequent; the rest is grey dots.
    """
    sources = {n: s for n, s in record.sources.items() if s.x}
    by_class = key == "class"
    labels = record.classes if by_class else record.sites
    codes = {n: np.asarray(s.class_codes if by_class else s.site_codes) for n, s in sources.items()}
    known = [c for found in codes.values() for c in found.tolist() if c >= 0]
    if not known:
        return None
    order = sorted(sorted(set(known), key=lambda c: (-known.count(c), c))[:most])
    columns = 2 if len(sources) > 1 else 1
    rows = -(-len(sources) // columns)
    figure = _figure(1.95 * rows + 0.55 + 0.22 * -(-(len(order) + 1) // 2))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (name, source) in zip(panels, sources.items(), strict=False):
        _panel(panel, np.asarray(source.x), np.asarray(source.y), codes[name], {c: labels[c] for c in order})
        panel.set_title("real test patches" if name == REAL else short(label_of(name)), fontsize=_FONT, color=INK)
    for panel in panels[len(sources) :]:
        panel.set_visible(False)
    share = [f" ({100 * e:.0f} %)" if e is not None else "" for e in record.explained] + [" ", " "]
    axis = "t-SNE, {} axis" if record.by_tsne else "{} component"
    figure.supxlabel(f"{axis.format('first')}{share[0]}", fontsize=_FONT, color=MUTED)
    figure.supylabel(f"{axis.format('second')}{share[1]}", fontsize=_FONT, color=MUTED)
    handles: dict[str, Any] = {}
    for panel in panels[: len(sources)]:
        handles |= {text: h for h, text in zip(*panel.get_legend_handles_labels(), strict=True) if len(h.get_xdata())}
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",  # since the label of the axis is below
        ncols=2,
        frameon=False,
        fontsize=_FONT,
        handletextpad=0.2,
        columnspacing=1.2,
        markerscale=1.7,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _uri(figure)


def _panel(panel: Any, x: np.ndarray, y: np.ndarray, codes: np.ndarray, labels: Mapping[int, str]) -> None:
    """Points of one source, with a colour and a shape for each labelled code."""
    rest = ~np.isin(codes, list(labels))
    panel.plot(x[rest], y[rest], ".", color="#a3abb4", markersize=3, label="other or not given")
    for i, (code, label) in enumerate(labels.items()):
        here = codes == code
        style = {"color": SERIES[(i + i // len(SHAPES)) % len(SERIES)], "markersize": 3.6, "markeredgewidth": 0}
        panel.plot(x[here], y[here], SHAPES[i % len(SHAPES)], alpha=0.75, label=short(label, 20), **style)
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_color(GRID)
