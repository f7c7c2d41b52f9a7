"""One logger and one progress display for every verb."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

_ROOT = "latent_medi"
_LINE_EVERY = 10.0  # seconds between progress lines if the output is no terminal


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; all use the handler that :func:`set_up_logging` installs."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the package's messages to stderr with the time of day; safe to call more than once."""
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


def duration(seconds: float) -> str:
    """``seconds`` as 41s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it") -> Iterator[T]:
    """Iterate with progress and time left: a bar on a terminal, otherwise a log line every 10 s.

    Args:
        iterable: What to iterate over.
        total: Number of items; ``len(iterable)`` if it has one.
        desc: Name of the task.
        unit: Name of one item.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=desc, unit=unit, dynamic_ncols=True)
        return
    logger = get_logger("progress")
    start = last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            rate = done / (now - start)
            left = f", {duration((total - done) / rate)} left" if total else ""
            of = f"/{total}" if total else ""
            logger.info("%s: %d%s %s, %.3g %s/s%s", desc, done, of, unit, rate, unit, left)
