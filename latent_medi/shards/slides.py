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
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.errors import Incomplete, UserError
from latent_medi.files import read_json, remove
from latent_medi.locks import output_lock
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tables import read_table, require_columns, settings_of_columns, write_table
from latent_medi.metadata.tcga import is_tcga, parse_barcode, slide_key
from latent_medi.progress import duration, get_logger, progress
from latent_medi.shards.codec import check_codec
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.dispatch import dispatch
from latent_medi.shards.patch import check_column, check_key
from latent_medi.shards.records import ShardRecord, finished_shards, remove_record, shard_file, write_record
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slide import find_slides
from latent_medi.shards.slide_job import SlideJob, write_job
from latent_medi.shards.writer import finish_dataset, finished_dataset, reopen_dataset

logger = get_logger(__name__)

QC_FOLDER = "qc"
QC_TABLE = "qc/slides.csv"
QC_COLUMNS = (
    "slide", "status", "reason", "kept", "candidates", "rejected_tissue", "rejected_white", "rejected_black",
    "rejected_blur", "rejected_unreadable", "mpp_x", "mpp_y", "mpp_from", "level", "downsample", "width", "height",
    "icc_profile", "bytes", "seconds", "path",
)  # fmt: skip
_JOB_SETTINGS = (
    "patch_size", "mpp", "overlap", "min_tissue", "max_patches", "max_white", "max_black", "min_sharpness", "icc",
    "codec", "seed", "max_unreadable",
)  # fmt: skip


def cut_slides(settings: SlideSettings) -> dict[str, Any]:
    """Cut patches from slides into a dataset folder, or estimate what that would give.

    Writes the dataset, ``qc/slides.csv`` (a row per slide: kept, rejected by reason, resolution, level, seconds) and
    ``qc/<slide>.png`` (thumbnail, mask and patches).

    Returns:
        ``folder``, ``patches``, ``slides`` by status, and ``left_out``: the reason by slide.

    Raises:
        UserError: Settings or table cannot be followed, no slide gave a patch, or another job writes the folder.
        Incomplete: The dataset is finished, without some slides; they are named.
    """
    _check(settings)
    if settings.dry_run:
        return _estimate(_jobs(settings)[0], settings)
    with output_lock(settings.out):
        return _cut(settings)


def _cut(settings: SlideSettings) -> dict[str, Any]:
    jobs, schema = _jobs(settings)
    out = Path(settings.out)
    name = settings.name or out.name
    expected = {"name": name, "schema": schema.to_dict(), "patch_size": settings.patch_size, "codec": settings.codec}
    table = out / QC_TABLE
    before = {row["slide"]: row for row in read_table(table).to_dict(orient="records")} if table.is_file() else {}
    if (out / INFO_FILE).is_file():
        whole = finished_dataset(out, expected | {"mpp": settings.mpp}, [job.token for job in jobs])
        if whole and all(job.key in before for job in jobs):
            return _told(whole, [before[job.key] for job in jobs])
        reopen_dataset(out)  # to add slides, or to try those again that were left out
    done = _kept(out, jobs)
    rows = {number: dict(record.notes.get("row") or before[jobs[number].key]) for number, record in done.items()
            if "row" in record.notes or jobs[number].key in before}  # fmt: skip
    done = {number: record for number, record in done.items() if number in rows}
    todo = [job for job in jobs if job.number not in done]
    if done:
        logger.info("%d of %d slides were cut before", len(done), len(jobs))
    for job, row in zip(todo, progress(_dispatch(todo, settings), len(todo), "cutting slides", "slide"), strict=True):
        if row["status"] == "failed":
            raise UserError(
                f"{job.path}: {row['reason']}.", "What was finished is kept: mend it and run the same command again."
            )
        rows[job.number] = row
        if row["status"] != "kept":
            logger.warning("%s: %s: %s", job.path, row["status"], row["reason"])
    ordered = [rows[job.number] for job in jobs]
    _write_qc(ordered, table)
    kept_numbers = [job.number for job in jobs if rows[job.number]["status"] == "kept"]
    if not kept_numbers:
        raise UserError(f"None of the {len(jobs)} slides gave a patch:\n  " + _reasons(ordered), f"See {table}.")
    provenance = {
        "source": "whole slides",
        "cut": {key: getattr(settings, key) for key in _JOB_SETTINGS},
        "colours": "as the scanner delivered them" if settings.icc == "ignore" else "converted to sRGB by the profile",
        "left_out": {row["slide"]: row["reason"] for row in ordered if row["status"] != "kept"},
    }
    dataset = finish_dataset(
        out, name, schema, settings.patch_size, settings.mpp, settings.codec, provenance, shards=kept_numbers
    )
    return _told(dataset, ordered)


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
    left_out = {row["slide"]: f"{row['status']}: {row['reason']}" for row in rows if row["status"] != "kept"}
    result = {
        "folder": str(dataset.folder),
        "patches": len(dataset),
        "slides": {str(status): int(count) for status, count in by_status.items()},
        "left_out": left_out,
    }
    print(f"{len(dataset)} patches of {by_status.get('kept', 0)} slides in {dataset.folder}; {QC_TABLE} tells of each")
    if left_out:
        raise Incomplete(
            f"{len(left_out)} of {len(rows)} slides were left out:\n  " + _reasons(rows), result
        )  # fmt: skip
    return result


