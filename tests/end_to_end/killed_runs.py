"""Experiments that are killed once in each stage, and then run to their end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cluster_parts import LONGEST, kill, wait_until

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json
from latent_medi.core.processes import PARENT

_IMPORTED = [
    "latent_medi.autoencoder.train",
    "latent_medi.evaluation.evaluate",
    "latent_medi.experiment.run",
    "latent_medi.image_classifier.compare",
    "latent_medi.latent_classifier.train",
    "latent_medi.latents.encode",
    "latent_medi.report.render",
    "latent_medi.sampling.generate",
    "latent_medi.selection.select",
    "latent_medi.training.loop",
    "killed_runs",
]


class Running(Protocol):
    """A command that was started, as of :class:`subprocess.Popen`."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Its exit code once it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code."""

    def kill(self) -> None:
        """Send SIGKILL."""


def end_after_kills(
    start: Callable[[], Running], out: Path, stages: Sequence[str], signs: Mapping[str, Callable[[], object]]
) -> None:
    """Start an experiment once for each stage, kill it and all its commands in that stage, and run it to its end.

    Args:
        start: Starts the experiment; what it prints is appended to the file ``out``.log.
        out: Its folder.
        stages: Its stages.
        signs: By stage, what must be true besides that it has begun, such as that it has written a checkpoint.
    """
    log = out.with_suffix(".log")
    for stage in stages:
        record, sign, now = out / "stages" / f"{stage}.json", signs.get(stage, lambda: True), time.time_ns()

        def under_way() -> bool:
            written = record.is_file() and record.stat().st_mtime_ns > now  # noqa: B023
            # One that is over was too quick for the sign to be seen.
            return written and bool(sign() or read_json(record)["seconds"] is not None)  # noqa: B023

        process = start()
        wait_until(under_way, process, log)
        kill(process)
        print(stage, "broken off" if read_json(record)["seconds"] is None else "killed just after it")
    assert start().wait(timeout=3 * LONGEST) == 0, log.read_text()[-4000:]


class ForkedRun:
    """``latent-medi run`` without its seconds of imports: it is forked from a process that has imported everything, and
    so is each command that it starts, one after the other. A kill finds the same processes.

    Args:
        words: Words after ``latent-medi``.
        log: What it prints is appended to this file.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._process = context.Process(target=_run, args=(list(words), log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code once it has ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it has not ended after {timeout} s"
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _run(words: list[str], log: Path) -> None:
    from latent_medi.experiment import nodes

    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    nodes.run_in_parallel = _one_after_the_other
    os._exit(_ended(words))


def _one_after_the_other(commands: Mapping[str, Sequence[str]], threads: int | None = None) -> None:
    from accelerate.state import AcceleratorState, GradientState

    for name, words in commands.items():
        print(f"[{name}] begins", flush=True)
        parent = os.getpid()
        child = os.fork()
        if not child:
            os.environ[PARENT] = str(parent)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            code = _ended(words)
            print(f"[{name}] took {time.process_time():.1f} s of a processor", flush=True)
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise UserError(f"{name} ended with {code}.")


def _ended(words: Sequence[str]) -> int:
    """Exit code of a command that runs in this process."""
    import traceback

    from latent_medi.cli import main

    try:
        return main(words)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
