"""What every benchmark shares: its options, what a command takes, and the report of its numbers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def options(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser with ``--quick`` and ``--json``.

    Args:
        description: The script's docstring.
        quick: What ``--quick`` does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser


def timed_command(words: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run ``latent-medi`` in a process of its own; what it prints is not shown.

    Args:
        words: The verb and its settings.
        environment: Variables that are added to those of this process.

    Returns:
        Wall seconds, processor seconds and the process's peak memory in GiB: ``s``, ``processor_s``, ``peak_gib``.

    Raises:
        CalledProcessError: It failed.
    """
    command, start = [sys.executable, "-m", "latent_medi.cli", *words], time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | dict(environment or {}))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    busy = usage.ru_utime + usage.ru_stime
    return {"s": time.perf_counter() - start, "processor_s": busy, "peak_gib": usage.ru_maxrss / 2**20}


def report(result: Mapping[str, float | None], path: Path | None) -> None:
    """Print the numbers, and write them if a file is named. ``None``: not measured."""
    for key, value in result.items():
        if value is None:
            print(f"{key}: not measured")
        else:
            print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value:,}")
    if path is not None:
        path.write_text(json.dumps(dict(result), indent=2) + "\n", encoding="utf-8")
