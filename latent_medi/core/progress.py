"""One logger and one progress display for every verb."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_ROOT = "latent_medi"
_FIRST_BAR = 1.0  # seconds after which a bar is drawn
_FIRST_LINE = 5.0  # seconds after which a line is logged if the output is no terminal
_LINE_EVERY = 10.0  # seconds between these lines


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


class Progress:
    """What is done of a task, shown with the time left: a bar on a terminal, otherwise a log line after 5 s and then
    every 10 s. Of several launched processes the first shows it. It is a context, which ends the bar::

        with Progress(len(rows), "encoding", "patches") as shown:
            for part in batches:
                ...
                shown.add(len(part))

    Args:
        total: Number of patches, images or whatever is counted; ``None`` if it is not known.
        desc: Name of the task.
        unit: What is counted, in the plural.
    """

    def __init__(self, total: int | None, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = self._before = 0
        self._visible = os.environ.get("RANK", "0") == "0"
        self._start = time.monotonic()
        self._next = self._start + _FIRST_LINE
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._visible and sys.stderr.isatty():
            from tqdm.auto import tqdm  # takes a while, which --help would wait for

            unit = f" {self.unit}"
            self._bar = tqdm(total=self.total, desc=self.desc, unit=unit, dynamic_ncols=True, delay=_FIRST_BAR)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, count: int) -> None:
        """Count what an earlier command did: it says nothing of the speed."""
        self.done += count
        self._before += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def add(self, count: int = 1) -> None:
        """Count what was done just now."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._visible and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_EVERY
            get_logger("progress").info("%s", self._line())

    def _line(self) -> str:
        rate = (self.done - self._before) / (time.monotonic() - self._start)
        of, left = f" of {self.total:,}" if self.total else "", ""
        if self.total and rate:
            left = f", {duration(max(self.total - self.done, 0) / rate)} left"
        return f"{self.desc}: {self.done:,}{of} {self.unit}, {rate:.3g} {self.unit}/s{left}"


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    desc: str = "",
    unit: str = "items",
    each: int | Sequence[int] = 1,
    before: int = 0,
) -> Iterator[T]:
    """Iterate with :class:`Progress`.

    Args:
        iterable: What to iterate over.
        total: How many are counted in all, ``before`` included; by default what the items of ``iterable`` hold.
        desc: Name of the task.
        unit: What is counted, in the plural.
        each: How many of them an item of ``iterable`` holds: one number, of which the last item may hold less, or one
            for each item.
        before: How many an earlier command did.
    """
    if total is None and not isinstance(each, int):
        total = before + sum(each)
    elif total is None and hasattr(iterable, "__len__"):
        total = before + len(iterable) * each  # type: ignore[arg-type,operator]
    with Progress(total, desc, unit) as shown:
        shown.skip(before)
        for number, item in enumerate(iterable):
            yield item
            held = each if isinstance(each, int) else each[number]
            shown.add(min(held, total - shown.done) if total else held)
