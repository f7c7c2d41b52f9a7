"""What a finished dataset holds beside its patches when it is written again: nothing of it goes without a word."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.progress import get_logger
from latent_medi.metadata.fields import UNKNOWN_WORD, is_missing
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.format.layout import PICTURE, ROW_COLUMNS, SPLIT_PREFIX
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.shards.writing.records import PROGRESS_FOLDER, ShardRecord, begin, claim, refuse_others, write_record

logger = get_logger(__name__)

SPLITS_FILE = "splits.json"


def remember_splits(dataset: PatchDataset) -> None:
    """Note the splits of a dataset that is to be written again: :func:`finish_dataset` records them again."""
    splits = {
        name: {"parts": dataset.index.groupby("patient")[SPLIT_PREFIX + name].first().to_dict(), **entry}
        for name, entry in dataset.info["splits"].items()
    }
    write_sealed(dataset.folder / PROGRESS_FOLDER / SPLITS_FILE, splits)


def remembered_splits(folder: Path) -> dict[str, Any]:
    """The splits of the dataset that this folder was before it was reopened."""
    path = folder / PROGRESS_FOLDER / SPLITS_FILE
    return read_sealed(path, f"Remove {path}: the splits in it are lost, make them again.")[0] if path.is_file() else {}


def opened_or_none(folder: Path) -> PatchDataset | None:
    """The dataset in a folder that is to be written; ``None`` if there is none yet, or with a warning a damaged one."""
    if not (folder / INFO_FILE).is_file():
        return None
    try:
        return PatchDataset.open(folder)
    except UserError as error:
        logger.warning("%s Its splits and selections cannot be kept: it is written again without them.", error.message)
        return None


def make_way(out: Path, given: Collection[str], patches: Iterable[tuple[str, Mapping[str, str]]] | None = None) -> None:
    """Make a finished dataset folder one that can be written again, from other patches or settings.

    Its splits are kept by patient: :func:`~latent_medi.shards.writing.writer.finish_dataset` records them again.

    Args:
        out: The folder, or none yet.
        given: Names of the splits that will be recorded anew.
        patches: Patient and fields of every new patch, where they are known.

    Raises:
        UserError: It has selections, which belong to the patches as they are; or a split of patients whose fields have
            changed since; or it holds files of somebody else's. Nothing is removed then.
    """
    refuse_others(out)
    if not (out / INFO_FILE).is_file():
        claim(out)
        return
    hint = f"Write to another folder, or remove {out} first."
    try:
        dataset = PatchDataset.open(out)
    except UserError as error:
        logger.warning("%s cannot be opened (%s): it is written again, and splits it had are lost", out, error.message)
    else:
        if dataset.selections:
            raise UserError(
                f"{out} would be written again, and has the selections {', '.join(dataset.selections)}, which belong "
                "to its patches as they are.",
                hint,
            )
        kept = [name for name in dataset.splits if name not in given]
        if kept and patches is not None and (changed := changed_patients(dataset, patches)):
            raise UserError(
                f"{out} would be written again, and has the splits {', '.join(kept)}, which may rest on fields that "
                f"have changed since: those of {len(changed)} patients, such as {changed[0]}.",
                f"{hint} Then make the splits again.",
            )
        if kept:
            logger.info("%s is written again, and keeps the splits %s", out, ", ".join(kept))
        remember_splits(dataset)
    begin(out)


def changed_patients(dataset: PatchDataset, patches: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Patients who were there before and now have a combination of classes and categories that they did not have.

    Args:
        dataset: What was there before.
        patches: Patient and fields of every new patch, or of every new slide.
    """
    patches = list(patches)
    there = set(patches[0][1]) if patches else set()
    names = [f.name for f in dataset.schema.fields if not f.continuous and f.name in there]
    before: dict[str, set[tuple[str, ...]]] = {}
    for patient, *values in dataset.index[["patient", *names]].drop_duplicates().itertuples(index=False, name=None):
        before.setdefault(patient, set()).add(tuple(values))
    now = {(patient, tuple(_known(fields[name]) for name in names)) for patient, fields in patches}
    return sorted({patient for patient, values in now if patient in before and values not in before[patient]})


def _known(value: str) -> str:
    return UNKNOWN_WORD if is_missing(value) else value


def reopen_dataset(folder: str | Path) -> None:
    """Turn a finished dataset folder back into an unfinished one with all its shards, to add to it or redo some. Its
    splits are remembered, and :func:`finish_dataset` records them again.

    A folder that cannot be opened loses its index only: its shards then have no record and are written again, and a
    warning says why.
    """
    folder = Path(folder)
    dataset = opened_or_none(folder)
    if dataset is not None:
        names = set(dataset.schema.names)
        splits = [c for c in dataset.index.columns if c.startswith((SPLIT_PREFIX, SELECTED_PREFIX))]
        if dataset.selections:
            logger.warning(
                "The selections %s belong to the patches as they were: make them again", [*dataset.selections]
            )
        extra = [c for c in dataset.index.columns if c not in {*ROW_COLUMNS, "shard", PICTURE, *names, *splits}]
        remember_splits(dataset)
        of_shard = dict(list(dataset.index.groupby("shard", sort=False)))
        for shard in dataset.info["shards"]:
            mine = of_shard.get(shard["file"], dataset.index.iloc[:0])
            rows = mine[[c for c in ROW_COLUMNS if c in mine]].reset_index(drop=True)
            fields = mine[list(dataset.schema.names)].to_dict(orient="records")
            unknown = {f.name: UNKNOWN_WORD for f in dataset.schema.fields}
            rows["fields"] = [
                json.dumps({k: unknown[k] if v != v else str(v) for k, v in row.items()}) for row in fields
            ]
            rows["extra"] = [json.dumps(row) for row in mine[extra].to_dict(orient="records")]
            number = int(Path(shard["file"]).stem.removeprefix("part-"))
            record = ShardRecord(
                number, shard["sha256"], shard["count"], shard["bytes"], dataset.info["codec"], dataset.patch_size,
                shard["made_from"], {}, rows,
            )  # fmt: skip
            write_record(folder, record)
    begin(folder)
