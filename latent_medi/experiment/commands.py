"""Commands of this program that an experiment runs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

from latent_medi.core.errors import BAD_INPUT, UserError
from latent_medi.core.processes import PARENT, environment, python_words


def run_in_parallel(commands: dict[str, list[str]], threads: int | None = None) -> None:
    """Run ``latent-medi`` commands in parallel, one process each, and prefix their logs with their names.

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
                env=its_environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
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


def run_models(commands: dict[str, list[str]], at_once: int = 0) -> None:
    """Run a command for each model, several at the same time.

    Args:
        commands: Words after ``latent-medi`` by model.
        at_once: How many at the same time, sharing the cores; 0 means 2 on a machine without a GPU, otherwise 1.
    """
    import torch

    at_once = at_once or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    names = list(commands)
    for start in range(0, len(names), at_once):
        together = {name: commands[name] for name in names[start : start + at_once]}
        run_in_parallel(together, threads=max(1, (os.cpu_count() or 1) // at_once))
