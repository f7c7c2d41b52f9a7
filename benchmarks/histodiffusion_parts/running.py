"""Experiments in processes of their own, several at the same time; what is finished is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from latent_medi.core.files import write_json
from latent_medi.core.processes import PARENT, environment, python_words

from .experiments import Job


def run_jobs(jobs: Sequence[Job], out: Path, at_once: int) -> None:
    """Run experiments that are not finished, several at the same time; what is left is printed after each."""
    waiting = [job for job in jobs if not finished(job, out)]
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    done: list[tuple[float, float]] = []  # seconds expected and taken
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                process = _start(job, out)
                running[process.pid] = job, process, time.monotonic()
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            job, process, start = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log = out / "logs" / f"{job.name}.log"
                sys.exit(f"{job.name} ended with {process.returncode}: {log}\n{log.read_text()[-2000:]}")
            took = {"processor_s": usage.ru_utime + usage.ru_stime, "s": time.monotonic() - start}
            write_json(out / "finished" / f"{job.name}.json", {"settings": job.settings, **took})
            done.append((job.seconds, took["s"]))
            slower = sum(taken for _, taken in done) / sum(expected for expected, _ in done)
            left = sum(job.seconds for job in [*waiting, *(job for job, _, _ in running.values())]) * slower / at_once
            print(f"{job.name}: {took['processor_s']:.0f} s of a processor, {took['s']:.0f} s; ", end="")
            print(f"{len(waiting) + len(running)} left, about {left / 60:.0f} minutes", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()


def finished(job: Job, out: Path) -> bool:
    """Whether an experiment has ended with these settings."""
    file = out / "finished" / f"{job.name}.json"
    return file.is_file() and json.loads(file.read_text())["settings"] == json.loads(json.dumps(job.settings))


def _start(job: Job, out: Path) -> subprocess.Popen[bytes]:
    file, log = out / "experiments" / f"{job.name}.yaml", out / "logs" / f"{job.name}.log"
    for path in (file, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(job.settings), sort_keys=False))
    words = python_words("latent_medi.cli", "run", "--config", str(file))
    alone = environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", **{PARENT: str(os.getpid())})
    with open(log, "ab") as output:
        return subprocess.Popen(words, env=alone, stdout=output, stderr=subprocess.STDOUT)
