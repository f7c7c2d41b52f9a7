"""Writing a finished dataset folder again: its splits are kept, and what cannot be kept is refused or logged."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.progress import get_logger
from latent_medi.metadata.fields import UNKNOWN_WORD, is_missing
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.format.layout import PICTURE, ROW_COLUMNS, SPLIT_PREFIX
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.shards.format.software import WRITTEN_WITH
from latent_medi.shards.writing import records
from latent_medi.shards.writing.records import PROGRESS_FOLDER, ShardRecord

logger = get_logger(__name__)

SPLITS_FILE = "splits.json"


def remember_splits(dataset: PatchDataset) -> None:
    """Save the splits of a dataset that is to be written again; ``finish_dataset`` records them again."""
    splits = {
        name: split_by_patient(dataset.index, dataset.index[SPLIT_PREFIX + name], entry["recipe"])
        for name, entry in dataset.info["splits"].items()
    }
    write_sealed(dataset.folder / PROGRESS_FOLDER / SPLITS_FILE, splits)


def split_by_patient(index: pd.DataFrame, column: pd.Series, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A split as it is remembered: the part by patient, and the slides in no part of patients who are in one (a table
    that gives a split may lack slides).

    Args:
        index: A row per patch.
        column: The part of each row.
        recipe: How it was made.
    """
    parts = column.groupby(index["patient"]).max()  # "" comes before every part
    by_slide = column.groupby([index["patient"], index["slide"]]).max()
    out = by_slide[(by_slide == "") & (by_slide.index.get_level_values(0).map(parts) != "")]
    return {"parts": parts.to_dict(), "left_out": [list(pair) for pair in out.index], "recipe": dict(recipe)}


def remembered_splits(folder: Path) -> dict[str, Any]:
    """The splits that :func:`remember_splits` saved."""
    path = folder / PROGRESS_FOLDER / SPLITS_FILE
    return read_sealed(path, f"Remove {path}: the splits in it are lost, make them again.")[0] if path.is_file() else {}


def dataset_or_none(folder: Path) -> PatchDataset | None:
    """The dataset in a folder that is to be written; ``None`` if there is none, or with a warning if it is damaged."""
    if not (folder / INFO_FILE).is_file():
        return None
    try:
        return PatchDataset.open(folder)
    except UserError as error:
        logger.warning("%s Its splits and selections cannot be kept: it is written again without them.", error.message)
        return None


def prepare_rewrite(
    out: Path,
    given: Mapping[str, tuple[Any, Mapping[str, Any]]],
    patches: Iterable[tuple[str, Mapping[str, str]]] | None = None,
) -> None:
    """Make a finished dataset folder one that can be written again, from other patches or settings.

    Its splits are kept by patient: :func:`~latent_medi.shards.writing.finish.finish_dataset` records them again.

    Args:
        out: The folder, or none yet.
        given: The splits that will be recorded anew, parts and recipe by name.
        patches: Patient and fields of every new patch, where they are known.

    Raises:
        UserError: It has selections, which belong to its present patches; or a split of patients whose fields have
            changed since; or one of another kind by the name of a given split; or files of another kind. Nothing is
            removed then.
    """
    records.refuse_foreign_files(out)
    if not (out / INFO_FILE).is_file():
        records.start_records(out)
        return
    hint = f"Write to another folder, or remove {out} first."
    if (dataset := dataset_or_none(out)) is not None:
        if dataset.selections:
            names = ", ".join(dataset.selections)
            raise UserError(f"{out} has the selections {names}, which writing it again would lose.", hint)
        for name in [name for name in dataset.splits if name in given]:
            before, now = dataset.info["splits"][name]["recipe"].get("kind", ""), given[name][1].get("kind", "")
            if before != now:
                raise UserError(
                    f"{out} has a split {name!r} ({before}) in place of its own ({now}), which writing the dataset "
                    "again would put back.",
                    f"{hint} A split by another name is kept.",
                )
        kept = [name for name in dataset.splits if name not in given]
        if kept and patches is not None:
            check_changed_patients(dataset, kept, patches, hint)
        if kept:
            logger.info("%s is written again, and keeps the splits %s", out, ", ".join(kept))
        remember_splits(dataset)
    records.mark_unfinished(out)


