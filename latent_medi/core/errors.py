"""The one error class for input that a user can put right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

BAD_INPUT = 2
"""Exit code of what was given input that it cannot follow, and has said so."""

RESUME = 75
"""Exit code of what was told to stop and has saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """Bad input: what is wrong, where, and how to fix it.

    The command line prints it as one message and exits with code 2; every other exception is a defect of ours and keeps
    its traceback.

    Args:
        message: What is wrong and where.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n  {hint}" if hint else message)
        self.message = message
        self.hint = hint


class Incomplete(Exception):
    """Work that was finished, but not for all of its input: what was left out is named.

    The command line prints it, writes the result, and exits with code 3.

    Args:
        message: What was left out, and why.
        result: What there is to tell about the rest.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class Preempted(Exception):
    """Work that was told to stop and has saved what it needs to go on: the same command continues.

    The command line prints it and exits with :data:`RESUME`, which schedulers can requeue on.
    """


@contextmanager
def needs(what: str, package: str) -> Iterator[None]:
    """Imports within it are of a package that few commands use, and that may be absent on a machine that trains.

    Args:
        what: What cannot be done without it, as a sentence begins.
        package: Its name, or several, as pip takes it.

    Raises:
        UserError: It is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs {package}: {error}.", f"pip install {package}") from None


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A phrase that names the known words closest to ``word``, or lists a few of them when none is close."""
    known = [str(k) for k in known]
    lower = {k.lower(): k for k in known}
    close = [lower[m] for m in get_close_matches(str(word).lower(), list(lower), n=n, cutoff=0.5)]
    if close:
        return "closest: " + ", ".join(repr(c) for c in close)
    if not known:
        return "none is known"
    return "known: " + ", ".join(repr(k) for k in known[:8]) + (f" … ({len(known)} in all)" if len(known) > 8 else "")
