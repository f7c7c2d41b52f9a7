"""Images of the report, read from the datasets: real and synthetic patches, and samples with the training patches that
they are most like."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.downstream.registry import label_of
from latent_medi.evaluation.fidelity.records import ListedPair, Memorisation
from latent_medi.evaluation.provenance import RealDataset
from latent_medi.evaluation.results import Metrics
from latent_medi.report.figures import image_uri
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)

_LARGEST = 128  # pixels of a patch on the page
_GAP = 2
_COLUMNS = 4  # patches next to each other
_SHOWN_FIRST = 3  # held-out combinations at the top of the page


@dataclass
class Row:
    """One combination in the grid of a class.

    Args:
        name: What the row shows, without the class.
        unseen: Whether no training patch has it.
        images: Data URI of a montage per column, or None.
        alt: Text for each image.
        counts: How many patches each column has of it.
    """

    name: str
    unseen: bool
    images: list[str | None]
    alt: list[str]
    counts: list[str]


@dataclass(frozen=True)
class Scale:
    """The scale of the images of a column.

    Args:
        mpp: Micrometres per pixel of the patches.
        length: Length of the bar in micrometres.
        share: The bar's share of an image's width, in percent.
    """

    mpp: float
    length: float
    share: float


@dataclass
class Grid:
    """The grid of one class.

    Args:
        tumour: The class.
        columns: Headings: real and each synthetic set.
        scales: Of each column.
        rows: Combinations that training lacks.
        seen: The others.
        omitted: Rows left out for space.
    """

    tumour: str
    columns: list[str]
    scales: list[Scale]
    rows: list[Row]
    seen: list[Row]
    omitted: int


def montage(images: np.ndarray, columns: int = 1) -> np.ndarray:
    """Patches [n, H, W, 3] in rows of ``columns``, with narrow white gaps; patches above 128 px are thinned to fit.
    What a row lacks is white, so that all montages of as many columns have one scale.
    """
    step = math.ceil(images.shape[1] / _LARGEST)
    if step > 1:
        n, h, w, _ = images.shape
        trimmed = images[:, : h - h % step, : w - w % step].astype(np.float32)
        blocks = trimmed.reshape(n, h // step, step, w // step, step, 3)
        images = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    n, h, w, _ = images.shape
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
    """Where a folder that the metrics name is now: relative to them, relative to the working folder, or, for metrics
    that were moved, as it was relative to their old folder.

    Args:
        folder: As ``metrics.json`` has it.
        made_in: The folder of ``metrics.json`` as that file itself has it; empty if unknown.
        metrics_file: Where that file is now.
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
        source: Name of the synthetic set.
        caption: Likeness and view.
        combination: Requested values.
    """

    synthetic: str
    train: str
    source: str
    caption: str
    combination: str


def pairs(
    record: Memorisation,
    real: PatchDataset | None,
    synthetic: Mapping[str, PatchDataset],
    fields: Sequence[str],
    most: int = 12,
) -> tuple[list[CopyPair], int]:
    """The synthetic patches that an evaluation listed, each with the training patch that it is most like, copies first.

    Args:
        record: Of one encoder.
        real: The real dataset.
        synthetic: Synthetic sets by name.
        fields: Fields that name the combination.
        most: Pairs per set.

    Returns:
        The pairs, and how many listed ones are not shown: for space, or since a patch is not on this machine.
    """
    result: list[CopyPair] = []
    hidden = 0
    for name, found in record.synthetic.items():
        shown = 0
        for pair in sorted(found.listed, key=lambda pair: -pair.likeness):
            sample, trained = _by_key(synthetic.get(name), pair.synthetic_key), _trained_on(real, pair)
            if shown == most or sample is None or trained is None:
                hidden += 1
                continue
            shown += 1
            combination = " × ".join(str(sample[1][f]) for f in fields if f in sample[1].index)
            caption = f"{'copy' if pair.copy else 'no copy'}, likeness {pair.likeness:.2f}, {pair.view}"
            images = [image_uri(montage(patch)) for patch in (sample[0], trained[0])]
            result.append(CopyPair(images[0], images[1], name, caption, combination))
    return result, hidden


def _trained_on(real: PatchDataset | None, pair: ListedPair) -> tuple[np.ndarray, pd.Series] | None:
    """The training patch of a listed pair; ``None`` if the dataset is not the one that was evaluated."""
    if real is None or not 0 <= pair.train_row < len(real):
        return None
    patients, number = np.unique(real.index["patient"].to_numpy(dtype=str), return_inverse=True)
    of_row = number[pair.train_row]
    if pair.patient not in (f"patient {of_row + 1}", patients[of_row]):
        return None
    return real.read([pair.train_row]), real.index.iloc[pair.train_row]


def _by_key(dataset: PatchDataset | None, key: str) -> tuple[np.ndarray, pd.Series] | None:
    """The patch [1, H, W, 3] of a key with its row of the index."""
    if dataset is None:
        return None
    rows = np.flatnonzero(dataset.index["key"].to_numpy(dtype=str) == key)
    return (dataset.read(rows[:1]), dataset.index.iloc[int(rows[0])]) if len(rows) else None


@dataclass(frozen=True)
class _Source:
    """A column of the grids.

    Args:
        title: Its heading.
        dataset: Where its patches are.
        only: Further values that its patches have, by column.
    """

    title: str
    dataset: PatchDataset
    only: dict[str, str]


def first_grid(
    metrics: Metrics,
    real: PatchDataset | None,
    synthetic: Mapping[str, PatchDataset],
    per_cell: int = 4,
    seed: int = 0,
) -> Grid | None:
    """A few combinations that training lacks, for the top of the page: real patches, candidate and baseline; of each
    class where nothing is held out. ``None`` without images. Arguments as of :func:`grids`.
    """
    info, roles = metrics.dataset, metrics.roles
    named = {n: synthetic[n] for n in (roles.candidate, roles.baseline) if n in synthetic}
    sources = _sources(metrics, real, named)
    # Those of one class first: the others are of every class.
    wanted = sorted(info.held_out, key=lambda c: info.class_field not in c) or [
        {info.class_field: c} for c in info.classes
    ]
    held = bool(info.held_out)
    per_cell = min(per_cell, _COLUMNS)
    shown: list[Row] = []
    for combination in wanted:
        row = _row(" × ".join(combination.values()), combination, held, sources, per_cell, seed)
        if any(row.images):
            shown.append(row)
        if len(shown) == _SHOWN_FIRST:
            break
    if not shown:
        return None
    return Grid("", [s.title for s in sources], _scales(sources, per_cell), shown, [], len(wanted) - len(shown))


def grids(
    metrics: Metrics,
    real: PatchDataset | None,
    synthetic: Mapping[str, PatchDataset],
    per_cell: int = 4,
    rows_per_class: int = 8,
    seed: int = 0,
) -> list[Grid]:
    """One grid per class; held-out combinations first, then sites by their number of training patches.

    Args:
        metrics: For the classes, sites, counts and held-out combinations.
        real: The real dataset; its test patches are shown.
        synthetic: Synthetic sets by name.
        per_cell: Patches of each kind in a cell.
        rows_per_class: Rows at most.
        seed: Seed of the choice.
    """
    info, settings = metrics.dataset, metrics.settings
    sources = _sources(metrics, real, synthetic)
    if not sources:
        return []
    train = info.counts.patches.get(settings.train_value)
    result = []
    for number, tumour in enumerate(info.classes):
        counts = dict(zip(info.sites, train[number] if train else [0] * len(info.sites), strict=True))
        combinations = _combinations(info, tumour, counts)
        rows = []
        for combination, lacking in combinations[:rows_per_class]:
            name = " × ".join(combination.values())
            rows.append(_row(name, {info.class_field: tumour, **combination}, lacking, sources, per_cell, seed))
        rows = [r for r in rows if any(r.images)]
        if rows:
            omitted = max(0, len(combinations) - rows_per_class)
            unseen, seen = [r for r in rows if r.unseen], [r for r in rows if not r.unseen]
            result.append(Grid(tumour, [s.title for s in sources], _scales(sources, per_cell), unseen, seen, omitted))
    return result


def _sources(metrics: Metrics, real: PatchDataset | None, synthetic: Mapping[str, PatchDataset]) -> list[_Source]:
    """Real test patches, then the synthetic sets, the candidate first."""
    sources = []
    if real is not None:
        column = f"split_{metrics.dataset.split}"
        test = {column: metrics.settings.test_value} if column in real.index.columns else {}
        sources.append(_Source("real", real, test))
    selected = metrics.settings.selected
    for name, dataset in sorted(synthetic.items(), key=lambda item: item[0] != metrics.roles.candidate):
        sources.append(_Source(label_of(name), dataset, {selected[name]: "True"} if name in selected else {}))
    return sources


def _scales(sources: Sequence[_Source], per_cell: int) -> list[Scale]:
    """A bar for each source: the longest of 1, 2 or 5 × 10ⁿ µm that is at most half of a patch."""
    found = []
    for source in sources:
        mpp, size = float(source.dataset.info["mpp"]), source.dataset.patch_size
        half = mpp * size / 2 * (1 + 1e-9)  # a bar of exactly half a patch fits, whatever the rounding
        power = 10.0 ** math.floor(math.log10(half))
        length = max(m * power for m in (1, 2, 5) if m * power <= half)
        # As the montage is built: patches are thinned, gaps are not.
        edge = size // math.ceil(size / _LARGEST)
        columns = min(per_cell, _COLUMNS)
        width = columns * (edge + _GAP) - _GAP
        found.append(Scale(mpp, length, 100 * length / (mpp * size) * edge / width))
    return found


def _combinations(info: RealDataset, tumour: str, counts: Mapping[str, int]) -> list[tuple[dict[str, str], bool]]:
    """Combinations of a class without the class: held-out ones, then every other site."""
    held = [
        {k: v for k, v in c.items() if k != info.class_field}
        for c in info.held_out
        if c.get(info.class_field, tumour) == tumour
    ]
    held = [c for i, c in enumerate(held) if c and c not in held[:i]]
    rest = sorted((s for s in info.sites if {info.site_field: s} not in held), key=lambda s: -counts[s])
    return [(c, True) for c in held] + [({info.site_field: s}, counts[s] == 0) for s in rest]


def _row(
    name: str,
    combination: Mapping[str, str],
    unseen: bool,
    sources: Sequence[_Source],
    per_cell: int,
    seed: int,
) -> Row:
    row = Row(name, unseen, [], [], [])
    words = " × ".join(combination.values())
    for source in sources:
        index = source.dataset.index
        keep = np.ones(len(index), bool)
        lacking = []
        for column, value in {**combination, **source.only}.items():
            # A dataset that lacks the field shows what it has of the others.
            if column in index.columns:
                keep &= index[column].to_numpy(dtype=str) == value
            else:
                lacking.append(column)
        rows = np.flatnonzero(keep)
        chosen = np.sort(np.random.default_rng([seed, 17]).permutation(rows)[:per_cell])
        images = source.dataset.read(chosen) if len(chosen) else None
        row.images.append(None if images is None else image_uri(montage(images, min(per_cell, _COLUMNS))))
        row.alt.append(f"{len(chosen)} patches, {source.title}: {words}")
        row.counts.append(_count(source.dataset, rows, lacking))
    return row


def _count(dataset: PatchDataset, rows: np.ndarray, lacking: Sequence[str]) -> str:
    """How many patches there are, of how many patients, and which fields they do not know."""
    index = dataset.index.iloc[rows]
    text = counted(len(rows), "patch")
    if len(rows) and (index["origin"].to_numpy(dtype=str) == "real").all():
        text += f", {index['patient'].nunique():,} {dataset.patient_is}s"
    return text + (f", any {' and '.join(lacking)}" if lacking else "")
