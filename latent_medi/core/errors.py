"""Errors that the command line explains to the user, and exit codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

BAD_INPUT = 2
"""Exit code of a command that refuses its input."""

RESUME = 75
"""Exit code of a command that was asked to stop and saved its state: the same command continues (EX_TEMPFAIL of
sysexits.h)."""


class UserError(ValueError):
    """Input that the user can correct: the message says what is wrong, where, and how to fix it.

    The command line prints the message and exits with code 2. Every other exception is a bug and keeps its traceback.

    Args:
        message: What is wrong and where.
        hint: How to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n  {hint}" if hint else message)
        self.message = message
        self.hint = hint


class Incomplete(Exception):
    """A command finished, but had to leave out part of its input.

    The command line prints the message, writes the result, and exits with code 3.

    Args:
        message: What was left out, and why.
        result: The command's result for the rest.
    """

    def __init__(self, message: str, result: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class Preempted(Exception):
    """A command was asked to stop and has saved its state: the same command continues.

    The command line prints the message and exits with :data:`RESUME`, on which schedulers can requeue.
    """


@contextmanager
def needs(what: str, package: str) -> Iterator[None]:
    """Context for importing a package that only some commands need and that may not be installed.

    Args:
        what: What needs the package, as the start of a sentence.
        package: The package, or several, as an argument of ``pip install``.

    Raises:
        UserError: The import fails.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs {package}: {error}.", f"pip install {package}") from None


def shortened(text: str, most: int = 60) -> str:
    """A text cut to ``most`` characters, for messages."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A phrase for messages: the known words that are closest to ``word``, or the first few if none is close."""
    known = [str(k) for k in known]
    lower = {k.lower(): k for k in known}
    close = [lower[m] for m in get_close_matches(str(word).lower(), list(lower), n=n, cutoff=0.5)]
    if close:
        return "closest: " + ", ".join(repr(c) for c in close)
    if not known:
        return "none is known"
    return "known: " + ", ".join(repr(k) for k in known[:8]) + (f" … ({len(known)} in all)" if len(known) > 8 else "")
