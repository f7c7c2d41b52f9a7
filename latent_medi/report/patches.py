"""Images of the report, read from the datasets: real beside synthetic patches, and copies beside their originals."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.report.figures import image_uri, name_of
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)

_LARGEST = 96  # pixels of a patch on the page
_GAP = 2


@dataclass
class Row:
    """One combination in the grid of a class.

    Args:
        name: What the row shows, without the class.
        unseen: Whether no training patch has it.
        images: Data URI of a montage per column, or None.
        alt: Text for each image.
    """

    name: str
    unseen: bool
    images: list[str | None]
    alt: list[str]


@dataclass
class Grid:
    """The grid of one class.

    Args:
        tumour: The class.
        columns: Headings: real and each arm.
        rows: Its rows, held-out combinations first.
        omitted: Rows left out for space.
    """

    tumour: str
    columns: list[str]
    rows: list[Row]
    omitted: int


def montage(images: np.ndarray) -> np.ndarray:
    """Patches [n, H, W, 3] in a near-square block with narrow white gaps; patches above 96 px are thinned to fit."""
    step = math.ceil(images.shape[1] / _LARGEST)
    if step > 1:
        n, h, w, _ = images.shape
        trimmed = images[:, : h - h % step, : w - w % step].astype(np.float32)
        blocks = trimmed.reshape(n, h // step, step, w // step, step, 3)
        images = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    n, h, w, _ = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + _GAP) - _GAP, columns * (w + _GAP) - _GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + _GAP), (i % columns) * (w + _GAP)
        canvas[y : y + h, x : x + w] = image
    return canvas


def open_or_none(folder: str | Path) -> PatchDataset | None:
    """The dataset, or None (and a log line) where it is not on this machine."""
    try:
        return PatchDataset.open(folder)
    except (UserError, OSError) as error:
        log.warning("No patches in the report: %s", error)
        return None


def locate(folder: str, made_in: str, metrics_file: Path) -> str:
    """Where a folder that the metrics name lies now: as it is reached from them, as it is called, or as it lay to the
    metrics that moved with it (earlier versions named folders as the command did).

    Args:
        folder: As ``metrics.json`` has it.
        made_in: The folder of ``metrics.json`` as that file itself has it; empty if unknown.
        metrics_file: Where that file lies now.
    """
    if not os.path.isabs(folder) and (metrics_file.parent / folder).exists():
        return str(metrics_file.parent / folder)
    if not made_in or Path(folder).exists():
        return folder
    moved = metrics_file.parent / os.path.relpath(folder, made_in)
    return str(moved) if moved.exists() else folder


@dataclass
class CopyPair:
    """A synthetic patch and the training patch that it is most like.

    Args:
        synthetic, train: Data URIs.
        arm: Name of the arm.
        caption: Distance and view.
        combination: What was asked for.
    """

    synthetic: str
    train: str
    arm: str
    caption: str
    combination: str


def pairs(
    record: Mapping[str, Any],
    real: PatchDataset | None,
    arms: Mapping[str, PatchDataset],
    fields: Sequence[str],
    most: int = 12,
) -> tuple[list[CopyPair], int]:
    """The synthetic patches that an evaluation listed, each with the training patch that it is most like, copies first.

    Args:
        record: "memorisation" of one encoder in ``metrics.json``.
        real: The real dataset.
        arms: Synthetic datasets by arm.
        fields: Fields that name the combination.
        most: Pairs per arm.

    Returns:
        The pairs, and how many listed ones are not shown: for space, or since a patch is not on this machine.
    """
    result: list[CopyPair] = []
    hidden = 0
    for arm, found in record.get("arms", {}).items():
        listed = sorted(found.get("listed", []), key=lambda item: -item["likeness"])
        shown = 0
        for item in listed:
            images = [_by_key(arms.get(arm), item["synthetic_key"]), _trained_on(real, item)]
            if shown == most or images[0] is None or images[1] is None:
                hidden += 1
                continue
            shown += 1
            row = images[0][1]
            asked = " × ".join(str(row[f]) for f in fields if f in row.index)
            result.append(
                CopyPair(
                    image_uri(montage(images[0][0])), image_uri(montage(images[1][0])), arm,
                    f"{'copy' if item['copy'] else 'no copy'}, likeness {item['likeness']:.2f}, {item['view']}", asked,
                )
            )  # fmt: skip
    return result, hidden


def _trained_on(real: PatchDataset | None, item: Mapping[str, Any]) -> tuple[np.ndarray, pd.Series] | None:
    """The training patch of a listed pair; ``None`` if the dataset is not the one that was evaluated."""
    if "train_row" not in item:  # as earlier versions wrote it
        return _by_key(real, item["train_key"])
    row = int(item["train_row"])
    if real is None or not 0 <= row < len(real):
        return None
    patients, number = np.unique(real.index["patient"].to_numpy(dtype=str), return_inverse=True)
    if item["patient"] not in (f"patient {number[row] + 1}", patients[number[row]]):
        return None
    return real.read([row]), real.index.iloc[row]


def _by_key(dataset: PatchDataset | None, key: str) -> tuple[np.ndarray, pd.Series] | None:
    """The patch [1, H, W, 3] of a key with its row of the index."""
    if dataset is None:
        return None
    rows = np.flatnonzero(dataset.index["key"].to_numpy(dtype=str) == key)
    return (dataset.read(rows[:1]), dataset.index.iloc[int(rows[0])]) if len(rows) else None


def grids(
    metrics: Mapping[str, Any],
    real: PatchDataset | None,
    arms: Mapping[str, PatchDataset],
    per_cell: int = 4,
    rows_per_class: int = 8,
    seed: int = 0,
) -> list[Grid]:
    """One grid per class; held-out combinations first, then sites by their number of training patches.

    Args:
        metrics: For the classes, sites, counts and held-out combinations.
        real: The real dataset; its test patches are shown.
        arms: Synthetic datasets by arm.
        per_cell: Patches of each kind in a cell.
        rows_per_class: Rows at most.
        seed: Seed of the choice.
    """
    info = metrics["dataset"]
    if real is None and not arms:
        return []
    settings = metrics.get("settings", {})
    sources: list[tuple[str, PatchDataset, dict[str, str]]] = []
    if real is not None:
        column = f"split_{info['split']}"
        split = {column: settings.get("test_value", "test")} if column in real.index.columns else {}
        sources.append((name_of("real").removesuffix(" only"), real, split))
    chosen = settings.get("selected", {})
    for name, dataset in sorted(arms.items(), key=lambda item: item[0] != "medi"):
        sources.append((name_of(name), dataset, {chosen[name]: "True"} if name in chosen else {}))
    train = info["counts"]["patches"].get(settings.get("train_value", "train"))
    result = []
    for number, tumour in enumerate(info["classes"]):
        counts = dict(zip(info["sites"], train[number] if train else [0] * len(info["sites"]), strict=True))
        combinations = _combinations(info, tumour, counts)
        rows = []
        for combination, unseen in combinations[:rows_per_class]:
            rows.append(_row(info, tumour, combination, unseen, sources, per_cell, seed))
        rows = [r for r in rows if any(r.images)]
        if rows:
            omitted = max(0, len(combinations) - rows_per_class)
            result.append(Grid(tumour, [s[0] for s in sources], rows, omitted))
    return result


def _combinations(info: Mapping[str, Any], tumour: str, counts: Mapping[str, int]) -> list[tuple[dict[str, str], bool]]:
    """Combinations of a class without the class: held-out ones, then every other site."""
    class_field, site_field = info["class_field"], info["site_field"]
    held = [
        {k: v for k, v in c.items() if k != class_field}
        for c in info["held_out"]
        if c.get(class_field, tumour) == tumour
    ]
    held = [c for i, c in enumerate(held) if c and c not in held[:i]]
    rest = sorted((s for s in info["sites"] if {site_field: s} not in held), key=lambda s: -counts[s])
    return [(c, True) for c in held] + [({site_field: s}, counts[s] == 0) for s in rest]


def _row(
    info: Mapping[str, Any],
    tumour: str,
    combination: Mapping[str, str],
    unseen: bool,
    sources: list[tuple[str, PatchDataset, dict[str, str]]],
    per_cell: int,
    seed: int,
) -> Row:
    name = " × ".join(combination.values())
    images: list[str | None] = []
    alt: list[str] = []
    for title, dataset, extra in sources:
        wanted = {info["class_field"]: tumour, **combination, **extra}
        keep = np.ones(len(dataset.index), bool)
        for column, value in wanted.items():
            # A dataset that lacks the field shows what it has of the class.
            if column in dataset.index.columns:
                keep &= dataset.index[column].to_numpy(dtype=str) == value
        rows = np.flatnonzero(keep)
        chosen = np.sort(np.random.default_rng([seed, 17]).permutation(rows)[:per_cell])
        images.append(image_uri(montage(dataset.read(chosen))) if len(chosen) else None)
        alt.append(f"{len(chosen)} patches, {title}: {tumour} × {name}")
    return Row(name, unseen, images, alt)