def _reasons(rows: Iterable[Mapping[str, Any]], most: int = 20) -> str:
    bad = [
        f"{row['path']}: {row['status']}: {row['reason']}" for row in rows if row["status"] not in ("kept", "estimated")
    ]
    return "\n  ".join(bad[:most] + ([f"… and {len(bad) - most} more"] if len(bad) > most else []))


def _write_qc(rows: list[dict[str, Any]], path: Path) -> None:
    write_table(pd.DataFrame([{column: row.get(column, "") for column in QC_COLUMNS} for row in rows]), path)


def _estimate(jobs: list[SlideJob], settings: SlideSettings) -> dict[str, Any]:
    rows = list(progress(_dispatch(jobs, settings), len(jobs), "estimating", "slide"))
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
            f"{len(rows) - len(good)} of {len(rows)} slides would be left out:\n  {_reasons(rows)}", result
        )
    return result


def _check(settings: SlideSettings) -> None:
    check_codec(settings.codec)
    problems = []
    if not settings.out and not settings.dry_run:
        problems.append("no dataset folder to write is given (out=…)")
    if not settings.source and not settings.table:
        problems.append("neither a folder nor a table of slides is given (source=… or table=…)")
    if settings.patch_size < 1 or settings.jobs < 1 or settings.max_patches < 0:
        problems.append("patch_size and jobs are at least 1, max_patches at least 0")
    if not (settings.mpp > 0 and settings.timeout > 0 and 0 <= settings.overlap < 1):
        problems.append("mpp and timeout are above 0, overlap is from 0 to below 1")
    for name in ("min_tissue", "max_white", "max_black", "max_unreadable"):
        if not 0 <= getattr(settings, name) <= 1:
            problems.append(f"{name} is a share from 0 to 1, not {getattr(settings, name)}")
    if settings.min_sharpness < 0 or settings.memory < 0:
        problems.append("min_sharpness and memory are not negative")
    if problems:
        raise UserError("The slides cannot be cut: " + "; ".join(problems) + ".")


