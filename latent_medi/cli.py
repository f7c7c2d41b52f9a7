"""The command line: starts a verb, explains errors, and returns an exit code."""

# PYTHON_ARGCOMPLETE_OK: argcomplete, if it is switched on for all programs, looks for these words.
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from latent_medi import __version__
from latent_medi.core.errors import BAD_INPUT, RESUME, Incomplete, Preempted, UserError, nearest
from latent_medi.core.files import NO_SPACE, check_file, write_json
from latent_medi.core.paths import expand
from latent_medi.core.processes import Output, follow_parent, read_by_somebody, run_program, safe_helpers
from latent_medi.core.progress import set_up_logging
from latent_medi.verbs import VERBS, Printed, Verb, found_verb, settings_of


def _usage() -> str:
    lines = [
        f"latent-medi {__version__}: metadata-guided latent diffusion for histopathology",
        "",
        "latent-medi VERB [--config NAME] [key=value …] [--json FILE]",
        "",
    ]
    lines += [f"  {name:<21}{verb[1]}" for name, verb in VERBS.items() if " " not in name]
    return "\n".join([*lines, "", "`latent-medi VERB --help` lists the settings of a verb."])


def run_verb(words: Sequence[str]) -> int:
    """Run one verb and return its exit code; errors are not caught."""
    words = list(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else BAD_INPUT  # nothing was done
    if words[0] == "--version":
        print(__version__)
        return 0
    name, rest = found_verb(words)
    if name not in VERBS:
        known = [verb for verb in VERBS if " " not in verb]
        raise UserError(f"There is no verb {name!r}; {nearest(name, known)}.", "`latent-medi --help` lists them.")
    verb = Verb(*VERBS[name])
    json_file = _take_json_file(rest)
    if json_file:
        check_file(json_file, "JSON file", rb"\s*[\[{]")
    try:
        result = verb.run(settings_of(verb, rest, name) if verb.settings else rest)
    except Incomplete as error:
        _write_result(json_file, error.result)
        raise
    _write_result(json_file, result)
    return 0


def _take_json_file(words: list[str]) -> Path | None:
    """Remove ``--json FILE`` from the words, and return the file.

    Raises:
        UserError: The file is missing or cannot be written.
    """
    at = next((i for i, word in enumerate(words) if word == "--json" or word.startswith("--json=")), None)
    if at is None:
        return None
    word = words.pop(at)
    name = word.partition("=")[2] if word != "--json" else words.pop(at) if at < len(words) else ""
    if not name or name.startswith("--"):
        raise UserError("--json has no file.", "Write --json FILE.")
    path = Path(expand(name, "--json"))
    if path.is_dir():
        raise UserError(f"--json {path} is a folder.", "Name a file in it.")
    try:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}.", "Name another file.") from None
    if not parent.is_dir():
        raise UserError(f"--json {path} cannot be written: {parent} is no folder.", "Name another file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--json {path} cannot be written: no permission in {parent}.", "Name another file.")
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
            f"The command finished, but --json {path} cannot be written: {error.strerror}.", "Name another file."
        ) from None


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of ``latent-medi``, ``train.py`` and ``sample.py``.

    Exit codes: 0 finished; 2 invalid input, explained in one message; 3 finished without part of the input, which is
    named; 75 asked to stop and saved, the same command continues; 130 interrupted; 141 nobody reads the output any
    more; 143 terminated. Anything else is a bug and keeps its traceback.
    """
    set_up_logging()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    with safe_helpers(), read_by_somebody() as output:
        if threading.current_thread() is threading.main_thread():

            def end(*_: object) -> None:  # an exception, so that helper processes are ended too
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal would interrupt the cleanup
                raise SystemExit(128 + (signal.SIGPIPE if output.closed else signal.SIGTERM))

            signal.signal(signal.SIGTERM, end)
            follow_parent()
        try:
            return _explained(words, output)
        finally:
            if output.closed:
                output.give_up()


def _explained(words: Sequence[str] | None, output: Output) -> int:
    """Run a verb and return its exit code; print a message for errors."""
    try:
        return run_verb(sys.argv[1:] if words is None else words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
        output.give_up()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: The disk is full{where}.\n  Free some space and run the command again; it continues.",
            file=sys.stderr,
        )
        return 2
    except Incomplete as error:
        print(f"incomplete: {error}", file=sys.stderr)
        return 3
    except Preempted as error:
        if output.closed:  # not preempted: nobody reads the output
            return 128 + signal.SIGPIPE
        print(f"stopped: {error}", file=sys.stderr)
        return RESUME
    except RuntimeError as error:  # importing torch takes seconds: without it, this is not its error
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


def program() -> NoReturn:
    """``latent-medi`` as a program: :func:`main`, and the end of the process. A shell that completes a word calls it
    too, with ``_ARGCOMPLETE`` in its environment.
    """
    if "_ARGCOMPLETE" in os.environ:
        from latent_medi.completion import complete

        complete()
    run_program(main)


if __name__ == "__main__":
    program()
