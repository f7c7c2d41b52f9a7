"""The command line: one verb per step, each reads a folder and writes a folder. How it begins, fails and ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from latent_medi import __version__
from latent_medi.core.errors import BAD_INPUT, RESUME, Incomplete, Preempted, UserError, nearest
from latent_medi.core.files import NO_SPACE, check_file, write_json
from latent_medi.core.paths import expand
from latent_medi.core.processes import Output, follow_parent, read_by_somebody, safe_helpers
from latent_medi.core.progress import set_up_logging
from latent_medi.verbs import VERBS, Printed

_HELPED = frozenset({
    "train", "encode", "classifier", "average", "grid", "evaluate", "floors", "split", "audit", "export",
    "benchmark-shift",
})  # fmt: skip
"""Verbs that have nothing to do without words, and show their settings then."""


def _usage() -> str:
    lines = [
        f"latent-medi {__version__}: metadata-guided latent diffusion for histopathology",
        "",
        "latent-medi VERB [--config NAME] [key=value …] [--json FILE]",
        "",
    ]
    lines += [f"  {verb:<17}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join([*lines, "", "`latent-medi VERB --help` lists the settings of a verb."])


def run_verb(words: Sequence[str]) -> int:
    """Run one verb; errors pass through. Returns the exit code."""
    words = list(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    verb, rest = words[0], words[1:]
    if verb in _HELPED and not rest:
        rest = ["--help"]
    if verb not in VERBS:
        raise UserError(f"There is no verb {verb!r}; {nearest(verb, VERBS)}.", "`latent-medi --help` lists them.")
    json_file = _take_json_file(rest)
    if json_file:
        check_file(json_file, "JSON file", rb"\s*[\[{]")
    try:
        result = VERBS[verb][0](rest)
    except Incomplete as error:
        _write_result(json_file, error.result)
        raise
    _write_result(json_file, result)
    return 0


def _take_json_file(words: list[str]) -> Path | None:
    """The file of ``--json FILE``, which is taken out of the words.

    Raises:
        UserError: No file is named, or none can be written there: better said before the work than after it.
    """
    at = next((i for i, word in enumerate(words) if word == "--json" or word.startswith("--json=")), None)
    if at is None:
        return None
    word = words.pop(at)
    name = word.partition("=")[2] if word != "--json" else words.pop(at) if at < len(words) else ""
    if not name or name.startswith("--"):
        raise UserError("--json names no file.", "Write --json FILE.")
    path = Path(expand(name, "--json"))
    if path.is_dir():
        raise UserError(f"--json {path} is a folder.", "Name a file in it.")
    try:
        there = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}.", "Name another file.") from None
    if not there.is_dir():
        raise UserError(f"--json {path} cannot be written: {there} is no folder.", "Name another file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--json {path} cannot be written: no permission in {there}.", "Name another file.")
    return path


def _write_result(path: Path | None, result: Printed) -> None:
    if path is None:
        return
    try:
        write_json(path, result)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(
            f"The command is done, but --json {path} cannot be written: {error.strerror}.", "Name another file."
        ) from None


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of ``latent-medi``, ``train.py`` and ``sample.py``.

    Exit codes: 0 done; 2 bad input, explained in one message; 3 done, but for some of the input, which is named;
    75 told to stop and saved, so that the same command continues; 130 interrupted; 141 nobody reads what it prints any
    more; 143 terminated; anything else is a defect and keeps its traceback.
    """
    set_up_logging()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    with safe_helpers(), read_by_somebody() as output:
        if threading.current_thread() is threading.main_thread():

            def end(*_: object) -> None:  # by an exception, so that a command that started others ends them too
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off the cleaning up
                raise SystemExit(128 + (signal.SIGPIPE if output.closed else signal.SIGTERM))

            signal.signal(signal.SIGTERM, end)
            follow_parent()
        try:
            return _explained(words, output)
        finally:
            if output.closed:
                output.give_up()


def _explained(words: Sequence[str] | None, output: Output) -> int:
    """Run a verb; returns the exit code, and prints what went wrong."""
    try:
        return run_verb(sys.argv[1:] if words is None else words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough, such as `| head`
        output.give_up()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: The disk is full{where}.\n  What was finished is kept: free some space and run it again.",
            file=sys.stderr,
        )
        return 2
    except Incomplete as error:
        print(f"incomplete: {error}", file=sys.stderr)
        return 3
    except Preempted as error:
        if output.closed:  # no cluster's notice: nobody reads what it prints
            return 128 + signal.SIGPIPE
        print(f"stopped: {error}", file=sys.stderr)
        return RESUME
    except RuntimeError as error:  # torch takes seconds to import: if it has not been, this is none of its errors
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(
            f"error: The device's memory is full: {str(error).splitlines()[0]}\n"
            "  Lower device_batch (evaluate: batch), or use another device.",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