def _jobs(settings: SlideSettings) -> tuple[list[SlideJob], Schema]:
    """A job per slide in the order of the table (or of the paths), and the schema of their fields."""
    root = Path(settings.source) if settings.source else Path(settings.table).parent
    fields = [*([settings.class_field] if settings.class_field else []), *settings.categorical, *settings.continuous]
    for column in (*fields, *settings.extra):
        check_column(column)
    if settings.table:
        table = read_table(settings.table)
        require_columns(
            table, [settings.slide_column, settings.patient_column, *fields, *settings.extra],
            f"The table of slides {settings.table}",
            settings_of_columns(
                settings, "slide_column", "patient_column", "class_field", "categorical", "continuous", "extra"
            ),
        )  # fmt: skip
        schema = Schema.from_table(
            table, settings.class_field or None, settings.categorical, settings.continuous, settings.units
        )
        rows = table.to_dict(orient="records")
        if not rows:
            raise UserError(f"The table of slides {settings.table} has no row.")
        named = [(root / row[settings.slide_column], row[settings.patient_column], row) for row in rows]
    else:
        if fields or settings.extra:
            raise UserError(f"Fields {[*fields, *settings.extra]} are asked for, but no table is given.", "table=…")
        schema = Schema()
        named = [(path, "", {}) for path in find_slides(root)]
    overrides = _overrides(settings.mpp_table)
    used: set[str] = set()
    jobs: list[SlideJob] = []
    keys: dict[str, Path] = {}
    common = {key: getattr(settings, key) for key in _JOB_SETTINGS}
    for number, (path, patient, row) in enumerate(named):
        key = _key(path)
        if key in keys:
            raise UserError(f"{path} and {keys[key]} would both have the key {key!r}.", "Rename one of the files.")
        keys[key] = path
        if not settings.table:
            patient = parse_barcode(path.name).patient if is_tcga([path.name]) else key
        if is_missing(patient):  # with a table never the slide's name: two slides of one person would become two people
            raise UserError(f"{path} has no patient.", "Without patients no honest split is possible; fill the column.")
        override = next(
            (
                name
                for name in (path.name, path.stem, key, str(row.get(settings.slide_column, "")))
                if name in overrides
            ),
            "",
        )
        used.add(override)
        job = SlideJob(
            str(path.resolve()), key, str(patient), fields={name: row[name] for name in fields},
            extra={name: row[name] for name in settings.extra}, mpp_override=overrides.get(override),
            folder=str(Path(settings.out).resolve()), number=number, memory=settings.memory, dry_run=settings.dry_run,
            sheet=str(Path(settings.out, QC_FOLDER, f"{key}.png").resolve()) if settings.contact_sheets else "",
            **common,
        )  # fmt: skip
        job.token = _token(job, path)
        jobs.append(job)
    if unused := sorted(set(overrides) - used):
        raise UserError(f"{settings.mpp_table} names slides that are not there: {unused[:5]}.", "Correct the names.")
    return jobs, schema


def _key(path: Path) -> str:
    key = slide_key(path.name) if is_tcga([path.name]) else path.stem.replace(".", "-")
    check_key(key)
    return key


def _overrides(path: str) -> dict[str, float]:
    if not path:
        return {}
    table = read_table(path)
    require_columns(table, ["slide", "mpp"], f"The table of resolutions {path}")
    found: dict[str, float] = {}
    for name, text in zip(table["slide"], table["mpp"], strict=True):
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] < 1000:
            raise UserError(
                f"{path}: the resolution of {name!r} is {text!r}; it is a number of µm per pixel > 0.",
                "Write a point for a decimal comma.",
            )
    return found


def _token(job: SlideJob, path: Path) -> str:
    """SHA-256 over what decides the shard: settings, metadata, and the file by size and time, as hashing slides would
    take longer than cutting them.
    """
    parts = [job.key, job.patient, job.fields, job.extra, job.mpp_override]
    parts += [getattr(job, key) for key in _JOB_SETTINGS]
    # A MIRAX slide is an index file and a folder of the same name.
    companions = sorted(path.with_suffix("").glob("*")) if path.suffix.lower() == ".mrxs" else []
    try:
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
            [sys.executable, "-m", "latent_medi.shards.slide_job", str(path), str(os.getpid())],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
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
