"""Whole slides into a dataset folder, a killable process per slide, dispatched by joblib here or by Dask elsewhere.

A slide that cannot be used is named with its reason and left out; the others are finished. Each slide becomes one
shard, so a rerun keeps the slides that were done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import Incomplete, UserError
from latent_medi.core.files import read_json, read_object, remove
from latent_medi.core.locks import output_lock
from latent_medi.core.processes import environment, python_words
from latent_medi.core.progress import duration, get_logger, progress
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.verify import SPLIT_PREFIX
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.importing.resolution import check_mpp
from latent_medi.shards.importing.workers import dispatch
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.job import SlideJob, write_job
from latent_medi.shards.slides.list_slides import Listed, list_slides
from latent_medi.shards.slides.quality_table import (
    QC_FOLDER,
    QC_TABLE,
    bad_rows,
    count_by_reason,
    read_quality,
    reasons_by_slide,
    told_reasons,
    write_quality,
)
from latent_medi.shards.writing.records import ShardRecord, finished_shards, remove_record, shard_file, write_record
from latent_medi.shards.writing.rewrite import changed_patients, reopen_dataset
from latent_medi.shards.writing.writer import finish_dataset, finished_dataset

logger = get_logger(__name__)

_SOURCE = "whole slides"
_AS_SCANNED = "as the scanner delivered them"
_JOB_SETTINGS = (
    "patch_size", "mpp", "overlap", "min_tissue", "max_patches", "max_white", "max_black", "min_sharpness", "icc",
    "codec", "seed", "max_unreadable",
)  # fmt: skip


def cut_slides(settings: SlideSettings) -> dict[str, Any]:
    """Cut patches from slides into a dataset folder, or estimate what that would give.

    Writes the dataset, ``qc/slides.csv`` (a row per slide: kept, rejected by reason, resolution, level, seconds) and
    ``qc/<slide>.png`` (thumbnail, mask and patches).

    Returns:
        ``folder``, ``patches``, ``slides`` by status, ``left_out``: the reason by slide, and ``reasons``: how many
        slides each kind of reason left out.

    Raises:
        UserError: Settings or table cannot be followed, no slide gave a patch, or the folder holds what a rerun would
            drop.
        Incomplete: The dataset is finished, without some slides; they are named.
    """
    _check(settings)
    slides, schema = list_slides(settings)
    jobs = _jobs([slide for slide in slides if not slide.fault], settings)
    faults: list[dict[str, Any]] = [
        {"slide": slide.name, "path": str(slide.path), "status": "quarantined", "reason": slide.fault}
        for slide in slides
        if slide.fault
    ]
    if settings.dry_run:
        return _estimate(jobs, faults, settings)
    with output_lock(settings.out):
        return _write(jobs, faults, schema, settings)


def _write(
    jobs: list[SlideJob], faults: list[dict[str, Any]], schema: Schema, settings: SlideSettings
) -> dict[str, Any]:
    out = Path(settings.out)
    name = settings.name or out.name
    expected = {"name": name, "schema": schema.to_dict(), "patch_size": settings.patch_size, "codec": settings.codec}
    table = out / QC_TABLE
    before = read_quality(table)
    dataset: PatchDataset | None = None
    if (out / INFO_FILE).is_file():
        _check_out(out, jobs)
        dataset = finished_dataset(out, expected | {"mpp": settings.mpp}, [job.token for job in jobs])
        if dataset and not (
            reasons_by_slide(faults) == dataset.info["provenance"].get("left_out") and _known(jobs, before)
        ):
            dataset = None
        if dataset is None:
            reopen_dataset(out)  # to add slides, or to try those again that were left out
    if dataset is not None:
        rows = [dict(before[job.key]) for job in jobs]
    else:
        rows = _cut(jobs, before, settings, out)
        write_quality(rows + faults, table)
        kept_numbers = [job.number for job, row in zip(jobs, rows, strict=True) if row["status"] == "kept"]
        if not kept_numbers:
            raise UserError(
                f"None of the {len(jobs) + len(faults)} slides gave a patch:\n  " + told_reasons(rows + faults),
                f"See {table}.",
            )
        provenance = {
            "source": _SOURCE,
            "cut": {key: getattr(settings, key) for key in _JOB_SETTINGS},
            "colours": _AS_SCANNED if settings.icc == "ignore" else "converted to sRGB by the profile",
            "left_out": reasons_by_slide(rows + faults),
        }
        dataset = finish_dataset(
            out, name, schema, settings.patch_size, settings.mpp, settings.codec, provenance, shards=kept_numbers
        )
    _complete(dataset, jobs, rows, settings)
    if rows != [before.get(job.key) for job in jobs]:
        write_quality(rows + faults, table)
    for leftover in (out / QC_FOLDER).glob(".tmp-*"):  # of a run that was killed
        remove(leftover)
    return _told(dataset, rows + faults)


def _check_out(out: Path, jobs: list[SlideJob]) -> None:
    """Refuse to replace a dataset that did not come from slides, or to drop a split.

    Raises:
        UserError: That would happen.
    """
    info = read_object(out / INFO_FILE)
    provenance = info.get("provenance")
    if not isinstance(provenance, dict) or provenance.get("source") != _SOURCE:
        raise UserError(
            f"{out} holds another dataset, {info.get('name')!r}, which was not cut from slides.",
            "Write to another folder, or remove this one first.",
        )
    try:
        dataset = PatchDataset.open(out)
    except UserError as error:
        if info.get("splits"):
            raise UserError(
                f"{error.message} To cut again would drop its splits ({', '.join(info['splits'])}).",
                f"Restore the file, or remove {out / INFO_FILE} to do without them.",
            ) from None
        return
    patients = {job.patient for job in jobs}
    for split in dataset.splits:
        had = set(dataset.index.loc[dataset.index[SPLIT_PREFIX + split] != "", "patient"])
        if had and not had & patients:
            raise UserError(
                f"{out} has the split {split!r}, and no patient of it is among the slides.", "Write to another folder."
            )
        if gone := sorted(had - patients):
            logger.warning("%d patients of the split %r have no slide now, such as %s", len(gone), split, gone[0])
    if dataset.splits and (changed := changed_patients(dataset, [(job.patient, job.fields) for job in jobs])):
        raise UserError(
            f"{out} has the splits {', '.join(dataset.splits)}, which may rest on fields that have changed since: "
            f"those of {len(changed)} patients, such as {changed[0]}.",
            "Write to another folder, and make the splits again.",
        )


def _known(jobs: list[SlideJob], before: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(before.get(job.key, {}).get("status") == "kept" for job in jobs)


def _cut(
    jobs: list[SlideJob], before: Mapping[str, Mapping[str, Any]], settings: SlideSettings, out: Path
) -> list[dict[str, Any]]:
    """Cut the slides that are not cut yet; a row of the quality table per job.

    Raises:
        UserError: It cannot go on, such as on a full disk.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, record in _kept(out, jobs).items():
        known = record.notes.get("row") or before.get(jobs[number].key, {})
        if known.get("status") == "kept":
            rows[number] = {**known, "path": jobs[number].path}
    todo = [job for job in jobs if job.number not in rows]
    if rows:
        logger.info("%d of %d slides were cut before", len(rows), len(jobs))
    for job, row in zip(todo, progress(_dispatch(todo, settings), len(todo), "cutting slides", "slide"), strict=True):
        if row["status"] == "failed":
            raise UserError(
                f"{job.path}: {row['reason']}.", "What was finished is kept: mend it and run the same command again."
            )
        rows[job.number] = row
        if row["status"] != "kept":
            logger.warning("%s: %s: %s", job.path, row["status"], row["reason"])
    return [rows[job.number] for job in jobs]


