"""The work on one slide, in a process of its own that can be killed: ``python -m latent_medi.shards.slides.job JOB``.

The parent writes a JSON file with a :class:`SlideJob` and reads the outcome from another. Whatever a slide does to the
process (a crash inside a codec, memory, a read that never returns), the parent and the other slides continue.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.core.files import NO_SPACE, read_json, remove, write_json
from latent_medi.core.processes import end_with, environment, python_words
from latent_medi.shards.format.codec import encode_image
from latent_medi.shards.format.software import resizer_software
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.cutter import Cutter, SlideJob, shuffled
from latent_medi.shards.slides.quality_table import QC_FOLDER
from latent_medi.shards.slides.slide import Slide, SlideError, SlideSkipped
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.writer import write_shard

_TRIAL = 8  # patches that a dry run reads to estimate bytes and time


def run_slide(job: SlideJob) -> dict[str, Any]:
    """Do a job in a process of its own; kill it after ``settings.timeout`` seconds.

    Returns:
        Its row of the quality table; a process that crashed, was killed or took too long quarantines the slide.
    """
    row: dict[str, Any] = {"slide": job.key, "path": job.path, "status": "quarantined"}
    timeout = job.settings.timeout
    with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
        path = Path(folder) / "job.json"
        write_json(path, dataclasses.asdict(job))
        process = subprocess.Popen(
            python_words("latent_medi.shards.slides.job", str(path), str(os.getpid())),
            env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return row | {"reason": f"killed after {timeout:g} s", "seconds": timeout}
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            # Its half-written files, by this job's names: on a cluster another host's process may have the same number.
            remove(Path(job.folder) / "data" / f".tmp-{process.pid}-part-{job.number:06d}.tar")
            remove(Path(job.folder) / QC_FOLDER / f".tmp-{process.pid}-{job.key}.png")
        result = path.with_suffix(".row.json")
        if process.returncode == 0 and result.is_file():
            return read_json(result)
    last = output.strip().splitlines()[-1] if output.strip() else "no message"
    code = process.returncode
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return row | {"reason": f"its process {ended}: {last}"}


def run(job: SlideJob) -> dict[str, Any]:
    """Cut one slide.

    Returns:
        A row of the quality table: status ("kept", "empty", "skipped", "quarantined"; of a dry run "estimated", of a
        contact sheet alone "drawn"), reason, resolution, level, counts, seconds.
    """
    start = time.monotonic()
    settings = job.settings
    row: dict[str, Any] = {"slide": job.key, "path": job.path, "status": "quarantined", "reason": ""}
    try:
        with Slide(job.path, job.mpp, settings.icc == "srgb") as slide:
            level = slide.level_for(min(settings.mpp / slide.mpp.x, settings.mpp / slide.mpp.y))
            row |= {"mpp_x": slide.mpp.x, "mpp_y": slide.mpp.y, "mpp_from": slide.mpp.source, "level": level}
            row |= {"downsample": slide.downsamples[level], "width": slide.size[0], "height": slide.size[1]}
            row["icc_profile"] = slide.profile is not None
            cutter = Cutter(slide, job)
            row["candidates"] = len(cutter.candidates)
            if job.corners is not None:
                cutter.kept = [(x, y) for x, y in job.corners]
                row |= {"status": "drawn", "reason": cutter.try_sheet()}
            elif settings.dry_run:
                row |= _estimate(cutter, job)
            else:
                _cut(cutter, job, row)
            row |= {f"rejected_{why}": count for why, count in cutter.counts.items()}
    except SlideError as error:
        row |= {"reason": str(error), "status": "skipped" if isinstance(error, SlideSkipped) else "quarantined"}
    except MemoryError:
        row["reason"] = f"it needs more than {settings.memory:g} GiB of memory"
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        row |= {"status": "failed", "reason": "the disk is full"}  # no fault of the slide: the parent stops
    row["seconds"] = round(time.monotonic() - start, 2)
    return row


def _cut(cutter: Cutter, job: SlideJob, row: dict[str, Any]) -> None:
    """Write the shard, if there is a patch, and the contact sheet; add the outcome to the row."""
    patches = cutter.patches()
    first = next(patches, None)
    if first is None:
        row |= {"kept": 0, "status": "empty", "reason": cutter.why_none()}
        cutter.try_sheet()
        return
    notes: dict[str, Any] = {}
    noted = _noting(chain([first], patches), notes, cutter, row)
    record = write_shard(job.folder, job.number, noted, job.settings.codec, job.token, notes, resizer_software())
    row |= {**notes["row"], "bytes": record.size}


def _noting(patches: Iterable[Patch], notes: dict[str, Any], cutter: Cutter, row: dict[str, Any]) -> Iterator[Patch]:
    """The patches; after the last one, the row with all counts is added to the notes of the shard's record.

    The contact sheet is drawn before the shard is renamed: a rerun does not open a slide that has a shard.
    """
    yield from patches
    outcome = {"kept": len(cutter.kept), "status": "kept", "reason": cutter.try_sheet()}
    counts = {f"rejected_{why}": count for why, count in cutter.counts.items()}
    notes["row"] = {**row, **counts, **outcome, "seconds": round(time.monotonic() - cutter.start, 2)}


def _estimate(cutter: Cutter, job: SlideJob) -> dict[str, Any]:
    """Patches, bytes and seconds from a few patches that are read and encoded."""
    trial = cutter.candidates[np.sort(shuffled(len(cutter.candidates), job.settings.seed, job.key)[:_TRIAL])]
    start, sizes = time.monotonic(), []
    for x, y in trial.tolist():
        image = cutter.one(x, y)
        if image is not None:
            sizes.append(len(encode_image(image, job.settings.codec)))
    each = (time.monotonic() - start) / max(len(trial), 1)
    share = len(sizes) / max(len(trial), 1)
    patches = round(min(len(cutter.candidates) * share, job.settings.max_patches or math.inf))
    status, reason = "estimated" if len(trial) else "empty", "" if patches else cutter.why_none()
    size = round(patches * (np.mean(sizes) if sizes else 0))
    seconds = round(patches / share * each, 1) if share else 0.0
    return {"status": status, "reason": reason, "kept": patches, "bytes": size, "estimated_seconds": seconds}


def limit_memory(gib: float) -> None:
    """Let this process allocate at most ``gib`` GiB; beyond it allocations raise :class:`MemoryError`."""
    import resource

    if gib > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))


def main() -> None:
    """Read a job, do it, write its row."""
    path = Path(sys.argv[1])
    values = json.loads(path.read_text(encoding="utf-8"))
    job = SlideJob(**values | {"settings": SlideSettings(**values["settings"])})
    limit_memory(job.settings.memory)
    end_with(int(sys.argv[2]))
    write_json(path.with_suffix(".row.json"), run(job))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
