"""A dataset folder in the forms that other programs expect: split-pure WebDataset tars for the Hub, or image folders.

Nothing is decoded: image files and JSON members are copied as they are.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import atomic_path, write_json, write_text
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.metadata.row_filter import only_mask, only_text
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.tables import write_table
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.file_names import file_names
from latent_medi.shards.format.selections import selected_mask
from latent_medi.shards.format.tar import tar_end, tar_member
from latent_medi.shards.reading.samples import samples
from latent_medi.shards.settings import ExportSettings

NO_PART = "all"
"""Part that holds every patch if no split is named."""


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write a dataset folder's patches by part of a split.

    ``webdataset``: ``data/<part>/<part>-000000.tar``. ``folder``: ``<part>/<class>/<key>.png`` and
    ``<part>/metadata.csv``, as ``datasets``' imagefolder and torchvision's ImageFolder read them. Both with a
    ``README.md``, the dataset card, whose header lists the files of each part for the Hub and
    ``datasets.load_dataset``. Patches in no part are left out. Names of parts, classes and keys become valid file names
    (:func:`~latent_medi.shards.format.file_names.file_names`); ``metadata.csv`` and ``export.json`` have the original
    ones.

    Returns:
        ``folder``, ``format`` and the number of patches by part.

    Raises:
        UserError: No such split, part, field, value or selection, nothing left, or the target exists and is not empty.
    """
    if not settings.out:
        raise UserError("No folder to write is given.", "out=/path/to/folder")
    with output_lock(settings.out, next_to=True):
        return _export(settings)


def _export(settings: ExportSettings) -> dict[str, Any]:
    dataset = PatchDataset.open(settings.data)
    out = Path(settings.out).resolve()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty.", "Export into a new folder.")
    column = _parts(dataset, settings)
    if settings.only:
        column = column.where(only_mask(dataset.index, settings.only, str(dataset.folder)), "")
        if not (column != "").any():
            raise UserError(f"No patch of the split {settings.split!r} has {only_text(settings.only)}.")
    if settings.selected:
        column = column.where(selected_mask(dataset, settings.selected), "")
        if not (column != "").any():
            raise UserError(f"{settings.selected} chose no patch of the split.", "Leave out selected, or split.")
    names = settings.parts or [p for p in sorted(column.unique(), key=_order) if p]
    if gone := [p for p in names if not (column == p).any()]:
        raise UserError(f"The split has no part {gone[0]!r}; {nearest(gone[0], [p for p in column.unique() if p])}.")
    if out.is_dir():
        out.rmdir()
    # A part's name is free text: its folder must not be outside ``out``, nor another part's.
    folders = file_names(names, forbidden=r"\W")
    rows = {part: np.flatnonzero((column == part).to_numpy()) for part in names}
    counts = {part: len(chosen) for part, chosen in rows.items()}
    with atomic_path(out) as folder:  # whole or absent
        folder.mkdir()
        for part, chosen in rows.items():
            if settings.format == "webdataset":
                _write_tars(dataset, chosen, folder / "data" / folders[part], settings.patches_per_shard)
            else:
                _write_images(dataset, chosen, folder / folders[part])
        exported = dataset.index.iloc[np.concatenate([rows[part] for part in names])]
        write_text(folder / "README.md", _card(dataset, exported, counts, folders, settings.format))
        kept = ("name", "schema", "patch_size", "mpp", "codec", "provenance")
        manifest = {"split": settings.split, "parts": counts, "folders": folders}
        manifest |= {key: dataset.info[key] for key in kept}
        if settings.only:
            manifest["only"] = settings.only
        if settings.selected:
            manifest["selected"] = settings.selected
        write_json(folder / "export.json", manifest)
    return {"folder": str(out), "format": settings.format, "parts": counts}


def _order(part: str) -> tuple[int, str]:
    usual = ("train", "val", "test")
    return (usual.index(part) if part in usual else len(usual), part)


