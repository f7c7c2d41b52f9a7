"""Several dataset folders as one: shards are linked where nothing in them changes, schemas and splits merged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, remove, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger, progress
from latent_medi.metadata.fields import UNKNOWN_WORD
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.format.layout import PATIENT, SPLIT_PREFIX, SUM_COLUMNS
from latent_medi.shards.format.tar import BLOCK, tar_end, tar_member
from latent_medi.shards.reading.samples import samples
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.writing.corpus import CORPUS, corpus_split
from latent_medi.shards.writing.finish import Description, finish_dataset, finished_dataset
from latent_medi.shards.writing.patch import check_key
from latent_medi.shards.writing.records import (
    PROGRESS_FOLDER,
    ShardRecord,
    kept_shards,
    shard_file,
    start_records,
    write_record,
)
from latent_medi.shards.writing.rewrite import SPLITS_FILE, extra_columns, shard_records, split_by_patient

logger = get_logger(__name__)

_NAMED = ("key", "patient", "slide")
_LEAST_KNOWN = (PATIENT, "slide", "group", "image")
"""What the column of patients can hold; of joined folders the last of these counts."""


@dataclass(frozen=True)
class _Change:
    """What the patches of one folder get in the joined dataset.

    Args:
        prefix: What key, patient and slide begin with.
        fields: The fields that the folder lacks, all unknown.
        extra: The further columns that it lacks, all empty.
    """

    prefix: str = ""
    fields: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def added(self) -> dict[str, str]:
        """The new entries of a JSON member."""
        return {**dict.fromkeys(self.fields, UNKNOWN_WORD), **dict.fromkeys(self.extra, "")}

    def named(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Key, patient and slide of a row or member."""
        return {name: self.prefix + row[name] for name in _NAMED}

    def __bool__(self) -> bool:
        return bool(self.prefix or self.fields or self.extra)


def join(settings: JoinSettings) -> PatchDataset:
    """Write a dataset folder with the patches of several, in their order.

    Schemas are merged (codes of the first folder stay): a field that a folder lacks is unknown there. Splits of the
    same name are one; the patches of a folder that lacks it are in no part. A shard whose patches stay as they are is
    linked, or copied where the file system has no links; otherwise it is written again with the same images. A rerun
    keeps finished shards.

    Args:
        settings: See :class:`~latent_medi.shards.settings.JoinSettings`.

    Raises:
        UserError: The folders differ in patch size, resolution, codec, kind of a field or further columns; they share
            patients or slides (unless ``patients`` and ``slides`` say what these are) or keys; a patient would be in
            two parts of a split; or the output is another finished dataset.
    """
    if not settings.out or len(settings.folders) + bool(settings.without) < 2:
        raise UserError("A folder to write and two or more to join are needed.", "latent-medi shards join OUT A B …")
    out = Path(settings.out)
    if len({Path(path).resolve() for path in [settings.out, *settings.folders]}) < len(settings.folders) + 1:
        raise UserError("A folder is named twice.", "Name each folder once, and a new one to write.")
    if settings.names and len(settings.names) != len(settings.folders):
        raise UserError(f"There are {len(settings.folders)} folders and {len(settings.names)} names.", "One for each.")
    if settings.unlabelled and not settings.without:
        problem = "unlabelled names a part of the `without` folders, and there are none."
        raise UserError(problem, "Give without=…, or leave unlabelled out.")
    datasets = [PatchDataset.open(folder) for folder in settings.folders]
    _check_alike(datasets, settings.any_mpp)
    schema = reduce(Schema.merge, [dataset.schema for dataset in datasets])
    changes = _changes(datasets, schema, settings)
    indexes = [_renamed(dataset.index, change) for dataset, change in zip(datasets, changes, strict=True)]
    _check_names(datasets, indexes, settings)
    index = pd.concat(indexes, ignore_index=True)
    splits = _splits(datasets, index)
    if settings.without:
        splits |= {CORPUS: corpus_split(datasets, [change.prefix for change in changes], index, settings)}
    first = datasets[0]
    drawn = PatchDataset.open(settings.without[0]) if settings.any_mpp and settings.without else first
    description = Description(
        settings.name or out.name,
        schema,
        first.patch_size,
        drawn.info["mpp"],
        first.info["codec"],
        _origin(datasets, _names(datasets, settings)),
        patient_is=max((dataset.patient_is for dataset in datasets), key=_LEAST_KNOWN.index),
    )
    with output_lock(out):
        return _join(out, description, datasets, changes, splits)


