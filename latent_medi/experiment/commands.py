"""Commands of this program that an experiment runs in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from latent_medi.core.errors import BAD_INPUT, RESUME, Preempted, UserError
from latent_medi.core.processes import PARENT, environment, python_words

_NOTICES = (signal.SIGUSR1, signal.SIGTERM)
_NOTICE_FOR = 5.0  # seconds in which another node that was asked to stop says so
_ALONE_FOR = 30  # seconds that this node's part of a command may go on after another's has ended without success
_STOP_WITHIN = 300  # seconds in which it must then end by itself: one that waits for the other gets no signal


class OtherNodes(Protocol):
    """The parts of a command that run on other nodes."""

    def ask_to_stop(self) -> None:
        """Tell the other nodes that this one was asked to stop."""

    def asked_to_stop(self) -> bool:
        """Whether another node was asked to stop."""

    def over(self) -> bool:
        """Whether another node's part has stopped or failed, or the node is gone."""


class NoOtherNodes:
    """All parts of a command run on this node."""

    def ask_to_stop(self) -> None:
        """There is nobody to tell."""

    def asked_to_stop(self) -> bool:
        """Never."""
        return False

    def over(self) -> bool:
        """Never."""
        return False


def run_in_parallel(commands: Mapping[str, Sequence[str]], threads: int | None = None) -> None:
    """Run ``latent-medi`` commands in parallel, one process each; see :func:`run_words`.

    Args:
        commands: Words after ``latent-medi`` by the name to show.
        threads: Threads that each may use; ``None`` for as many as this process may.
    """
    run_words({name: python_words("latent_medi.cli", *words) for name, words in commands.items()}, threads)


def run_words(commands: Mapping[str, list[str]], threads: int | None = None, others: OtherNodes | None = None) -> None:
    """Run commands in parallel, and prefix their logs with their names. SIGUSR1 and SIGTERM are passed on to them, and
    to their parts on other nodes.

    Args:
        commands: Their words by the name to show.
        threads: Threads that each process may use; ``None`` for as many as this process may.
        others: Their parts on other nodes.

    Raises:
        UserError: One was given what it cannot follow, and has said so; the others are stopped.
        Preempted: They were asked to stop, and have; the same command continues.
        RuntimeError: One failed; the others are stopped.
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

    with _notices_passed_on(running) as noticed:
        try:
            for name, words in commands.items():
                process = subprocess.Popen(
                    words,
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
                if noticed:  # between two starts
                    process.send_signal(noticed[-1])
            _wait(running, noticed, others or NoOtherNodes())
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            for reader in readers:
                reader.join(timeout=5)


@contextmanager
def _notices_passed_on(running: Mapping[str, subprocess.Popen[str]]) -> Iterator[list[int]]:
    """Context in which a notice of the cluster goes to the running commands; yields the notices that came."""
    noticed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        noticed.append(number)
        for process in list(running.values()):
            process.send_signal(number)  # nothing if it has ended

    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = {number: signal.signal(number, pass_on) for number in _NOTICES}
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: dict[str, subprocess.Popen[str]], noticed: list[int], others: OtherNodes) -> None:
    """Wait for commands, and remove those that have ended."""
    stopping, over_since = False, None
    while running:
        if noticed and not stopping:  # before they end: their parts elsewhere would take that for a failure
            others.ask_to_stop()
            stopping = True
        for name, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[name]
                _check(name, code, asked=bool(noticed) or (code not in (0, RESUME) and _asked_elsewhere(others)))
        if running and not noticed and others.asked_to_stop():
            noticed.append(signal.SIGTERM)
            stopping = True
            for process in running.values():
                process.terminate()
        if running and others.over():
            over_since = over_since or time.monotonic()
            if time.monotonic() > over_since + _ALONE_FOR:
                _stop(running)
                if noticed:
                    break
                raise RuntimeError("Another node has failed. The same command continues.")
        time.sleep(0.1)
    if noticed:  # all ended as if nothing had been asked, or could not hear it
        raise Preempted("asked to stop; the same command continues")


def _asked_elsewhere(others: OtherNodes) -> bool:
    """Whether another node was asked to stop. Its processes may end, and those here fail for want of them, a moment
    before it says so.
    """
    end = time.monotonic() + (0 if isinstance(others, NoOtherNodes) else _NOTICE_FOR)
    while not (asked := others.asked_to_stop()) and time.monotonic() < end:
        time.sleep(0.1)
    return asked


def _check(name: str, code: int, asked: bool) -> None:
    """Raise what the exit code of a command means; ``asked`` says that it was asked to stop."""
    if code == RESUME or (code and asked):
        raise Preempted(f"{name} was asked to stop; the same command continues")
    if code == BAD_INPUT:
        raise UserError(f"{name} cannot go on; its message is above.", "Mend that and repeat the command.")
    if code:
        raise RuntimeError(f"{name} ended with exit code {code}; its messages are above. The same command continues.")


def _stop(running: Mapping[str, subprocess.Popen[str]]) -> None:
    """End commands that cannot go on, by force if they do not end by themselves."""
    for process in running.values():
        process.terminate()
    end = time.monotonic() + _STOP_WITHIN
    for process in running.values():
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def resumable() -> Iterator[None]:
    """Context in which SIGUSR1 and SIGTERM, by which a cluster takes the machine back, end this process's own work as
    :class:`Preempted`: what it has finished is kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        for number in _NOTICES:  # a second one would interrupt the cleanup
            signal.signal(number, signal.SIG_IGN)
        raise Preempted("asked to stop; the same command continues")

    before = {number: signal.signal(number, stop) for number in _NOTICES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
