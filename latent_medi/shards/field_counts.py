"""What a dataset folder holds, its splits, and its counts by every pair of fields: the verb ``shards info``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.metadata.heatmap import write_heat_map
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.file_names import file_names
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.shards.settings import InfoSettings


def info(settings: InfoSettings) -> dict[str, Any]:
    """Print the counts, and draw them if ``figures`` is set.

    Returns:
        ``folder``, ``patches``, ``patients``, ``slides``, ``schema``; ``splits``: by name and part the patches and
        patients; ``selections``: by name the selected patches; ``counts``: for "a x b" the count by value of b and
        value of a; and ``figures``: the files that were drawn.

    Raises:
        UserError: There is no such dataset.
    """
    if not settings.data:
        raise UserError("No dataset folder is given.", "latent-medi shards info runs/demo/data")
    dataset = PatchDataset.open(settings.data)
    result = _contents(dataset)
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
    return result | {"counts": counts, "figures": figures}


def _contents(dataset: PatchDataset) -> dict[str, Any]:
    """Print what the folder holds and how it is split."""
    index, facts = dataset.index, dataset.info
    patients, slides = index["patient"].nunique(), index["slide"].nunique()
    print(f"{dataset.folder}: {len(dataset):,} {' and '.join(sorted(set(index['origin'])))} patches, ", end="")
    print(f"{counted(patients, 'patient')}, {counted(slides, 'slide')}; ", end="")
    print(f"{dataset.patch_size} px at {facts['mpp']:g} µm per pixel, {facts['codec']}")
    if dataset.patients_note:
        print(dataset.patients_note)
    splits = {}
    for name in dataset.splits:
        parts = index.groupby(index[SPLIT_PREFIX + name].fillna(""))["patient"].agg(["size", "nunique"])
        counts = {
            str(part): {"patches": int(row["size"]), "patients": int(row["nunique"])} for part, row in parts.iterrows()
        }
        splits[name] = counts
        listed = [
            f"{part or 'no part'} {count['patches']:,} ({counted(count['patients'], 'patient')})"
            for part, count in counts.items()
        ]
        print(f"split {name}: {', '.join(listed)}")
    selected = {name: int(index[SELECTED_PREFIX + name].sum()) for name in dataset.selections}
    for name, count in selected.items():
        print(f"selection {name}: {counted(count, 'patch')}")
    print()
    return {
        "folder": str(dataset.folder),
        "patches": len(dataset),
        "patients": patients,
        "slides": slides,
        "schema": dataset.schema.to_dict(),
        "splits": splits,
        "selections": selected,
    }
