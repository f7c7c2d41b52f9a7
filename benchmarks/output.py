"""What every benchmark shares: its options, and the report of its numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
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


def report(result: Mapping[str, float], path: Path | None) -> None:
    """Print the numbers, and write them if a file is named."""
    for key, value in result.items():
        print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value:,}")
    if path is not None:
        path.write_text(json.dumps(dict(result), indent=2) + "\n", encoding="utf-8")
