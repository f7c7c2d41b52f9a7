"""How the commands of an experiment are started: by themselves, or by the launcher on every GPU of every node.

On one node the runner itself says how many processes there are. On several, the launcher starts a runner on each node,
``python -m latent_medi.launch OPTIONS -m latent_medi.cli run …``, and the runner hands these options on to the launcher
of each command.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.processes import RUNNER_OPTIONS, python_words

PORTS = 100
"""Ports after that of node 0, at one of which the processes of a command meet."""


@dataclass(frozen=True)
class Launching:
    """Where and how the commands of an experiment run.

    Args:
        processes: Processes of a command, on all nodes together.
        nodes: Number of nodes.
        node: Number of this node; 0 is the one that decides.
        address: Address of node 0.
        port: Port on which node 0 sends the others what to run; the processes of a command meet at one after it.
        options: Options of the launcher besides those for the above.
    """

    processes: int = 1
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    options: tuple[str, ...] = ()

    @property
    def threads(self) -> int | None:
        """Threads that each process of a launched command may use; ``None`` where OMP_NUM_THREADS says so."""
        if "OMP_NUM_THREADS" in os.environ:
            return None
        from joblib import cpu_count  # those that a job or a container may use

        return max(1, cpu_count() // max(1, self.processes // self.nodes))

    def words(self, command: Sequence[str], port: int = 0) -> list[str]:
        """The words of this node's part of a ``latent-medi`` command.

        Args:
            command: Words after ``latent-medi``.
            port: Port at which the processes of all nodes meet; 0 finds a free one of this node.
        """
        if self.processes == 1:
            return python_words("latent_medi.cli", *command)
        options = [*self.options, "--num_processes", str(self.processes), "--num_machines", str(self.nodes)]
        options += ["--machine_rank", str(self.node), "--main_process_ip", self.address]
        options += ["--main_process_port", str(port or free_port()), "-m"]
        return python_words("latent_medi.launch", *options, "latent_medi.cli", *command)


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_after(port: int) -> int:
    """The first free one of the :data:`PORTS` ports of this machine after ``port``, so that a firewall between nodes
    can let them through.

    Raises:
        UserError: None is free.
    """
    for candidate in range(port + 1, min(port + PORTS, 65535) + 1):
        with socket.socket() as probe, suppress(OSError):
            # As torch does: connections of a command that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", candidate))
            return candidate
    raise UserError(
        f"None of the {PORTS} ports after {port} is free on node 0, where the processes of a command meet.",
        "Choose another --main_process_port.",
    )


def launching(launch_processes: int = 0) -> Launching:
    """How this process, which runs an experiment, starts its commands.

    Args:
        launch_processes: Processes per node; 0 means one per GPU, and one on a machine without.

    Raises:
        UserError: There are fewer GPUs than that; several runners were launched on one node; or the number differs from
            that of the launcher which started this process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "Several processes were launched, and each would run the whole experiment.",
            "Start `latent-medi run` by itself; it launches each stage on all GPUs.",
        )
    if given := os.environ.get(RUNNER_OPTIONS):
        return _as_launched(json.loads(given), launch_processes)
    several = ("--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no")
    return Launching(_per_node(launch_processes), options=several)


def _per_node(launch_processes: int) -> int:
    """Processes of this node where the launcher does not say."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and launch_processes > gpus:
        raise UserError(
            f"launch_processes is {launch_processes}, and this machine has {gpus} GPU{'s' * (gpus > 1)}.",
            "Give as many as there are GPUs, or leave it out.",
        )
    return launch_processes or gpus or 1


def _as_launched(words: Sequence[str], launch_processes: int) -> Launching:
    """What the options say by which the launcher started this runner."""
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args([*words, "latent_medi.cli"])
    known = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "module")
    values = {name: getattr(parsed, name) for name in known}
    from_file = _of_file(parsed.config_file)
    values |= {name: from_file[name] for name in known if values[name] is None and from_file.get(name) is not None}
    nodes = int(values["num_machines"] or 1)
    processes = int(values["num_processes"] or _per_node(launch_processes) * nodes)
    if launch_processes and launch_processes * nodes != processes:
        raise UserError(
            f"launch_processes is {launch_processes}, and the launcher was given {processes} processes on {nodes} "
            "nodes.",
            "Leave launch_processes out.",
        )
    return Launching(
        processes,
        nodes,
        int(values["machine_rank"] or 0),
        str(values["main_process_ip"] or "127.0.0.1"),
        int(values["main_process_port"] or 29500),
        tuple(words),
    )


def _of_file(path: str | None) -> dict[str, Any]:
    """The values of a configuration file of Accelerate."""
    if path is None:
        return {}
    from accelerate.commands.config.config_args import load_config_from_file

    return dict(load_config_from_file(path).to_dict())
