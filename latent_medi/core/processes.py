"""Helper processes: they import no module from the working folder, and end with the process that started them."""

from __future__ import annotations

import atexit
import os
import select
import signal
import stat
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import psutil

from latent_medi.core.errors import BAD_INPUT

T = TypeVar("T")

PARENT = "LATENT_MEDI_PARENT"
"""Environment variable with the number of the process that started this one: when that ends, this one ends too."""

RUNNER_OPTIONS = "LATENT_MEDI_RUNNER_OPTIONS"
"""Environment variable of an experiment's runner that the launcher started: the launcher's options, as JSON."""

_SAFE = "PYTHONSAFEPATH"
_LOOK_EVERY = 0.5  # seconds
_watched: set[int] = set()


def python_words(module: str, *words: str) -> list[str]:
    """Command that runs a module of this package as a program; its environment is :func:`environment`."""
    return [sys.executable, "-P", "-m", module, *words]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a helper process: that of this process, with the working folder off Python's module path.

    Args:
        changes: Variables to set.
    """
    import latent_medi

    # An empty entry means the working folder. A source tree that is not installed is added by its path.
    listed = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = Path(latent_medi.__file__).resolve().parents[1]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if root not in installed and str(root) not in listed:
        listed.append(str(root))
    found = {**os.environ, **changes, _SAFE: "1"}
    found.pop("PYTHONPATH", None)
    return {**found, "PYTHONPATH": os.pathsep.join(listed)} if listed else found


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program's main function, and end the process with the exit code that it returns.

    The process ends after Python's own cleanup and before that of C++ libraries: one whose thread still runs would
    abort the process (exit code -6) although its work is done. Only what is printed last can still fail: 0 becomes
    2 where it cannot be written, and 141 where nobody reads it.
    """
    codes: list[int] = []

    def end() -> None:
        if codes:
            lost = [error for stream in (sys.stdout, sys.stderr) if (error := _flushed(stream))]
            if lost and not codes[0]:
                codes[0] = 128 + signal.SIGPIPE if isinstance(lost[0], BrokenPipeError) else BAD_INPUT
            os._exit(codes[0])

    atexit.register(end)  # before all that main registers, so that it is called after them
    try:
        codes.append(main())
    except SystemExit as error:
        if isinstance(error.code, int):
            codes.append(error.code)
        raise
    except Exception:  # Python prints it before it cleans up
        codes.append(1)
        raise
    sys.exit(codes[0])


def _flushed(stream: TextIO | None) -> OSError | None:
    """Write out what a stream holds; returns the error, which is also printed unless nobody reads the stream."""
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and stream is not sys.stderr and sys.stderr is not None:
            print(f"error: The output cannot be written: {error.strerror}.", file=sys.stderr)
        return error
    return None


@contextmanager
def safe_helpers() -> Iterator[None]:
    """Context in which every Python that is started, workers of joblib and torch too, leaves the working folder out of
    its module path.
    """
    before, after = {name: os.environ.get(name) for name in (_SAFE, "PYTHONPATH")}, environment()
    _set({name: after.get(name) for name in before})
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends for whatever reason, so that it cannot overwrite files of a rerun.

    Args:
        parent: The parent's process number; if it has already ended, this process ends now.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))
    else:
        _watch(parent, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the command that started this process has ended")


def call_tied(parent: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a worker process, which from then on is killed when the dispatching process ends.

    Args:
        parent: Number of the dispatching process; it may be this one.
        function: The function to call.
        arguments: Its arguments.
    """
    # The kernel's signal would come when the thread that started the worker ends, which may be long before.
    if os.getpid() != parent and parent not in _watched:
        _watched.add(parent)
        _watch(parent, signal.SIGKILL)
    return function(*arguments)


def follow_parent() -> None:
    """End this process when the command of this package that started it ends (:data:`PARENT` names it), or when the
    launcher of several processes ends. The end of a launcher is sent as SIGTERM, on which training saves a checkpoint.
    """
    starter, parent = os.environ.get(PARENT, ""), os.getppid()
    if starter == str(parent):
        end_with(parent)
        return
    if starter.isdigit() and not psutil.pid_exists(int(starter)):
        raise SystemExit("the command that started this process has ended")
    if "LOCAL_RANK" in os.environ:
        _watch(parent, signal.SIGTERM)


def _watch(parent: int, number: signal.Signals) -> None:
    """Send this process a signal once its parent has ended: the system gives orphans another parent."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, name="parent", daemon=True).start()


class Output:
    """Standard output and error of a command.

    Attributes:
        closed: Whether the program that read them through a pipe has ended.
    """

    closed = False

    def give_up(self) -> None:
        """Discard everything that is printed from now on."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in _pipes(hung_up=True):
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def read_by_somebody() -> Iterator[Output]:
    """Send this process SIGTERM as soon as the program that reads its output through a pipe ends, as in ``| head``.
    Otherwise a command that prints nothing for hours would not notice, and its helper processes would go on.
    """
    output, ended = Output(), threading.Event()

    def watch() -> None:
        poll = select.poll()
        for number in numbers:
            poll.register(number, 0)
        while not ended.is_set():
            if poll.poll(1000 * _LOOK_EVERY) and not ended.is_set():
                output.closed = True
                os.kill(os.getpid(), signal.SIGTERM)
                return

    numbers = _pipes() if hasattr(select, "poll") and threading.current_thread() is threading.main_thread() else []
    if numbers:
        threading.Thread(target=watch, name="output", daemon=True).start()
    try:
        yield output
    finally:
        ended.set()


def _pipes(hung_up: bool = False) -> list[int]:
    """The file descriptors of standard output and error that are pipes; with ``hung_up``, pipes without a reader."""
    found = []
    for number in (1, 2):
        try:
            mode = os.fstat(number).st_mode
        except OSError:  # closed
            continue
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            continue
        if hung_up:
            poll = select.poll()
            poll.register(number, 0)
            if not poll.poll(0):
                continue
        found.append(number)
    return found
