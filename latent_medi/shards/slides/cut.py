"""Whole slides into a dataset folder: each slide becomes one shard, cut in a process of its own.

A slide that cannot be used is named with its reason and left out; the others are finished. A rerun keeps the slides
that were cut before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.core.errors import Incomplete, UserError
from latent_medi.core.files import read_object, remove
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import duration, get_logger, progress
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.format.layout import SPLIT_PREFIX
from latent_medi.shards.importing.resolution import check_mpp
from latent_medi.shards.importing.workers import dispatch
from latent_medi.shards.settings import SlideSettings, field_columns
from latent_medi.shards.slides import quality_table
from latent_medi.shards.slides.job import SlideJob, run_slide
from latent_medi.shards.slides.list_slides import ListedSlide, list_slides
from latent_medi.shards.slides.quality_table import QC_FOLDER, QC_TABLE
from latent_medi.shards.writing.finish import Description, finish_dataset, finished_dataset
from latent_medi.shards.writing.records import ShardRecord, finished_shards, remove_record, shard_file, write_record
from latent_medi.shards.writing.rewrite import check_changed_patients, reopen_dataset

logger = get_logger(__name__)

Row = dict[str, Any]
"""A row of the quality table."""

_SOURCE = "whole slides"
_COLOURS = {"ignore": "as the scanner delivered them", "srgb": "converted to sRGB by the profile"}
_CUT_SETTINGS = (
    *("patch_size", "mpp", "overlap", "min_tissue", "max_patches", "max_white", "max_black", "min_sharpness"),
    *("icc", "codec", "seed", "max_unreadable"),
)
_ESTIMATE_COLUMNS = ("slide", "status", "kept", "bytes", "estimated_seconds", "mpp_x", "level", "reason")


def cut_slides(settings: SlideSettings) -> dict[str, Any]:
    """Cut patches from slides into a dataset folder, or estimate the result.

    Writes the dataset, ``qc/slides.csv`` (a row per slide: kept, rejected by reason, resolution, level, seconds) and
    ``qc/<slide>.png`` (thumbnail, mask and patches).

    Returns:
        ``folder``, ``patches``, ``slides`` by status, ``left_out``: the reason by slide, and ``reasons``: how many
        slides each kind of reason left out.

    Raises:
        UserError: Settings or table are wrong, no slide gave a patch, or a rerun would lose something in the folder.
        Incomplete: The dataset is finished, without some slides; they are named.
    """
    _check(settings)
    slides, schema = list_slides(settings)
    jobs = [_job(slide, number, settings) for number, slide in enumerate(slide for slide in slides if not slide.fault)]
    faults: list[Row] = [
        {"slide": slide.name, "path": str(slide.path), "status": "quarantined", "reason": slide.fault}
        for slide in slides
        if slide.fault
    ]
    if settings.dry_run:
        return _estimate(jobs, faults, settings)
    with output_lock(settings.out):
        return _write(jobs, faults, schema, settings)


def _check(settings: SlideSettings) -> None:
    problems = []
    if not settings.out and not settings.dry_run:
        problems.append("no dataset folder to write is given (out=…)")
    if not settings.source and not settings.table:
        problems.append("neither a folder nor a table of slides is given (source=… or table=…)")
    if problems:
        raise UserError("The slides cannot be cut: " + "; ".join(problems) + ".")
    check_mpp(settings.mpp, "The resolution of the patches, mpp,")


def _job(slide: ListedSlide, number: int, settings: SlideSettings) -> SlideJob:
    sheet = Path(settings.out, QC_FOLDER, f"{slide.key}.png").resolve() if settings.contact_sheets else ""
    fields = {name: slide.row[name] for name in field_columns(settings)}
    extra = {name: slide.row[name] for name in settings.extra}
    # SHA-256 over what decides the shard. The file counts by size and time: hashing it would take longer than cutting.
    parts = [slide.key, slide.patient, fields, extra, slide.mpp, *(getattr(settings, key) for key in _CUT_SETTINGS)]
    try:
        # A MIRAX slide is an index file and a folder of the same name.
        companions = sorted(slide.path.with_suffix("").glob("*")) if slide.path.suffix.lower() == ".mrxs" else []
        files = [[p.name, (status := p.stat()).st_size, status.st_mtime_ns] for p in (slide.path, *companions)]
    except OSError:
        files = []
    known = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    token = f"{known}-{hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else ''}"
    folder = str(Path(settings.out).resolve())
    path = os.path.realpath(slide.path)
    return SlideJob(
        path, slide.key, slide.patient, settings, fields, extra, slide.mpp, folder, number, token, str(sheet)
    )


def _dispatch(jobs: list[SlideJob], settings: SlideSettings) -> Iterable[Row]:
    """A row per job, in order."""
    # Threads suffice here, since each job is a process of its own.
    return dispatch(run_slide, [(job,) for job in jobs], settings.jobs, settings.dask, "threading")


def _write(jobs: list[SlideJob], faults: list[Row], schema: Schema, settings: SlideSettings) -> dict[str, Any]:
    out = Path(settings.out)
    about = Description(settings.name or out.name, schema, settings.patch_size, settings.mpp, settings.codec)
    table = out / QC_TABLE
    before = quality_table.read_quality(table)
    dataset: PatchDataset | None = None
    if (out / INFO_FILE).is_file():
        _check_out(out, jobs)
        dataset = finished_dataset(out, about, [job.token for job in jobs])
        same = dataset and quality_table.reasons_by_slide(faults) == dataset.info["provenance"].get("left_out")
        if not same or any(before.get(job.key, {}).get("status") != "kept" for job in jobs):
            dataset = None
            reopen_dataset(out)  # to add slides, or to try again those that were left out
    if dataset is not None:
        rows = [dict(before[job.key]) for job in jobs]
    else:
        rows = _cut(jobs, before, settings, out)
        quality_table.write_quality(rows + faults, table)
        kept_numbers = [job.number for job, row in zip(jobs, rows, strict=True) if row["status"] == "kept"]
        if not kept_numbers:
            reasons = quality_table.reasons_text(rows + faults)
            raise UserError(f"None of the {len(jobs) + len(faults)} slides gave a patch:\n  {reasons}", f"See {table}.")
        provenance = {
            "source": _SOURCE,
            "cut": {key: getattr(settings, key) for key in _CUT_SETTINGS},
            "colours": _COLOURS[settings.icc],
            "left_out": quality_table.reasons_by_slide(rows + faults),
        }
        dataset = finish_dataset(out, dataclasses.replace(about, provenance=provenance), kept_numbers)
    _complete(dataset, jobs, rows, settings)
    if rows != [before.get(job.key) for job in jobs]:
        quality_table.write_quality(rows + faults, table)
    for leftover in (out / QC_FOLDER).glob(".tmp-*"):  # of a run that was killed
        remove(leftover)
    return _result(dataset, rows + faults)


def _check_out(out: Path, jobs: list[SlideJob]) -> None:
    """Refuse to replace a dataset that did not come from slides, or to drop a split.

    Raises:
        UserError: That would happen.
    """
    info = read_object(out / INFO_FILE)
    provenance = info.get("provenance")
    if not isinstance(provenance, dict) or provenance.get("source") != _SOURCE:
        problem = f"{out} holds another dataset, {info.get('name')!r}, which was not cut from slides."
        raise UserError(problem, "Write to another folder, or remove this one first.")
    try:
        dataset = PatchDataset.open(out)
    except UserError as error:
        if splits := ", ".join(info.get("splits", ())):
            hint = f"Restore the file, or remove {out / INFO_FILE} to do without them."
            raise UserError(f"{error.message} To cut again would drop its splits ({splits}).", hint) from None
        return
    patients = {job.patient for job in jobs}
    for split in dataset.splits:
        had = set(dataset.index.loc[dataset.index[SPLIT_PREFIX + split] != "", "patient"])
        if had and not had & patients:
            problem = f"{out} has the split {split!r}, and no patient of it is among the slides."
            raise UserError(problem, "Write to another folder.")
        if gone := sorted(had - patients):
            logger.warning("%d patients of the split %r have no slide now, such as %s", len(gone), split, gone[0])
    if dataset.splits:
        fields = [(job.patient, job.fields) for job in jobs]
        check_changed_patients(dataset, dataset.splits, fields, "Write to another folder.")


def _cut(jobs: list[SlideJob], before: Mapping[str, Row], settings: SlideSettings, out: Path) -> list[Row]:
    """Cut the slides that were not cut before; a row of the quality table per job.

    Raises:
        UserError: Cutting cannot continue, such as on a full disk.
    """
    rows: dict[int, Row] = {}
    for number, record in _kept(out, jobs).items():
        known = record.notes.get("row") or before.get(jobs[number].key, {})
        if known.get("status") == "kept":
            rows[number] = {**known, "path": jobs[number].path}
    todo = [job for job in jobs if job.number not in rows]
    if rows:
        logger.info("%d of %d slides were cut before", len(rows), len(jobs))
    for job, row in zip(todo, progress(_dispatch(todo, settings), len(todo), "cutting slides", "slides"), strict=True):
        if row["status"] == "failed":
            hint = "The finished slides are kept: solve the problem and run the same command again."
            raise UserError(f"{job.path}: {row['reason']}.", hint)
        rows[job.number] = row
        if row["status"] != "kept":
            logger.warning("%s: %s: %s", job.path, row["status"], row["reason"])
    return [rows[job.number] for job in jobs]


def _complete(dataset: PatchDataset, jobs: list[SlideJob], rows: list[Row], settings: SlideSettings) -> None:
    """Add to the rows what an interrupted run left open: sizes in bytes, and missing contact sheets."""
    sizes = {shard["file"]: shard["bytes"] for shard in dataset.info["shards"]}
    kept = {job.number: row for job, row in zip(jobs, rows, strict=True) if row["status"] == "kept"}
    for number, row in kept.items():
        if str(row.get("bytes")) != str(size := sizes[shard_file(number)]):
            row["bytes"] = size
    missing = [job for job in jobs if job.number in kept and job.sheet and not Path(job.sheet).is_file()]
    if not missing:
        return
    logger.info("drawing %d missing contact sheets", len(missing))
    corners = {slide: part.to_numpy().tolist() for slide, part in dataset.index.groupby("slide")[["x", "y"]]}
    drawing = [dataclasses.replace(job, corners=corners[job.key]) for job in missing]
    for job, drawn in zip(missing, _dispatch(drawing, settings), strict=True):
        row = kept[job.number]
        row["reason"] = drawn["reason"] if drawn["status"] == "drawn" else f"no contact sheet: {drawn['reason']}"
        if row["reason"]:
            logger.warning("%s: %s", job.path, row["reason"])
        row["seconds"] = row.get("seconds") or drawn["seconds"]


def _kept(out: Path, jobs: list[SlideJob]) -> dict[int, ShardRecord]:
    """Shards that need not be cut again, by the number of their job; tars are renamed where the order has changed.

    A slide whose file cannot be reached keeps its shard if all else is the same.
    """
    finished = finished_shards(out)
    by_token = {record.token: record for record in finished.values()}
    by_known = {record.token.partition("-")[0]: record for record in finished.values()}
    kept: dict[int, ShardRecord] = {}
    for job in jobs:
        record = by_token.get(job.token)
        if record is None and job.token.endswith("-"):
            record = by_known.get(job.token[:-1])
            if record is not None:
                logger.warning("%s is out of reach; what was cut from it before is kept", job.path)
                job.token = record.token
        if record is not None:
            kept[job.number] = record
    moved = {number: record for number, record in kept.items() if record.number != number}
    for record in moved.values():
        os.replace(out / shard_file(record.number), out / "data" / f".tmp-move-{record.number}.tar")
        remove_record(out, record.number)
    for number, record in moved.items():
        os.replace(out / "data" / f".tmp-move-{record.number}.tar", out / shard_file(number))
        kept[number] = dataclasses.replace(record, number=number)
        write_record(out, kept[number])
    return kept


def _result(dataset: PatchDataset, rows: list[Row]) -> dict[str, Any]:
    """Print and return the outcome; raises :class:`Incomplete` if slides were left out."""
    by_status = pd.Series([row["status"] for row in rows]).value_counts()
    bad = quality_table.bad_rows(rows)
    result = {
        "folder": str(dataset.folder),
        "patches": len(dataset),
        "slides": {str(status): int(count) for status, count in by_status.items()},
        "left_out": {row["slide"]: f"{row['status']}: {row['reason']}" for row in bad},
        "reasons": quality_table.count_by_reason(rows),
    }
    slides = counted(by_status.get("kept", 0), "slide")
    print(f"{counted(len(dataset), 'patch')} of {slides} in {dataset.folder}; see {QC_TABLE} there")
    if bad:
        reasons = quality_table.reasons_text(rows)
        raise Incomplete(f"{len(bad)} of {len(rows)} slides were left out:\n  {reasons}", result)
    return result


def _estimate(jobs: list[SlideJob], faults: list[Row], settings: SlideSettings) -> dict[str, Any]:
    rows = [*progress(_dispatch(jobs, settings), len(jobs), "estimating", "slides"), *faults]
    good = [row for row in rows if row["status"] == "estimated"]
    patches, size = (sum(int(row[key]) for row in good) for key in ("kept", "bytes"))
    seconds = sum(float(row["estimated_seconds"]) for row in good) / max(settings.jobs, 1)
    print(pd.DataFrame([{c: row.get(c, "") for c in _ESTIMATE_COLUMNS} for row in rows]).to_string(index=False))
    text = f"about {counted(patches, 'patch')}, {size / 2**20:,.0f} MiB, {duration(seconds)} with"
    print(f"{text} {counted(settings.jobs, 'job')}; nothing was written")
    result = {"patches": patches, "bytes": size, "seconds": round(seconds, 1), "slides": rows}
    if bad := len(rows) - len(good):
        reasons = quality_table.reasons_text(rows)
        raise Incomplete(f"{bad} of {len(rows)} slides would be left out:\n  {reasons}", result)
    return result
