"""Starts the parts' processes within the time there is, keeps what they wrote, and shows it in one table.

What has no result yet comes first, in order of worth, then the oldest. A part that ends early leaves its time to what
was left out.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gpu_parts import records
from gpu_parts.child import BROKEN
from gpu_parts.plan import BUDGET, LEAST, Group, Part
from gpu_parts.records import CUT_OFF, FAILED, FINISHED, NOT_HERE, RUNNING, Record

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    """What was asked for.

    Args:
        out: Folder of results.
        budget: Seconds after which it is over.
        quick: Tiny sizes.
        device: "cuda" or "cpu".
        real: Folder of real biopsies.
        models: Folder of weights.
        other: Folder of patches of other tissue.
        least: Seconds that a part gets whatever its share of the budget.
        start: Moment from which the budget counts, by time.time().
    """

    out: Path
    budget: float
    quick: bool = False
    device: str = "cpu"
    real: Path = Path("real")
    models: Path = Path("models")
    other: Path = Path("other")
    least: float = LEAST
    start: float = field(default_factory=time.time)

    @property
    def grace(self) -> float:
        """Seconds that a process gets to save and end in."""
        return min(5.0, self.budget / 12)

    @property
    def end(self) -> float:
        """Moment by which the last process is asked to end."""
        return self.start + self.budget - 2 * self.grace


@dataclass
class Machine:
    """Where it runs: part of every record."""

    card: str
    torch: str
    memory_gib: float = 0.0


@dataclass
class Job:
    """A process that runs."""

    group: Group
    rows: list[str]
    process: subprocess.Popen[bytes]
    deadline: float
    killed: bool = False


class Runner:
    """One call.

    Args:
        parts: Those asked for, in order of worth.
        options: What was asked for.
        machine: Where it runs.
    """

    def __init__(self, parts: Sequence[Part], options: Options, machine: Machine) -> None:
        self.parts, self.options, self.machine = list(parts), options, machine
        self.scale = options.budget / BUDGET
        self.run: Record = {
            "revision": records.revision(),
            "card": machine.card,
            "torch": machine.torch,
            "device": options.device,
            "quick": options.quick,
        }
        self.begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.touched: set[tuple[str, str]] = set()
        self._jobs: list[Job] = []
        self._count = 0
        # With nothing left to do, everything is done once more, the oldest first. What is not here may never be.
        self.again = all(self._nothing_left(part, group) for part in self.parts for group in part.groups)

    # ---- what to do

    def _rows(self, part: Part) -> Iterator[tuple[Group, str]]:
        return ((group, row) for group in part.groups for row in group.rows)

    def _record(self, part: Part, row: str) -> Record | None:
        return records.read(self.options.out, part.name, row)

    def _nothing_left(self, part: Part, group: Group) -> bool:
        for row in group.rows:
            record = self._record(part, row)
            if record is None or not records.is_of(record, self.run) or record["status"] not in (*FINISHED, NOT_HERE):
                return False
            if group.chain and record["status"] == NOT_HERE:  # nor is what builds on it
                break
        return True

    def order(self) -> list[Part]:
        """The parts without any result, then the others, the oldest first."""

        def age(part: Part) -> tuple[bool, str]:
            found = [r for _, row in self._rows(part) if records.is_of(r := self._record(part, row), self.run)]
            times = [record["started"] for record in found if record is not None and record["status"] != NOT_HERE]
            return bool(times), min(times, default="")

        return sorted(self.parts, key=age)

    def to_do(self, part: Part, group: Group) -> list[str]:
        """Rows of a group that are to run now: those that were never tried, then those tried longest ago."""

        def tried(row: str) -> str:
            record = self._record(part, row)
            return record["started"] if record is not None and records.is_of(record, self.run) else ""

        left = [row for row in group.rows if self._is_left(part, row)]
        if not group.chain:
            return sorted(left, key=tried)
        first = group.rows.index(left[0]) if left else len(group.rows)
        broken = any((part.name, row) in self.touched and not self._is_done(part, row) for row in group.rows[:first])
        return [] if broken else list(group.rows[first:])  # what follows was made of what came before

    def _is_done(self, part: Part, row: str) -> bool:
        return records.finished(self._record(part, row), self.run)

    def _is_left(self, part: Part, row: str) -> bool:
        record = self._record(part, row)
        if (part.name, row) in self.touched:  # in this call: only what was cut off goes on
            return record is not None and record["status"] == CUT_OFF
        return self.again or not records.finished(record, self.run)

    # ---- running

    def go(self) -> int:
        """Run what fits the time; returns the exit code."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        try:
            for part in self.order():
                self._prepare(part)
                limit = time.time() + max(part.seconds * self.scale, self.options.least)
                self._run_part(part, min(limit, self.options.end))
            while self.options.end - time.time() > self.options.grace:
                before = self._state()
                for part in self.order():
                    self._run_part(part, self.options.end)
                if self._state() == before:
                    break
        finally:
            self._kill(self._jobs)
            self._settle_all()
        return self._report()

    def _state(self) -> set[tuple[str, str]]:
        """Rows of which nothing is left to do in this call."""
        return {
            (part.name, row) for part in self.parts for group, row in self._rows(part) if not self._is_left(part, row)
        }

    def _work(self, part: Part) -> Path:
        return self.options.out / "work" / part.name

    def _prepare(self, part: Part) -> None:
        """An empty folder of work, unless one of the same revision and size can be gone on with."""
        work, made_for = self._work(part), {"part": part.name, "row": "work", **self.run}
        known = records.read(self.options.out / "work", part.name, "work")
        if self.again or not records.is_of(known, self.run):
            shutil.rmtree(work, ignore_errors=True)
        records.write(records.record_file(self.options.out / "work", part.name, "work"), made_for)

    def _at_once(self, part: Part) -> int:
        return part.at_once if self.options.device == "cuda" and self.machine.memory_gib >= 24 else 1

    def _run_part(self, part: Part, limit: float) -> None:
        waiting = [group for group in part.groups if self.to_do(part, group)]
        tries = 0
        while waiting or self._jobs:
            now = time.time()
            while waiting and len(self._jobs) < self._at_once(part) and limit - now > self.options.grace:
                group = waiting.pop(0)
                self._jobs.append(self._start(part, group, limit))
            if not self._jobs:
                return
            self._kill([job for job in self._jobs if time.time() >= job.deadline])
            for job in list(self._jobs):
                if job.process.poll() is None:
                    continue
                self._jobs.remove(job)
                self._settle(part, job)
                # A process that fell over leaves rows that have nothing to do with it.
                fell = not job.killed and job.process.returncode != 0
                if fell and tries < 5 and not job.group.chain and self.to_do(part, job.group):
                    tries += 1
                    waiting.insert(0, job.group)
            time.sleep(0.05)

    def _start(self, part: Part, group: Group, deadline: float) -> Job:
        options, rows = self.options, self.to_do(part, group)
        self._count += 1
        name = f"{records.file_name(group.module.rpartition('.')[2])}-{os.getpid()}-{self._count}"
        folder = options.out / part.name
        log = folder / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._work(part).mkdir(parents=True, exist_ok=True)
        file = self._work(part) / f"{name}.json"
        records.write(
            file,
            {
                **self.run,
                "part": part.name,
                "module": group.module,
                "rows": rows,
                "chain": group.chain,
                "out": str(options.out.resolve()),
                "work": str(self._work(part).resolve()),
                "real": str(options.real),
                "models": str(options.models),
                "other": str(options.other),
                "deadline": deadline - options.grace,
                "log": log.name,
                "parent": os.getpid(),
                "scale": self.scale,
                "command": shlex.join(["python", *sys.argv]),
            },
        )
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        listed = [str(BENCHMARKS), str(records.ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in listed if entry)
        if options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_parts.child", str(file)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        print(f"{self._clock()} {part.name}: {', '.join(rows)}", flush=True)
        return Job(group, rows, process, deadline)

    def _clock(self) -> str:
        return f"{time.time() - self.options.start:6.1f} s"

    def _kill(self, jobs: Sequence[Job]) -> None:
        """End processes and all that they started: first asked, so that training saves."""
        ending = [job for job in jobs if job.process.poll() is None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for job in ending:
                job.killed = True
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.process.pid, number)
            patience = time.time() + self.options.grace
            while number == signal.SIGTERM and time.time() < patience and any(_lives(job.process) for job in ending):
                time.sleep(0.05)
        for job in ending:
            job.process.wait()

    def _settle(self, part: Part, job: Job) -> None:
        """Note what became of the rows of a process that ended."""
        code = job.process.returncode
        for row in job.rows:
            record = self._record(part, row)
            mine = record is not None and record.get("process") == job.process.pid
            if not mine:
                # Nothing was tried but to import the module: that is not a row of no result, but a failure.
                if not job.killed and code not in (0, BROKEN) and not self._any_of(part, job):
                    self._write(part, row, FAILED, f"the process ended with exit code {code} before it began", job)
                continue
            self.touched.add((part.name, row))
            if record is not None and record["status"] == RUNNING:
                outcome = (
                    (CUT_OFF, "stopped before it was done")
                    if job.killed
                    else (FAILED, f"the process ended with exit code {code}")
                )
                self._write(part, row, *outcome, job)
            self._print(part, row)

    def _any_of(self, part: Part, job: Job) -> bool:
        found = (self._record(part, row) for row in job.rows)
        return any(record is not None and record.get("process") == job.process.pid for record in found)

    def _settle_all(self) -> None:
        for job in self._jobs:
            part = next(part for part in self.parts if job.group in part.groups)
            self._settle(part, job)
        self._jobs.clear()

    def _write(self, part: Part, row: str, status: str, note: str, job: Job) -> None:
        self.touched.add((part.name, row))
        before = self._record(part, row) or {}
        if before.get("process") != job.process.pid:
            before = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "figures": {}, "shown": {}}
            before["command"] = shlex.join(["python", *sys.argv])
        seconds = (datetime.now(UTC) - datetime.fromisoformat(before["started"])).total_seconds()
        record = {"part": part.name, "row": row, **before, **self.run, "status": status, "note": note}
        record["seconds"] = max(seconds, before.get("seconds") or 0.0)
        records.write(records.record_file(self.options.out, part.name, row), record)

    def _print(self, part: Part, row: str) -> None:
        record = self._record(part, row)
        if record is not None:
            print(f"{self._clock()} {records.table([record])}", flush=True)

    # ---- telling

    def _report(self) -> int:
        """Write results.json, table.txt and measured.json, print the table; returns the exit code."""
        every = [record for part in self.parts for _, row in self._rows(part) if (record := self._record(part, row))]
        mine = [record for record in every if (record["part"], record["row"]) in self.touched]
        left = {
            part.name: [row for _, row in self._rows(part) if not records.is_of(self._record(part, row), self.run)]
            for part in self.parts
        }
        counts: dict[str, int] = {}
        for record in mine:
            counts[record["status"]] = counts.get(record["status"], 0) + 1
        lines = [
            f"{self.run['revision']} on {self.run['card']}, torch {self.run['torch']}"
            f"{', --quick' if self.run['quick'] else ''}: {time.time() - self.options.start:.0f} s of "
            f"{self.options.budget:.0f}",
            "",
            records.table(mine) or "nothing was run",
            "",
            ", ".join(f"{count} {status}" for status, count in counts.items()) or "no row",
        ]
        lines += [f"left out, {name}: {', '.join(rows)}" for name, rows in left.items() if rows]
        if any(left.values()) or any(record["status"] == CUT_OFF for record in mine):
            lines.append("The same command goes on with what is left.")
        text = "\n".join(lines)
        (self.options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        records.write(self.options.out / "results.json", {**self.run, "started": self.begun, "rows": every})
        if seen := records.measured(every):
            records.write(self.options.out / "measured.json", {"rows": seen})
        print(f"\n{text}", flush=True)
        return 1 if any(record["status"] == FAILED for record in mine) else 0


def _lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process or any of its group is there."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