def _join(
    out: Path,
    about: Description,
    datasets: Sequence[PatchDataset],
    changes: Sequence[_Change],
    splits: Mapping[str, Mapping[str, Any]],
) -> PatchDataset:
    work = [
        (dataset, change, record)
        for dataset, change in zip(datasets, changes, strict=True)
        for record in shard_records(dataset)
    ]
    tokens = [_token(record, change) for _, change, record in work]
    if (out / INFO_FILE).is_file():
        if whole := finished_dataset(out, about, tokens, same_provenance=True):
            _keep_corpus(whole, splits.get(CORPUS))
            return whole
        problem = f"{out} is a finished dataset of other patches, or damaged."
        raise UserError(problem, "Write to a new folder, or remove this one first.")
    start_records(out)
    kept = kept_shards(out, tokens)
    sizes = [record.count for _, _, record in work]
    shown = progress(work, desc=f"joining {about.name}", unit="patches", each=sizes)
    for number, (dataset, change, record) in enumerate(shown):
        if number not in kept:
            made = _rewrite(out, number, dataset, change, record) if change else _link(out, number, dataset, record)
            write_record(out, replace(made, token=tokens[number]))
    write_sealed(out / PROGRESS_FOLDER / SPLITS_FILE, splits)  # recorded with the index
    for dataset in datasets:
        if dataset.selections:
            logger.warning("%s: the selections %s are not joined", dataset.folder, ", ".join(dataset.selections))
    return finish_dataset(out, about, range(len(work)))


def _keep_corpus(whole: PatchDataset, corpus: Mapping[str, Any] | None) -> None:
    """Add the split of a corpus to a joined dataset that was finished without one.

    Raises:
        UserError: It has one that leaves out other patients.
    """
    if corpus is None:
        return
    column = [corpus["parts"][patient] for patient in whole.index["patient"]]
    if CORPUS not in whole.splits:
        whole.add_split(CORPUS, column, corpus["recipe"])
    elif column != whole.index[SPLIT_PREFIX + CORPUS].tolist():
        raise UserError(
            f"{whole.folder} is finished, and its split {CORPUS!r} leaves out other patients than `without` now does.",
            "Write to a new folder, or remove this one first.",
        )


def _check_alike(datasets: Sequence[PatchDataset], any_mpp: bool) -> None:
    """Refuse folders whose images are of another kind than those of the first."""
    for what in ("patch_size", "codec", *([] if any_mpp else ["mpp"])):
        values = [dataset.info[what] for dataset in datasets]
        if not all(
            value == values[0] or (what == "mpp" and np.isclose(value, values[0], rtol=1e-6)) for value in values
        ):
            listed = ", ".join(f"{value} in {dataset.folder}" for value, dataset in zip(values, datasets, strict=True))
            raise UserError(
                f"Joined folders have one {what.replace('_', ' ')}, not {listed}.", "Make the folders with one setting."
            )


