"""Processes of one run: how they find each other, and a launcher for clusters that take machines back.

    python -m latent_medi.launch --config_file configs/accelerate/two_nodes.yaml --machine_rank 0 … train.py --config …

is ``accelerate launch`` with the same options, and three things more, which a scheduler needs and Accelerate's launcher
does not do: SIGUSR1 and SIGTERM reach the processes that train, which then save; and it ends with their exit code, so
that "resume me" (:data:`RESUME`) can be told from a crash. If it is killed, so are they.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState

from latent_medi.core.device import check_precision, turn_tf32_off
from latent_medi.core.errors import RESUME, UserError
from latent_medi.core.processes import PARENT, environment
from latent_medi.core.progress import get_logger

logger = get_logger("launch")

NOTICES = (signal.SIGUSR1, signal.SIGTERM)
"""Signals by which a cluster announces that it takes a machine back."""

# Set for each process by every launcher that starts several (torch's, mpirun, srun with PMI).
_OF_SEVERAL = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_LEAVE_WITHIN = 20  # seconds


def make_accelerator(cpu: bool = False, patient: bool = False, **options: Any) -> Accelerator:
    """An :class:`accelerate.Accelerator` of which it is certain that it joins all processes that were launched.

    Accelerate joins processes without a GPU only if told that they have none: otherwise each of them believes to be
    alone, and they would write the same files.

    From then on fp32 is fp32 in this process, in training too: torch would round the factors of convolutions to TF32's
    ten bits, and only on GPUs. Whoever wants the speed of tensor cores sets precision to bf16.

    Args:
        cpu: Use processors even if there is a GPU.
        patient: Let processes wait for the slowest one for a week instead of torch's ten minutes; for work that is
            divided beforehand, where they meet at the end only.
        options: Of the accelerator.

    Raises:
        UserError: Fewer processes than asked for were started, or they do not find each other; or ``mixed_precision``
            is bf16, and the GPU does not compute in it.
    """
    environment = os.environ
    # Accelerate's launcher for one process notes ACCELERATE_USE_CPU, and an address only if asked for several.
    asked = "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
    if asked and not any(name in environment for name in _OF_SEVERAL):
        raise UserError(
            "Several processes were asked for, and one was started: `accelerate launch --cpu` starts one, whatever "
            "--num_processes and --num_machines say.",
            "Use --config_file configs/accelerate/cpu.yaml (with any --num_processes) in place of --cpu. If one "
            "process is what you want, unset MASTER_ADDR.",
        )
    launched = int(environment.get("WORLD_SIZE", 1))
    cpu = cpu or (launched > 1 and not torch.accelerator.is_available())
    if launched == 1 and PartialState._shared_state:
        cpu = False  # this process has its device; another one cannot be chosen now, and models are placed by name
    if not cpu:
        check_precision(options.get("mixed_precision"), "cuda")
    if patient:
        options["kwargs_handlers"] = [
            *options.get("kwargs_handlers", []),
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
        ]
    atexit.unregister(leave)
    atexit.register(leave)  # whatever ends this process, and whoever called: a command, or a program of a user's
    accelerator = Accelerator(cpu=cpu, **options)
    turn_tf32_off()  # after Accelerate, which turns it on for torch's compiler
    if accelerator.num_processes != launched and "WORLD_SIZE" in environment:
        raise UserError(
            f"{launched} processes were launched, and this one sees {accelerator.num_processes}.",
            "Launch with `accelerate launch`, or unset WORLD_SIZE.",
        )
    if accelerator.num_processes > 1 and accelerator.is_main_process:
        logger.info("%d processes; the first has %s.", accelerator.num_processes, accelerator.device)
    return accelerator


def leave() -> None:
    """Leave the group of processes that were launched together; nothing where there is none.

    A process that ended as a member would be aborted while its threads still serve the group. Nobody waits for a
    process that failed: what it has not done within 20 s is given up with the process, by SIGALRM. On GPUs the group is
    broken off instead: NCCL's leaving waits for all, and the first process may be at work after the last meeting.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not Python's handlers, which wait for what hangs
        signal.alarm(_LEAVE_WITHIN)
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)  # since torch 2.7
    if abort is not None and torch.distributed.get_backend() == "nccl":
        abort()
    else:
        torch.distributed.destroy_process_group()
    if hasattr(signal, "alarm"):
        signal.alarm(0)


def main(words: Sequence[str] | None = None) -> int:
    """``accelerate launch`` that passes notices on and returns the exit code of the process that failed first.

    A notice is waited out without a limit of time, since the cluster sets one. A process that it ended before it could
    take notice has nothing to save, so that is :data:`RESUME` too.

    Args:
        words: Options of ``accelerate launch``, the script and its arguments; the command line's by default.

    Returns:
        0, :data:`RESUME`, or the exit code (128 + the signal's number if it was killed).
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    noticed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        noticed.append(number)
        for process in psutil.Process().children():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue

    args = launch_command_parser().parse_args(words)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torch's launcher would give SIGTERM's receivers 30 s
    for number in NOTICES:
        signal.signal(number, pass_on)
    os.environ[PARENT] = str(os.getpid())
    if args.module:  # a script has its own folder on its path, and may need it
        os.environ.update(environment())
    try:
        launch_command(args)
        return 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        print(error, file=sys.stderr)
    except subprocess.CalledProcessError as error:
        code = error.returncode
    if any(code in (-number, 128 + number) for number in noticed):
        return RESUME
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
