"""Stages of an experiment: each is remembered with what it was made from, so that a rerun keeps what is finished."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_medi.core.errors import BAD_INPUT, UserError
from latent_medi.core.files import read_json, read_object, refuse_foreign, remove, set_aside, write_json
from latent_medi.core.locks import output_lock
from latent_medi.core.processes import PARENT, environment, python_words
from latent_medi.core.progress import duration, get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of an experiment.

    Args:
        action: The work; it may itself continue where it was broken off.
        inputs: JSON-able: all that the outcome depends on besides the stages that it needs.
        needs: Names of the stages that it builds on.
        outputs: Files and folders that it writes, relative to the experiment's folder; without them it is not
            finished.
        extras: The same, but it depends on the settings whether they are written.
        damaged: Names what of its outputs is absent or not whole, such as a file: then it is not finished, and these
            are removed before it runs again.
        mend: What else is needed before it runs again on damaged outputs.
        shared: Paths that it writes and other experiments may use too: never removed, and without them it is not
            finished.
        costly: Whether its outputs are too dear to be removed unasked.
    """

    action: Callable[[], Any]
    inputs: Any = None
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    damaged: Callable[[], list[Path]] = list
    mend: Callable[[], None] = lambda: None
    shared: tuple[str, ...] = ()
    costly: bool = False


class Stages:
    """Runs named steps in order, each once.

    Args:
        folder: Folder of the experiment; records go to ``stages/``.
        names: Every stage, in order; the log counts them.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)
        self.seconds: dict[str, float] = {}
        self._stages: dict[str, Stage] = {}

    def add(self, name: str, stage: Stage) -> None:
        """Say what a stage is, or what it has become; those that it needs were added before it."""
        self._stages[name] = stage

    def finished(self, name: str) -> bool:
        """Whether an earlier run finished a stage from the same inputs, and what it wrote is still there and whole."""
        record, stage = self._record(name), self._stages[name]
        if record["seconds"] is None or record["made_from"] != self._made_from(name):
            return False
        written = [*stage.shared, *(self.folder / path for path in (*stage.outputs, *record.get("extras", ())))]
        return all(Path(path).exists() for path in written) and not stage.damaged()

    def check(self) -> None:
        """Look, before anything runs, whether something costly was made from other inputs than it would be now.

        Raises:
            UserError: Names all that would be removed, and which inputs differ.
        """
        gone: list[str] = []
        differ: dict[str, str] = {}
        for name, stage in self._stages.items():
            there = [str(path) for path in self._outputs(name)]
            if stage.costly and there and self._is_of_other_inputs(name):
                gone += there
                differ |= _differences(self._record(name)["made_from"], self._made_from(name))
        if gone:
            told = "; ".join(list(differ.values())[:5]) + (f"; and {len(differ) - 5} more" if len(differ) > 5 else "")
            raise UserError(
                f"{', '.join(gone)} {'was' if len(gone) == 1 else 'were'} made from other inputs: {told}.",
                f"Another out= keeps {self.folder} as it is; replace=true removes what no longer fits and makes it "
                "anew.",
            )

    def begin(self, *files: str) -> None:
        """Look, before the first stage ever runs, what the folder holds already: folders of the user's will be kept.

        Args:
            files: What else the experiment writes.

        Raises:
            UserError: A file of the user's would be replaced.
        """
        there = [path.relative_to(self.folder).as_posix() for name in self._stages for path in self._outputs(name)]
        refuse_foreign(
            self.folder, {"stages": ""}, [*files, *(name for name in there if (self.folder / name).is_file())]
        )
        if there and not self._found().parent.is_dir():
            write_json(self._found(), there)

    def _found(self) -> Path:
        return self.folder / "stages" / "found.json"

    def run(self, *names: str) -> None:
        """Run stages that are not finished. What an earlier run made from other inputs is removed first; what was
        broken off with the same inputs goes on.
        """
        for name in names:
            self._run(name, self._stages[name])

    def _run(self, name: str, stage: Stage) -> None:
        number = f"{self.names.index(name) + 1}/{len(self.names)}"
        if self.finished(name):
            self.seconds[name] = self._record(name)["seconds"]
            log.info("%s %s: finished before (took %s), kept", number, name, duration(self.seconds[name]))
            return
        if self._is_of_other_inputs(name):
            self._discard(name, self._outputs(name))
            remove(self._file(name))
        before = self._record(name)
        if before["seconds"] is not None:
            log.warning("%s %s: what it wrote is no longer there or whole; it is made again", number, name)
        if before["made_from"]:
            self._set_aside([path for path in stage.damaged() if path.exists()])
            stage.mend()
        log.info("%s %s …", number, name)
        record = {"made_from": self._made_from(name)}
        write_json(self._file(name), {**record, "seconds": None})
        start = time.monotonic()
        stage.action()
        self.seconds[name] = round(time.monotonic() - start, 1)
        extras = [
            file for path in stage.extras for file in sorted([self.folder / path, *(self.folder / path).rglob("*")])
        ]
        there = [str(file.relative_to(self.folder)) for file in extras if file.exists()]
        write_json(self._file(name), {**record, "extras": there, "seconds": self.seconds[name]})
        log.info("%s %s: done in %s", number, name, duration(self.seconds[name]))

    def _outputs(self, name: str) -> list[Path]:
        """What a stage may write, as far as it is there."""
        stage = self._stages[name]
        return [path for output in (*stage.outputs, *stage.extras) if (path := self.folder / output).exists()]

    def _set_aside(self, paths: Sequence[Path]) -> None:
        """Rename what is not whole, or remove a damaged shard, which can be told by its hash from what was written."""
        self._check_own(paths)
        for path in paths:
            if path.suffix == ".tar":
                remove(path)
            else:
                log.warning("%s is damaged: it is kept as %s", path, set_aside(path).name)

    def _discard(self, name: str, paths: Sequence[Path]) -> None:
        """Remove what an earlier run of a stage wrote.

        Raises:
            UserError: It was there before that, or another job writes it.
        """
        self._check_own(paths)
        for path in paths:
            if path.is_dir():
                with output_lock(path):  # nobody writes it
                    remove(path)
            else:
                remove(path)

    def _check_own(self, paths: Sequence[Path]) -> None:
        """Refuse to touch what was there before the run."""
        found = [self.folder / path for path in (read_json(self._found()) if self._found().is_file() else [])]
        for path in paths:
            if any(path.is_relative_to(one) for one in found):
                raise UserError(
                    f"{path} does not fit any more, and this run has not made it: it was there before.",
                    "Move it away, or give another out.",
                )

    def _file(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        record = read_object(self._file(name)) if self._file(name).exists() else {}
        return {"made_from": None, "seconds": None, **record}

    def _is_of_other_inputs(self, name: str) -> bool:
        earlier = self._record(name)["made_from"]
        return earlier is not None and earlier != self._made_from(name)

    def _made_from(self, name: str) -> dict[str, Any]:
        stage = self._stages[name]
        made_from: dict[str, Any] = {}
        for needed in stage.needs:
            made_from |= self._made_from(needed)
        return made_from | {name: stage.inputs}


def _differences(before: Any, after: Any, where: str = "") -> dict[str, str]:
    """What differs between two records, by its dotted place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= _differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
        return found
    return {} if before == after else {where: f"{where} was {_short(before)}, is {_short(after)}"}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"  # a hash


