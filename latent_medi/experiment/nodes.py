"""An experiment on several nodes: the runner of node 0 decides, and those of the others take their part in each command
that it launches.

Node 0 keeps a store that the others ask for the next command (:class:`torch.distributed.TCPStore`). What runs in the
runner itself, such as the evaluation, runs on node 0 while the others wait. The others notice by their connection that
node 0 is gone. Each of them gives the store a new sign of life every few seconds, and node 0 notices when they stop.

The store's keys: ``say/N`` is the N-th thing that node 0 says, a command or the end; ``stop/N``: a node was asked to
stop that command; ``over/N``: a node's part of it has stopped or failed. By node: ``alive/K``; ``gone/K``: it was asked
to stop and takes part in nothing any more; ``left/K``: it knows that the experiment has ended.
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
from typing import TYPE_CHECKING, Any

from latent_medi.core.errors import BAD_INPUT, RESUME, Preempted, UserError
from latent_medi.core.progress import get_logger
from latent_medi.experiment.commands import run_in_parallel, run_words
from latent_medi.experiment.launching import Launching, port_after

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
        """Tell the other nodes to start a command; returns the port of this node at which its processes meet.

        Raises:
            Preempted: Another node was asked to stop, and has left.
            UserError: No port is free.
        """
        if gone := self._gone():
            raise Preempted(f"node {gone[0]} was asked to stop; the same command continues")
        port = port_after(self._launching.port)
        self._tell({"command": list(command), "port": port})
        return port

    def ask_to_stop(self) -> None:
        """Have the other nodes stop the last announced command."""
        self._store.set(f"stop/{self._number}", "")

    def asked_to_stop(self) -> bool:
        """Whether another node was asked to stop."""
        return bool(self._store.check([f"stop/{self._number}"]) or self._gone())

    def over(self) -> bool:
        """Whether another node's part of the last announced command has stopped or failed, or a node is gone that was
        there."""
        over, now = f"over/{self._number}", time.monotonic()
        for node in range(1, self._launching.nodes):
            if not self._store.check([f"alive/{node}"]):
                continue
            beat = self._store.get(f"alive/{node}")
            last, since = self._beats.get(node, (b"", now))
            if beat != last:
                self._beats[node] = beat, now
            elif now > since + _SILENT_FOR:
                self._store.set(over, "")  # the other nodes look there
        return bool(self._store.check([over]) or self._gone())

    def end(self, code: int) -> None:
        """Tell the other nodes that the experiment has ended, and wait until they know."""
        if code == RESUME:
            self.ask_to_stop()
        if code:
            self._store.set(f"over/{self._number}", "")
        self._tell({"end": code})
        end = time.monotonic() + _END_WITHIN
        others = [f"left/{node}" for node in range(1, self._launching.nodes)]
        while time.monotonic() < end and not self._store.check(others):
            time.sleep(_LOOK_EVERY)

    def _gone(self) -> list[int]:
        """Other nodes that take part in nothing any more."""
        return [node for node in range(1, self._launching.nodes) if self._store.check([f"gone/{node}"])]

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
        for name, words in commands.items():
            port = leader.announce(words) if leader else 0
            run_words({name: launching.words(words, port)}, launching.threads, leader)
        return
    names = list(commands)
    at_once, threads = cores_shared(len(names), at_once)
    for start in range(0, len(names), at_once):
        run_in_parallel({name: commands[name] for name in names[start : start + at_once]}, threads=threads)


def cores_shared(commands: int, at_once: int = 0) -> tuple[int, int]:
    """How many commands of one process each run at the same time, and the threads of each.

    Args:
        commands: How many there are.
        at_once: As for :func:`run_launched`.

    Returns:
        The commands at the same time, and the threads of each: OMP_NUM_THREADS where it is set, else its share of the
        cores. Threads that wait for one another while others have the core cost many times the work.
    """
    import torch
    from joblib import cpu_count

    cores = cpu_count()
    at_once = min(at_once or (1 if torch.cuda.is_available() else min(2, cores)), commands) or 1
    return at_once, torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, cores // at_once)


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


class _Follower:
    """What another node than 0 reports and reads of the last announced command.

    Args:
        store: Of node 0.
        number: Of the command.
    """

    def __init__(self, store: TCPStore, number: int) -> None:
        self._store, self._number = store, number

    def ask_to_stop(self) -> None:
        """Have the other nodes stop the command."""
        with suppress(RuntimeError):  # node 0 is gone
            self._store.set(f"stop/{self._number}", "")

    def asked_to_stop(self) -> bool:
        """Whether another node was asked to stop."""
        try:
            return bool(self._store.check([f"stop/{self._number}"]))
        except RuntimeError:  # the connection is closed
            return False

    def over(self) -> bool:
        """Whether another node's part of the command has stopped or failed, or node 0 is gone."""
        try:
            return bool(self._store.check([f"over/{self._number}"]))
        except RuntimeError:
            return True


def follow(launching: Launching) -> None:
    """Take part in the commands of node 0 until it ends.

    Raises:
        UserError: The experiment ended because of its settings or input; node 0 says which.
        Preempted: It was asked to stop, here or on another node.
        RuntimeError: It failed, or node 0 is gone.
    """
    store = _store(launching)
    log.info("node %d of %d: follows node 0 at %s", launching.node, launching.nodes, launching.address)
    with _heartbeat(launching):
        try:
            _take_part(store, launching)
        except Preempted:  # also between two commands
            with suppress(RuntimeError):
                store.set(f"gone/{launching.node}", "")
            raise


def _take_part(store: TCPStore, launching: Launching) -> None:
    number, name, stopped = 0, f"node {launching.node}", False
    while True:
        number += 1
        try:
            said = _next(store, f"say/{number}")
        except RuntimeError:  # the connection is closed
            if stopped:  # node 0 does not wait for one that takes long to save
                raise Preempted("asked to stop; the same command continues") from None
            raise RuntimeError("Node 0 is gone; the same command continues.") from None
        if "end" in said:
            with suppress(RuntimeError):
                store.set(f"left/{launching.node}", "")
            _end(int(said["end"]))
            return
        if stopped:  # node 0 was through with the command before, and goes on
            raise Preempted("asked to stop; the same command continues")
        words, others = launching.words(said["command"], int(said["port"])), _Follower(store, number)
        try:
            run_words({name: words}, launching.threads, others)
            continue
        except (Preempted, UserError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            if stopped := isinstance(error, Preempted):
                others.ask_to_stop()
        with suppress(RuntimeError):
            store.set(f"over/{number}", "")


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
    """What node 0 says under a key.

    Raises:
        RuntimeError: The connection is closed.
    """
    while not store.check([key]):
        time.sleep(_LOOK_EVERY)
    return dict(json.loads(store.get(key)))


def _end(code: int) -> None:
    if code == BAD_INPUT:
        raise UserError("The experiment has ended; node 0 says why.")
    if code == RESUME:
        raise Preempted("node 0 was asked to stop; the same command continues")
    if code:
        raise RuntimeError("The experiment has failed on node 0. The same command continues.")
