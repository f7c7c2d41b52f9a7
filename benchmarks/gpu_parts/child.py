"""One process of a part: runs its rows one after another, and writes each before the next begins."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from gpu_parts import records
from gpu_parts.records import BELOW_GOAL, FAILED, FINISHED, NEEDS_GPU, NOT_HERE, PASSED, RUNNING

BROKEN = 70
"""Exit code of a process whose device is of no more use; the rows left are for a new one."""


class NeedsGpu(Exception):
    """This row means nothing without a GPU."""


class NotHere(Exception):
    """What this row needs is not on this machine."""


class Context:
    """What a row is given, and the figures that it keeps.

    Args:
        job: Of the runner: part, device, quick, out, work, real, models, other, scale, deadline and what every
            record holds.
        row: The row's name.

    Attributes:
        quick: Whether sizes are tiny.
        device: "cuda" or "cpu".
        scale: The budget over that of 540 seconds.
        work: Folder for what a later call can go on with.
        pictures: Folder for what is to be looked at.
    """

    def __init__(self, job: Mapping[str, Any], row: str) -> None:
        self.job, self.row, self.part = job, row, str(job["part"])
        self.quick, self.device = bool(job["quick"]), str(job["device"])
        self.out, self.work = Path(job["out"]), Path(job["work"])
        self.pictures = self.out / self.part
        self.real, self.models, self.other = Path(job["real"]), Path(job["models"]), Path(job["other"])
        self.scale = float(job["scale"])
        self.deadline = float(job["deadline"])
        self.command = ""
        self._started, self._clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        self._figures: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._failures: list[str] = []
        self._missed: list[str] = []
        self._only_gpu = False

    @property
    def gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"

    def seconds_left(self) -> float:
        """Until this process is ended."""
        return self.deadline - time.time()

    def figures(self, **values: Any) -> None:
        """Keep figures, at once."""
        self._figures |= values
        self.write(RUNNING)

    def show(self, **values: Any) -> None:
        """Keep figures that the table shows too."""
        self._shown |= values
        self.figures(**values)

    def require(self, holds: bool, what: str) -> None:
        """Note a check; the row fails if it does not hold."""
        if not holds:
            self._failures.append(what)

    def within(self, what: str, value: float, bound: float) -> None:
        """A figure with its bound."""
        self.show(**{what: value})
        self.figures(**{f"{what} (bound)": bound})
        self.require(value <= bound, f"{what} {records.short(float(value))}, bound {records.short(float(bound))}")

    def goal(self, what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        """A figure with its goal, which need not be reached for the row to have run well."""
        self.show(**{what: value})
        self.figures(**{f"{what} (goal)": least if least is not None else most})
        if (least is not None and value < least) or (most is not None and value > most):
            self._missed.append(
                f"{what} {records.short(float(value))}, goal {records.short(float(least or most or 0))}"
            )

    def only_on_gpu(self) -> None:
        """On a CPU this row only tries its code: that it ran through proves nothing of a GPU."""
        self._only_gpu = True

    def outcome(self) -> tuple[str, str]:
        """Status and note of a row that ran through."""
        if self._failures:
            return FAILED, "; ".join(self._failures)
        if self._only_gpu and not self.gpu:
            return NEEDS_GPU, "ran through on the CPU"
        return (BELOW_GOAL, "; ".join(self._missed)) if self._missed else (PASSED, "")

    def write(self, status: str, note: str = "") -> None:
        """Write the row's record."""
        run = {key: self.job[key] for key in ("revision", "card", "torch", "device", "quick")}
        record = {
            "part": self.part,
            "row": self.row,
            "status": status,
            "note": note,
            "shown": self._shown,
            "figures": self._figures,
            **run,
            "command": self.command or self.job["command"],
            "started": self._started,
            "seconds": round(time.monotonic() - self._clock, 2),
            "log": self.job["log"],
            "process": os.getpid(),
        }
        records.write(records.record_file(self.out, self.part, self.row), record)


def _follow(parent: int) -> None:
    """End, with everything that was started here, when the runner is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        for process in psutil.Process().children(recursive=True):  # they save what they have
            with suppress(psutil.Error):
                process.terminate()
        time.sleep(3)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def fresh_accelerator() -> None:
    """Forget the precision and devices that an earlier run in this process chose."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _tidy() -> None:
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run_row(context: Context, function: Callable[[Context], None]) -> tuple[str, bool]:
    """Run one row and write what became of it; returns its status, and whether this process can go on."""
    context.write(RUNNING)
    print(f"\n=== {context.part}: {context.row}", flush=True)
    usable = True
    try:
        function(context)
        status, note = context.outcome()
    except NeedsGpu as reason:
        status, note = NEEDS_GPU, str(reason)
    except NotHere as reason:
        status, note = NOT_HERE, str(reason)
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        status, note = FAILED, f"{type(error).__name__}: {message[0]}"
        # An error of a kernel stays with the process: whatever comes next would fail by it.
        usable = "CUDA error" not in str(error) and type(error).__name__ != "AcceleratorError"
    context.write(status, note)
    print(f"=== {status} {note}", flush=True)
    if usable:
        _tidy()
    return status, usable


def main(file: str) -> int:
    """Run the rows of a job file."""
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    _follow(int(job["parent"]))
    logging.basicConfig(level=logging.INFO)
    rows: Mapping[str, Callable[[Context], None]] = importlib.import_module(job["module"]).ROWS
    for row in job["rows"]:
        if time.time() >= job["deadline"]:
            return 0
        context = Context(job, row)
        status, usable = run_row(context, rows[row])
        if not usable:
            return BROKEN
        if job["chain"] and status not in FINISHED:
            return 0
    return 0


if __name__ == "__main__":
    from gpu_parts import child  # the module that rows import, whose exceptions they raise

    sys.exit(child.main(sys.argv[1]))
