"""Tables of counts as heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from latent_medi.core.errors import needs
from latent_medi.core.files import atomic_path, check_file

_LABELLED = 80  # most columns that get readable labels
_CELL = 0.22  # inches
_LETTER = 0.075  # inches, of a label's font


def write_heat_map(counts: pd.DataFrame, path: str | Path, title: str) -> None:
    """Write a heat map as PNG: logarithmic shades, blank for 0, columns sorted by their sum.

    Args:
        counts: Counts >= 0; the names of rows, columns and both axes are shown.
        path: PNG to write.
        title: Title, such as what is counted.
    """
    write_heat_maps({title: counts}, path)


def write_heat_maps(tables: Mapping[str, pd.DataFrame], path: str | Path) -> None:
    """Write several tables of the same rows and columns as heat maps, one above the other. All have the same shades and
    the order of columns of the first.

    Args:
        tables: Counts >= 0 by title.
        path: PNG to write.
    """
    with needs("A heat map", "matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

    first = next(iter(tables.values()))
    order = first.sum().sort_values(ascending=False, kind="stable").index
    rows, columns = first.shape
    labelled = columns <= _LABELLED
    longest = max((len(str(c)) for c in first.columns), default=0) if labelled else 0
    height = (1.8 + _CELL * max(rows, 3)) * len(tables) + max(0.0, _LETTER * longest - 0.6)
    figure = Figure(figsize=(min(2.6 + _CELL * max(columns, 8), 40), height), layout="constrained")
    FigureCanvasAgg(figure)
    most = max(float(table.to_numpy().max(initial=0)) for table in tables.values())
    norm = LogNorm(1, max(2.0, most))
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (title, counts) in zip(panels, tables.items(), strict=True):
        table = counts.loc[:, order]
        values = np.ma.masked_equal(table.to_numpy(dtype=float), 0)
        image = axes.imshow(values, cmap="viridis_r", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(rows), [str(v) for v in table.index], fontsize=8)
        if labelled and axes is panels[-1]:  # the columns are the same in all
            axes.set_xticks(range(columns), [str(v) for v in table.columns], fontsize=8, rotation=90)
        else:
            axes.set_xticks([])
        empty = int((table.to_numpy() == 0).sum())
        axes.set_xlabel(f"{table.columns.name} ({columns})")
        axes.set_ylabel(str(table.index.name))
        axes.set_title(f"{title}; blank: none ({empty} of {rows * columns})", fontsize=9, loc="left")
        figure.colorbar(image, ax=axes, shrink=0.8)
    with atomic_path(check_file(path, "picture", rb"\x89PNG")) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})