def check_changed_patients(
    dataset: PatchDataset, splits: Collection[str], patches: Iterable[tuple[str, Mapping[str, str]]], hint: str
) -> None:
    """Refuse to keep splits of patients who now have a combination of class and categories that they did not have.

    Args:
        dataset: What was there before.
        splits: Names of its splits that would be kept.
        patches: Patient and fields of every new patch, or of every new slide.
        hint: What to do instead.

    Raises:
        UserError: There are such patients.
    """
    patches = list(patches)
    fields = set(patches[0][1]) if patches else set()
    names = [f.name for f in dataset.schema.fields if not f.continuous and f.name in fields]
    before: dict[str, set[tuple[str, ...]]] = {}
    for patient, *values in dataset.index[["patient", *names]].drop_duplicates().itertuples(index=False, name=None):
        before.setdefault(patient, set()).add(tuple(values))
    now = {(p, tuple(UNKNOWN_WORD if is_missing(row[n]) else row[n] for n in names)) for p, row in patches}
    if changed := sorted({patient for patient, values in now if values not in before.get(patient, {values})}):
        raise UserError(
            f"{dataset.folder} has the splits {', '.join(splits)}, which may depend on fields that have changed since: "
            f"those of {len(changed)} patients, such as {changed[0]}.",
            f"{hint} Then make the splits again.",
        )


def reopen_dataset(folder: str | Path) -> None:
    """Turn a finished dataset folder back into an unfinished one with all its shards, to add or redo some.

    Its splits are kept: ``finish_dataset`` records them again. A folder that cannot be opened loses its index only: its
    shards then have no record and are written again, and a warning says why.
    """
    folder = Path(folder)
    dataset = dataset_or_none(folder)
    if dataset is not None:
        if dataset.selections:
            logger.warning("The selections %s are of the former patches: make them again", [*dataset.selections])
        remember_splits(dataset)
        _restore_records(dataset)
    records.mark_unfinished(folder)


def _restore_records(dataset: PatchDataset) -> None:
    """Write the records of a finished dataset's shards."""
    for record in shard_records(dataset):
        records.write_record(dataset.folder, record)


def shard_records(dataset: PatchDataset) -> Iterator[ShardRecord]:
    """The records of a finished dataset's shards, from its index."""
    index, names = dataset.index, list(dataset.schema.names)
    extra = extra_columns(dataset)
    for shard in dataset.info["shards"]:
        mine = index.iloc[dataset.rows_of_shard.get(shard["file"], [])]
        rows = mine[[c for c in ROW_COLUMNS if c in mine]].reset_index(drop=True)
        fields = [
            {name: UNKNOWN_WORD if value != value else str(value) for name, value in row.items()}  # NaN: unknown
            for row in mine[names].to_dict(orient="records")
        ]
        rows["fields"] = [json.dumps(row) for row in fields]
        rows["extra"] = [json.dumps(row) for row in mine[extra].to_dict(orient="records")]
        known_of_shard = (shard["sha256"], shard["count"], shard["bytes"], dataset.info["codec"], dataset.patch_size)
        notes = {WRITTEN_WITH: shard[WRITTEN_WITH]} if WRITTEN_WITH in shard else {}  # earlier versions wrote none
        yield ShardRecord(records.shard_number(shard["file"]), *known_of_shard, shard["made_from"], notes, rows)


def extra_columns(dataset: PatchDataset) -> list[str]:
    """Columns of the index that its writer added and that are no fields."""
    known = {*ROW_COLUMNS, "shard", PICTURE, *dataset.schema.names}
    return [c for c in dataset.index.columns if c not in known and not c.startswith((SPLIT_PREFIX, SELECTED_PREFIX))]
