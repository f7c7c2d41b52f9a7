"""Counts of a dataset folder by every pair of its fields: the verb ``shards info``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.metadata.heatmap import write_heat_map
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.file_names import file_names
from latent_medi.shards.settings import InfoSettings


def info(settings: InfoSettings) -> dict[str, Any]:
    """Print the counts, and draw them if ``figures`` is set.

    Returns:
        ``folder``, ``patches``, ``schema``, ``counts``: for "a x b" the count by value of b and value of a, and
        ``figures``: the files that were drawn.

    Raises:
        UserError: There is no such dataset.
    """
    if not settings.data:
        raise UserError("No dataset folder is given.", "latent-medi shards info runs/demo/data")
    dataset = PatchDataset.open(settings.data)
    names = [f.name for f in dataset.schema.fields if not f.continuous]
    counts: dict[str, Any] = {}
    figures = []
    files = file_names(names)
    for row, column in itertools.combinations(names, 2):
        table = dataset.counts(row, column, settings.unit)
        counts[f"{row} x {column}"] = table.to_dict()
        print(f"{row} × {column} ({settings.unit})\n{table.to_string()}\n")
        if settings.figures:
            path = Path(settings.figures) / f"{files[row]}_{files[column]}.png"
            write_heat_map(table, path, settings.unit)
            figures.append(str(path))
    result = {"folder": str(dataset.folder), "patches": len(dataset), "schema": dataset.schema.to_dict()}
    return result | {"counts": counts, "figures": figures}
