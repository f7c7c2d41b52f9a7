"""An experiment on several nodes: the runner of node 0 decides, and those of the others take their part in each command
that it launches.

Node 0 keeps a store that the others ask for the next command (:class:`torch.distributed.TCPStore`). What runs in the
runner itself, such as the evaluation, runs on node 0 while the others wait. The others notice by their connection that
node 0 is gone. Each of them gives the store a new sign of life every few seconds, and node 0 notices when they stop.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from latent_medi.core.errors import BAD_INPUT, RESUME, Preempted, UserError
from latent_medi.core.progress import get_logger
from latent_medi.experiment.commands import run_in_parallel, run_words
from latent_medi.experiment.launching import Launching, free_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

log = get_logger(__name__)

_MEET_WITHIN = 600  # seconds in which all nodes must have started
_LOOK_EVERY = 0.2  # seconds
_END_WITHIN = 20  # seconds in which the others learn that node 0 has ended
_BEAT_EVERY = 5  # seconds between two signs of life of a node
_SILENT_FOR = 60  # seconds without a sign of life after which a node is gone


class Leader:
    """Node 0 of an experiment on several nodes.

    Args:
        launching: Where it runs.
    """

    def __init__(self, launching: Launching) -> None:
        self._launching = launching
        self._store = _store(launching)
        self._number = 0
        self._beats: dict[int, tuple[bytes, float]] = {}  # by node: its last sign of life, and since when

    def announce(self, command: Sequence[str]) -> int:
        """Tell the other nodes to start a command; returns the port at which its processes meet."""
        port = free_port()
        self._tell({"command": list(command), "port": port})
        return port

    def failed(self) -> bool:
        """Whether another node's part of the last announced command has failed, or a node is gone that was there."""
        failed, now = f"failed/{self._number}", time.monotonic()
        for node in range(1, self._launching.nodes):
            if not self._store.check([f"alive/{node}"]):
                continue
            beat = self._store.get(f"alive/{node}")
            last, since = self._beats.get(node, (b"", now))
            if beat != last:
                self._beats[node] = beat, now
            elif now > since + _SILENT_FOR:
                self._store.set(failed, "")  # the other nodes look there
        return bool(self._store.check([failed]))

    def end(self, code: int) -> None:
        """Tell the other nodes that the experiment has ended, and wait until they know."""
        self._tell({"end": code})
        end = time.monotonic() + _END_WITHIN
        others = [f"left/{node}" for node in range(1, self._launching.nodes)]
        while time.monotonic() < end and not self._store.check(others):
            time.sleep(_LOOK_EVERY)

    def _tell(self, message: dict[str, object]) -> None:
        self._number += 1
        self._store.set(f"say/{self._number}", json.dumps(message))


def run_launched(
    commands: Mapping[str, Sequence[str]], launching: Launching, leader: Leader | None = None, at_once: int = 0
) -> None:
    """Run ``latent-medi`` commands on all processes that there are: one after the other if they are several, otherwise
    several at the same time.

    Args:
        commands: Words after ``latent-medi`` by the name to show.
        launching: The processes.
        leader: Starts the stages on other nodes, if there are any.
        at_once: How many commands of one process each at the same time, sharing the cores; 0 means 2 on a machine
            without a GPU, otherwise 1.
    """
    if launching.processes > 1:
        failed = leader.failed if leader else lambda: False
        for name, words in commands.items():
            port = leader.announce(words) if leader else 0
            run_words({name: launching.words(words, port)}, launching.threads, failed)
        return
    import torch

    names = list(commands)
    at_once = at_once or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    at_once = min(at_once, len(names)) or 1
    for start in range(0, len(names), at_once):
        together = {name: commands[name] for name in names[start : start + at_once]}
        run_in_parallel(together, threads=max(1, (os.cpu_count() or 1) // at_once))


@contextmanager
def leading(launching: Launching) -> Iterator[Leader | None]:
    """Lead the other nodes while an experiment runs; ``None`` if there are none. They end with its exit code."""
    if launching.nodes == 1:
        yield None
        return
    leader, code = Leader(launching), 1
    try:
        yield leader
        code = 0
    except UserError:
        code = BAD_INPUT
        raise
    except Preempted:
        code = RESUME
        raise
    finally:
        leader.end(code)


def follow(launching: Launching) -> None:
    """Take part in the commands of node 0 until it ends.

    Raises:
        UserError: The experiment ended because of its settings or input; node 0 says which.
        Preempted: It was asked to stop.
        RuntimeError: It failed, or node 0 is gone.
    """
    store, number, name = _store(launching), 0, f"node {launching.node}"
    log.info("node %d of %d: follows node 0 at %s", launching.node, launching.nodes, launching.address)
    with _heartbeat(launching):
        while True:
            number += 1
            said = _next(store, f"say/{number}")
            if "end" in said:
                with suppress(RuntimeError):
                    store.set(f"left/{launching.node}", "")
                _end(int(said["end"]))
                return
            words = launching.words(said["command"], int(said["port"]))
            try:
                run_words({name: words}, launching.threads, partial(_failed, store, number))
                continue
            except (Preempted, UserError, RuntimeError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            with suppress(RuntimeError):
                store.set(f"failed/{number}", "")


@contextmanager
def _heartbeat(launching: Launching) -> Iterator[None]:
    """Context in which a thread with a connection of its own gives the store signs of life of this node."""
    store, ended = _store(launching), threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # node 0 is gone
            while not ended.is_set():
                store.set(f"alive/{launching.node}", str(time.monotonic_ns()))
                ended.wait(_BEAT_EVERY)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=_BEAT_EVERY)


def _failed(store: TCPStore, number: int) -> bool:
    """Whether a command has failed on another node, or node 0 is gone."""
    try:
        return bool(store.check([f"failed/{number}"]))
    except RuntimeError:  # the connection is closed
        return True


def _store(launching: Launching) -> TCPStore:
    from torch.distributed import TCPStore

    try:
        return TCPStore(
            launching.address,
            launching.port,
            is_master=launching.node == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=_MEET_WITHIN),
        )
    except RuntimeError as error:
        where = f"{launching.address}:{launching.port}"
        problem = f"The nodes do not meet at {where} ({str(error).splitlines()[0]})."
        raise UserError(problem, "Is it node 0's address, and free? Start every node within ten minutes.") from None


def _next(store: TCPStore, key: str) -> dict[str, Any]:
    try:
        while not store.check([key]):
            time.sleep(_LOOK_EVERY)
        return dict(json.loads(store.get(key)))
    except RuntimeError:  # the connection is closed
        raise RuntimeError("Node 0 is gone; the same command continues.") from None


def _end(code: int) -> None:
    if code == BAD_INPUT:
        raise UserError("The experiment has ended; node 0 says why.")
    if code == RESUME:
        raise Preempted("node 0 was asked to stop; the same command continues")
    if code:
        raise RuntimeError("The experiment has failed on node 0. The same command continues.")
