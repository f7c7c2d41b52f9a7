"""An experiment on several nodes: the runner of node 0 decides, and those of the others take their part in each command
that it launches.

Node 0 keeps a store that the others ask for the next command (:class:`torch.distributed.TCPStore`). What runs in the
runner itself, such as the evaluation, runs on node 0 while the others wait. A node whose runner is gone is noticed by
its connection.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
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


class Leader:
    """Node 0 of an experiment on several nodes.

    Args:
        launching: Where it runs.
    """

    def __init__(self, launching: Launching) -> None:
        self._launching = launching
        self._store = _store(launching)
        self._number = 0

    def announce(self, command: Sequence[str]) -> int:
        """Tell the other nodes to start a command; returns the port at which its processes meet."""
        port = free_port()
        self._tell({"command": list(command), "port": port})
        return port

    def failed(self) -> bool:
        """Whether another node's part of the last announced command has failed."""
        return bool(self._store.check([f"failed/{self._number}"]))

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
    store, number = _store(launching), 0
    log.info("node %d of %d: follows node 0 at %s", launching.node, launching.nodes, launching.address)
    while True:
        number += 1
        said = _next(store, f"say/{number}")
        if "end" in said:
            with suppress(RuntimeError):
                store.set(f"left/{launching.node}", "")
            _end(int(said["end"]))
            return
        name = f"node {launching.node}"
        try:
            run_words({name: launching.words(said["command"], int(said["port"]))}, launching.threads)
        except Preempted:
            pass  # node 0 knows, and says so
        except (UserError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            with suppress(RuntimeError):
                store.set(f"failed/{number}", "")


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