def _complete(dataset: PatchDataset, jobs: list[SlideJob], rows: list[dict[str, Any]], settings: SlideSettings) -> None:
    """Give the rows what a run that was cut off left open: bytes, and contact sheets that are not there."""
    sizes = {shard["file"]: shard["bytes"] for shard in dataset.info["shards"]}
    kept = {job.number: row for job, row in zip(jobs, rows, strict=True) if row["status"] == "kept"}
    for number, row in kept.items():
        if str(row.get("bytes")) != str(size := sizes[shard_file(number)]):
            row["bytes"] = size
    bare = [job for job in jobs if job.number in kept and job.sheet and not Path(job.sheet).is_file()]
    if not bare:
        return
    logger.info("drawing %d contact sheets that are not there", len(bare))
    corners = {slide: part.to_numpy().tolist() for slide, part in dataset.index.groupby("slide")[["x", "y"]]}
    for job, drawn in zip(
        bare, _dispatch([dataclasses.replace(job, corners=corners[job.key]) for job in bare], settings), strict=True
    ):
        row = kept[job.number]
        row["reason"] = drawn["reason"] if drawn["status"] == "drawn" else f"no contact sheet: {drawn['reason']}"
        if row["reason"]:
            logger.warning("%s: %s", job.path, row["reason"])
        row["seconds"] = row.get("seconds") or drawn["seconds"]


def _kept(out: Path, jobs: list[SlideJob]) -> dict[int, ShardRecord]:
    """Shards that need not be cut again, by the number of their job; tars are renamed where the order has changed.

    A slide whose file is out of reach keeps its shard if all else is the same.
    """
    there = finished_shards(out)
    by_token = {record.token: record for record in there.values()}
    by_known = {record.token.partition("-")[0]: record for record in there.values()}
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