def _changes(datasets: Sequence[PatchDataset], schema: Schema, settings: JoinSettings) -> list[_Change]:
    """What each folder's patches get."""
    folders = [name.replace(".", "-") for name in _names(datasets, settings)]
    separate = settings.patients == "separate"
    if separate and len(set(folders)) < len(folders):
        twice = next(name for name in folders if folders.count(name) > 1)
        raise UserError(f"Two folders are called {twice!r}, which patients would begin with.", "Rename one of them.")
    extras = [extra_columns(dataset) for dataset in datasets]
    texts = {
        column: all(pd.api.types.is_string_dtype(d.index[column]) for d in datasets if column in d.index)
        for column in {column for columns in extras for column in columns}
    }
    changes = []
    for dataset, folder, own in zip(datasets, folders, extras, strict=True):
        if both := sorted(set(own) & set(schema.names)):
            raise UserError(
                f"{both[0]!r} is a field in one folder, and in {dataset.folder} a column that is no field.",
                "Make that folder again with this version.",
            )
        lacking = sorted(set(texts) - set(own))
        if numbers := [column for column in lacking if not texts[column]]:
            raise UserError(f"{dataset.folder} lacks the column {numbers[0]!r}, which has numbers in another folder.")
        fields = tuple(name for name in schema.names if name not in dataset.schema.names)
        if fields:
            logger.warning("%s has no field %s: it is unknown for its patches", dataset.folder, ", ".join(fields))
        changes.append(_Change(f"{folder}/" if separate else "", fields, tuple(lacking)))
    return changes


def _renamed(index: pd.DataFrame, change: _Change) -> pd.DataFrame:
    return index.assign(**{name: change.prefix + index[name] for name in _NAMED}) if change.prefix else index


def _check_names(datasets: Sequence[PatchDataset], indexes: Sequence[pd.DataFrame], settings: JoinSettings) -> None:
    """Refuse shared patients and slides, unless the settings say what they are, and shared keys."""
    hint = "patients=same if they are the same persons; patients=separate puts the folder's name before them."
    checked = {"key": "Use patients=separate, or leave out the folder that holds the same patches."}
    if settings.patients == "refuse":
        checked = {"patient": hint, **checked}
    for name, remedy in checked.items():
        seen: dict[str, Path] = {}
        for dataset, index in zip(datasets, indexes, strict=True):
            values = index[name].unique()
            if shared := [value for value in values if value in seen]:
                problem = f"{seen[shared[0]]} and {dataset.folder} both have the {name} {shared[0]!r}"
                raise UserError(f"{problem} ({len(shared)} shared).", remedy)
            seen |= dict.fromkeys(values, dataset.folder)
    _check_slides(datasets, indexes, settings)
    for key in (str(index["key"].iloc[0]) for index in indexes if len(index)):
        check_key(key)  # a folder's name may not be one


def _check_slides(datasets: Sequence[PatchDataset], indexes: Sequence[pd.DataFrame], settings: JoinSettings) -> None:
    """Refuse a slide's name in several folders: of two patients always, of one unless it is called one slide."""
    seen: dict[str, tuple[str, Path]] = {}
    for dataset, index in zip(datasets, indexes, strict=True):
        own = dict(zip(index["slide"], index["patient"], strict=True))
        shared = [slide for slide in own if slide in seen]
        for slide in shared:
            patient, folder = seen[slide]
            both = f"{folder} and {dataset.folder} both have the slide {slide!r}"
            if patient != own[slide]:
                raise UserError(
                    f"{both}, of the patients {patient!r} and {own[slide]!r}.",
                    "Give the slides of one folder other names, or put the folder's name before all: "
                    "patients=separate.",
                )
            if settings.slides == "refuse" and slide != patient:  # without slides each patient is one
                raise UserError(
                    f"{both} of patient {patient!r} ({len(shared)} shared).",
                    "slides=same if it is one slide, of which each folder has other patches; if not, give the slides "
                    "of one folder other names.",
                )
        seen |= {slide: (patient, dataset.folder) for slide, patient in own.items()}