def _parts(dataset: PatchDataset, settings: ExportSettings) -> pd.Series:
    if not settings.split:
        return pd.Series(NO_PART, index=dataset.index.index)
    if settings.split not in dataset.splits:
        raise UserError(f"{dataset.folder} has no split {settings.split!r}; {nearest(settings.split, dataset.splits)}.")
    return dataset.index[SPLIT_PREFIX + settings.split]


def _write_tars(dataset: PatchDataset, rows: np.ndarray, folder: Path, per_shard: int) -> None:
    found, codec = samples(dataset, rows), dataset.info["codec"]
    shards = range(-(-len(rows) // per_shard))
    for number in progress(shards, len(rows), f"exporting {folder.name}", "patches", per_shard):
        with atomic_path(folder / f"{folder.name}-{number:06d}.tar") as temporary, open(temporary, "wb") as file:
            size = 0
            for key, image, text in islice(found, per_shard):
                for name, data in ((f"{key}.{codec}", image), (f"{key}.json", text)):
                    size += sum(file.write(piece) for piece in tar_member(name, data))
            file.write(tar_end(size))


def _write_images(dataset: PatchDataset, rows: np.ndarray, folder: Path) -> None:
    codec, known = dataset.info["codec"], dataset.schema.class_field
    mine = dataset.index.iloc[rows]
    files = file_names(mine["key"], slash="__")
    classes = file_names(mine[known.name]) if known is not None else {}
    for name in {*classes.values(), ""}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    table = []
    for key, image, text in progress(samples(dataset, rows), len(rows), f"exporting {folder.name}", "patches"):
        member = json.loads(text)
        path = Path(classes[str(member[known.name])] if known is not None else "", f"{files[key]}.{codec}")
        with open(folder / path, "xb") as file:  # never over another patch
            file.write(image)
        table.append({"file_name": path.as_posix(), **{k: UNKNOWN_WORD if v == "" else v for k, v in member.items()}})
    write_table(pd.DataFrame(table), folder / "metadata.csv")


def _card(
    dataset: PatchDataset, exported: pd.DataFrame, counts: dict[str, int], folders: dict[str, str], form: str
) -> str:
    """The dataset card: the Hub's README, with a header that lists the files of each part."""
    hub, info = {"train": "train", "val": "validation", "test": "test"}, dataset.info
    pattern = "data/{}/*.tar" if form == "webdataset" else "{}/**"
    files = [{"split": hub.get(part, name), "path": pattern.format(name)} for part, name in folders.items()]
    made = int((exported["origin"] == "synthetic").sum())
    header: dict[str, Any] = {"pretty_name": info["name"], "tags": ["histopathology", "latent-medi"]}
    header["tags"] += ["synthetic"] if made else []
    header |= {"task_categories": ["image-classification"]} if dataset.schema.class_field is not None else {}
    header |= {"size_categories": [_size(len(exported))]}
    header |= {"configs": [{"config_name": "default", "data_files": files}]}
    stored = "WebDataset tars with an image and a JSON member per patch"
    if form == "folder":
        stored = "image files by class, and a metadata.csv per part"
    text = [
        f"# {info['name']}",
        f"{counted(len(exported), 'patch')} of {info['patch_size']} px at {info['mpp']:g} µm per pixel; {stored}.",
        "\n".join(f"- {part}: {counted(count, 'patch')}" for part, count in counts.items()),
    ]
    if made:
        text.append(
            f'**{"All" if made == len(exported) else made} patches are synthetic**, each with `origin` "synthetic" in '
            "its metadata and in the image file. They show no patient: never use them for diagnosis, nor as real data "
            "in validation or testing."
        )
    if dataset.schema.fields:
        text.append("Fields:\n" + "\n".join(f"- `{f.name}` ({f.kind})" for f in dataset.schema.fields))
    if licence := info["provenance"].get("licence", ""):
        text.append(f"Licence of the source: {licence}")
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n" + "\n\n".join(text) + "\n"


def _size(count: int) -> str:
    """The Hub's category of a number of patches."""
    below = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for bound, name in below.items() if count < bound), "10M<n<100M")