def side_by_side(commands: dict[str, list[str]], threads: int | None = None) -> None:
    """Run ``latent-medi`` commands at the same time, one process each; what they log is passed on with their name
    before it.

    Args:
        commands: Words after ``latent-medi`` by the name to show.
        threads: Threads that each may use; ``None`` for as many as this process may.

    Raises:
        UserError: One was given what it cannot follow, and has said so; the others are stopped.
        RuntimeError: The same of one that failed.
    """
    few = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    its_environment = environment(**few, **{PARENT: str(os.getpid())})
    running: dict[str, subprocess.Popen[str]] = {}
    readers = []

    def pass_on(name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:  # read to the end, whatever becomes of it: a full pipe would hold the process up
            with suppress(OSError):
                print(f"[{name}] {line}", end="", file=sys.stderr, flush=True)

    try:
        for name, words in commands.items():
            process = subprocess.Popen(
                python_words("latent_medi.cli", *words),
                env=its_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            running[name] = process
            reader = threading.Thread(target=pass_on, args=(name, process), daemon=True)
            reader.start()
            readers.append(reader)
        while running:
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code == BAD_INPUT:
                    raise UserError(f"{name} cannot go on; its message is above.", "Mend that and repeat the command.")
                if code:
                    raise RuntimeError(
                        f"{name} ended with exit code {code}; its messages are above. The same command continues."
                    )
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for reader in readers:
            reader.join(timeout=5)