def _splits(datasets: Sequence[PatchDataset], index: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The splits of all folders, as a dataset that is written again remembers them.

    Raises:
        UserError: A patient is in two parts.
    """
    found = {}
    for name in dict.fromkeys(name for dataset in datasets for name in dataset.splits):
        label = SPLIT_PREFIX + name
        column = index[label].fillna("")
        try:
            assert_patient_disjoint(index.assign(**{label: column}), label)
        except UserError as error:
            raise UserError(error.message, f"Make the split {name!r} again in one of the folders first.") from None
        recipes = [dataset.info["splits"][name]["recipe"] for dataset in datasets if name in dataset.splits]
        one = all(recipe == recipes[0] for recipe in recipes)
        recipe: dict[str, Any] = dict(recipes[0]) if one else {"kind": "joined", "of": recipes}
        if allow := sorted({patient for given in recipes for patient in given.get("allow_duplicates", ())}):
            recipe["allow_duplicates"] = allow
        found[name] = split_by_patient(index, column, recipe)
    return found


def _names(datasets: Sequence[PatchDataset], settings: JoinSettings) -> list[str]:
    return settings.names or [dataset.folder.resolve().name for dataset in datasets]


def _origin(datasets: Sequence[PatchDataset], names: Sequence[str]) -> dict[str, Any]:
    """The provenance: what all folders say alike, and each folder's own."""
    each = [dataset.info["provenance"] for dataset in datasets]
    alike = {name: value for name, value in each[0].items() if all(other.get(name) == value for other in each)}
    licences = sorted({str(given["licence"]) for given in each if given.get("licence")})
    of_folder = [
        {
            "name": d.name,
            "folder": name,
            "patches": len(d),
            "index_sha256": d.info.get("index_sha256", ""),
            "provenance": given,
        }
        for d, name, given in zip(datasets, names, each, strict=True)
    ]
    return alike | ({"licence": "; ".join(licences)} if licences else {}) | {"joined": of_folder}


def _token(record: ShardRecord, change: _Change) -> str:
    """What a joined shard is made from."""
    return hashlib.sha256(
        json.dumps([record.sha256, change.prefix, *change.fields, *change.extra]).encode()
    ).hexdigest()


def _link(out: Path, number: int, dataset: PatchDataset, record: ShardRecord) -> ShardRecord:
    """A shard as it is: linked, so that it takes no space, or copied."""
    source, target = dataset.folder / shard_file(record.number), out / shard_file(number)
    target.parent.mkdir(exist_ok=True)
    remove(target)
    try:
        os.link(source.resolve(), target)  # nobody writes into a shard: a new one takes its place
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return replace(record, number=number)


def _rewrite(out: Path, number: int, dataset: PatchDataset, change: _Change, record: ShardRecord) -> ShardRecord:
    """A shard with the same images and other JSON members."""
    codec, rows = record.codec, record.rows.to_dict(orient="records")
    where = dataset.rows_of_shard[shard_file(record.number)]
    digest, size = hashlib.sha256(), 0
    with atomic_path(out / shard_file(number)) as temporary, open(temporary, "wb") as file:
        for row, (_, image, text) in zip(rows, samples(dataset, where), strict=True):
            member = {**json.loads(text), **change.added}
            member |= change.named(member)
            data = json.dumps(member, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
            row |= {**change.named(row), "offset": size + BLOCK}
            row |= dict(zip(SUM_COLUMNS, (zlib.crc32(image), zlib.crc32(data)), strict=True))
            for column, names, empty in (("fields", change.fields, UNKNOWN_WORD), ("extra", change.extra, "")):
                row[column] = json.dumps({**json.loads(row[column]), **dict.fromkeys(names, empty)})
            for part in (*tar_member(f"{row['key']}.{codec}", image), *tar_member(f"{row['key']}.json", data)):
                file.write(part)
                digest.update(part)
                size += len(part)
        end = tar_end(size)
        file.write(end)
        digest.update(end)
    frame = pd.DataFrame(rows).astype(dict.fromkeys(SUM_COLUMNS, np.uint32))
    return replace(record, number=number, sha256=digest.hexdigest(), size=size + len(end), rows=frame)