def _told(dataset: PatchDataset, rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_status = pd.Series([row["status"] for row in rows]).value_counts()
    result = {
        "folder": str(dataset.folder),
        "patches": len(dataset),
        "slides": {str(status): int(count) for status, count in by_status.items()},
        "left_out": {row["slide"]: f"{row['status']}: {row['reason']}" for row in bad_rows(rows)},
        "reasons": count_by_reason(rows),
    }
    print(f"{len(dataset)} patches of {by_status.get('kept', 0)} slides in {dataset.folder}; {QC_TABLE} tells of each")
    if bad := bad_rows(rows):
        raise Incomplete(f"{len(bad)} of {len(rows)} slides were left out:\n  " + told_reasons(rows), result)
    return result


def _estimate(jobs: list[SlideJob], faults: list[dict[str, Any]], settings: SlideSettings) -> dict[str, Any]:
    rows = [*progress(_dispatch(jobs, settings), len(jobs), "estimating", "slide"), *faults]
    good = [row for row in rows if row["status"] == "estimated"]
    patches, size = (sum(int(row[key]) for row in good) for key in ("kept", "bytes"))
    seconds = sum(float(row["estimated_seconds"]) for row in good) / max(settings.jobs, 1)
    columns = ["slide", "status", "kept", "bytes", "estimated_seconds", "mpp_x", "level", "reason"]
    print(pd.DataFrame([{c: row.get(c, "") for c in columns} for row in rows]).to_string(index=False))
    print(
        f"about {patches:,} patches, {size / 2**20:,.0f} MiB, {duration(seconds)} with {settings.jobs} jobs; "
        "nothing was written"
    )
    result = {"patches": patches, "bytes": size, "seconds": round(seconds, 1), "slides": rows}
    if len(good) < len(rows):
        raise Incomplete(
            f"{len(rows) - len(good)} of {len(rows)} slides would be left out:\n  {told_reasons(rows)}", result
        )
    return result


def _check(settings: SlideSettings) -> None:
    problems = []
    if not settings.out and not settings.dry_run:
        problems.append("no dataset folder to write is given (out=…)")
    if not settings.source and not settings.table:
        problems.append("neither a folder nor a table of slides is given (source=… or table=…)")
    if problems:
        raise UserError("The slides cannot be cut: " + "; ".join(problems) + ".")
    check_mpp(settings.mpp, "The resolution of the patches, mpp,")


def _jobs(slides: list[Listed], settings: SlideSettings) -> list[SlideJob]:
    common = {key: getattr(settings, key) for key in _JOB_SETTINGS}
    fields = [*([settings.class_field] if settings.class_field else []), *settings.categorical, *settings.continuous]
    jobs: list[SlideJob] = []
    for number, slide in enumerate(slides):
        job = SlideJob(
            os.path.realpath(slide.path), slide.key, slide.patient, fields={name: slide.row[name] for name in fields},
            extra={name: slide.row[name] for name in settings.extra}, mpp_override=slide.mpp,
            folder=str(Path(settings.out).resolve()), number=number, memory=settings.memory, dry_run=settings.dry_run,
            sheet=str(Path(settings.out, QC_FOLDER, f"{slide.key}.png").resolve()) if settings.contact_sheets else "",
            **common,
        )  # fmt: skip
        job.token = _token(job, slide.path)
        jobs.append(job)
    return jobs


def _token(job: SlideJob, path: Path) -> str:
    """SHA-256 over what decides the shard: settings, metadata, and the file by size and time, as hashing slides would
    take longer than cutting them.
    """
    parts = [job.key, job.patient, job.fields, job.extra, job.mpp_override]
    parts += [getattr(job, key) for key in _JOB_SETTINGS]
    try:
        # A MIRAX slide is an index file and a folder of the same name.
        companions = sorted(path.with_suffix("").glob("*")) if path.suffix.lower() == ".mrxs" else []
        files = [[p.name, (status := p.stat()).st_size, status.st_mtime_ns] for p in (path, *companions)]
    except OSError:
        files = []
    known = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{known}-{hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else ''}"


def _dispatch(jobs: list[SlideJob], settings: SlideSettings) -> Iterable[dict[str, Any]]:
    """A row per job, in order."""
    # Threads suffice here, since each job is a process of its own.
    return dispatch(run_slide, [(job, settings.timeout) for job in jobs], settings.jobs, settings.dask, "threading")


def run_slide(job: SlideJob, timeout: float) -> dict[str, Any]:
    """Do a job in a process of its own; kill it after ``timeout`` seconds.

    Returns:
        Its row of the quality table; a process that crashed, was killed or took too long quarantines the slide.
    """
    row: dict[str, Any] = {"slide": job.key, "path": job.path, "status": "quarantined"}
    with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
        path = Path(folder) / "job.json"
        write_job(job, path)
        process = subprocess.Popen(
            python_words("latent_medi.shards.slides.job", str(path), str(os.getpid())),
            env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return row | {"reason": f"killed after {timeout:g} s", "seconds": timeout}
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            _remove_leftovers(job, process.pid)
        result = path.with_suffix(".row.json")
        if process.returncode == 0 and result.is_file():
            return read_json(result)
    last = output.strip().splitlines()[-1] if output.strip() else "no message"
    code = process.returncode
    told = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return row | {"reason": f"its process was {told}: {last}" if code < 0 else f"its process {told}: {last}"}


def _remove_leftovers(job: SlideJob, pid: int) -> None:
    """What a killed process left half-written."""
    # This job's names only: on a cluster another host's process may have the same number.
    remove(Path(job.folder) / "data" / f".tmp-{pid}-part-{job.number:06d}.tar")
    remove(Path(job.folder) / QC_FOLDER / f".tmp-{pid}-{job.key}.png")
