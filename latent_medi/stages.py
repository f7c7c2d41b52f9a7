"""Stages of an experiment: each is remembered with what it was made from, so that a rerun keeps what is finished."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latent_medi.files import read_json, remove, write_json
from latent_medi.progress import duration, get_logger

log = get_logger(__name__)


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
        self._made_from: dict[str, Any] = {}

    def run(self, name: str, inputs: Any, action: Callable[[], Any], outputs: Sequence[str] = ()) -> None:
        """Run ``action`` unless this stage finished before with the same ``inputs`` after the same earlier stages.

        What an earlier run made from other inputs is removed first; what was broken off with the same inputs is kept.

        Args:
            name: One of the names given at the start.
            inputs: JSON-able: all that the outcome depends on besides earlier stages.
            action: The work; it may itself continue where it was broken off.
            outputs: Files and folders that it writes, relative to the experiment's folder.
        """
        number = f"{self.names.index(name) + 1}/{len(self.names)}"
        record_file = self.folder / "stages" / f"{name}.json"
        self._made_from = {**self._made_from, name: inputs}
        if record_file.is_file():
            record = read_json(record_file)
            if record["made_from"] != self._made_from:
                for output in outputs:
                    remove(self.folder / output)
            elif record["seconds"] is not None:
                self.seconds[name] = record["seconds"]
                log.info("%s %s: finished before (took %s), kept", number, name, duration(record["seconds"]))
                return
        log.info("%s %s …", number, name)
        write_json(record_file, {"made_from": self._made_from, "seconds": None})
        start = time.monotonic()
        action()
        self.seconds[name] = round(time.monotonic() - start, 1)
        write_json(record_file, {"made_from": self._made_from, "seconds": self.seconds[name]})
        log.info("%s %s: done in %s", number, name, duration(self.seconds[name]))


def side_by_side(commands: dict[str, list[str]], threads: int) -> None:
    """Run ``latent-medi`` commands at the same time, one process each; what they log is passed on with their name
    before it.

    Args:
        commands: Words after ``latent-medi`` by the name to show.
        threads: Threads that each may use.

    Raises:
        RuntimeError: One failed; the others are stopped.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    running: dict[str, subprocess.Popen[str]] = {}
    readers = []

    def pass_on(name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"[{name}] {line}", end="", file=sys.stderr, flush=True)

    try:
        for name, words in commands.items():
            process = subprocess.Popen(
                [sys.executable, "-m", "latent_medi.cli", *words],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
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
