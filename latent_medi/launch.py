"""Joining the processes of one run, and a launcher for clusters that preempt jobs.

    python -m latent_medi.launch --config_file configs/accelerate/two_nodes.yaml --machine_rank 0 … train.py --config …

is ``accelerate launch`` with the same options, and does three more things. It passes SIGUSR1 and SIGTERM on to the
training processes, which then save a checkpoint. It returns their exit code, so that a scheduler can distinguish
"resume" (:data:`RESUME`) from a crash. If it is killed, they are killed too.

``python -m latent_medi.launch … -m latent_medi.cli run …`` starts the runner of an experiment, once per node and not
once per process; the runner launches each stage with the same options.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState

from latent_medi.core.device import check_precision, turn_tf32_off
from latent_medi.core.errors import RESUME, UserError
from latent_medi.core.processes import PARENT, RUNNER_OPTIONS, environment, follow_parent, python_words, run_program
from latent_medi.core.progress import get_logger

logger = get_logger("launch")

NOTICES = (signal.SIGUSR1, signal.SIGTERM)
"""Signals by which a cluster announces preemption."""

# Variables that launchers of several processes set (torch, mpirun, srun with PMI).
_OF_SEVERAL = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_LEAVE_WITHIN = 20  # seconds


def make_accelerator(cpu: bool = False, patient: bool = False, **options: Any) -> Accelerator:
    """An :class:`accelerate.Accelerator` that joins all launched processes.

    Accelerate joins processes without a GPU only if ``cpu`` is set. Otherwise each of them would run alone, and all
    would write the same files.

    Also turns TF32 off in this process, because torch would round the factors of convolutions on GPUs to ten bits. Set
    the precision to bf16 to use tensor cores.

    Args:
        cpu: Use the CPU even if there is a GPU.
        patient: Let processes wait a week for the slowest one, instead of torch's ten minutes; for processes that work
            independently and only meet at the end.
        options: Arguments of the accelerator.

    Raises:
        UserError: Not all processes were started, or they do not find each other; or ``mixed_precision`` is bf16 and
            the GPU does not support it.
    """
    environment = os.environ
    # Accelerate's launcher of one process sets MASTER_ADDR only if several processes were requested.
    several = "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
    if several and not any(name in environment for name in _OF_SEVERAL):
        raise UserError(
            "Only one process was started: `accelerate launch --cpu` ignores --num_processes and --num_machines.",
            "Use --config_file configs/accelerate/cpu.yaml with --num_processes instead of --cpu. To run one process, "
            "unset MASTER_ADDR.",
        )
    launched = int(environment.get("WORLD_SIZE", 1))
    cpu = cpu or (launched > 1 and not torch.accelerator.is_available())
    if launched == 1 and PartialState._shared_state:
        cpu = False  # the device of this process is already chosen
    if not cpu:
        check_precision(options.get("mixed_precision"), "cuda")
    if patient:
        options["kwargs_handlers"] = [
            *options.get("kwargs_handlers", []),
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
        ]
    atexit.unregister(leave)
    atexit.register(leave)  # also in a user's program
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
    """Leave the group of launched processes, if there is one.

    A process that ends as a member of the group would be aborted by the group's threads. Leaving takes at most 20 s,
    then SIGALRM ends the process: others do not wait for a process that failed. On GPUs the group is aborted instead,
    because NCCL would wait for all processes while the first one may still work.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # Python's own handlers would not run while the call hangs
        signal.alarm(_LEAVE_WITHIN)
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)  # since torch 2.7
    if abort is not None and torch.distributed.get_backend() == "nccl":
        abort()
    else:
        torch.distributed.destroy_process_group()
    if hasattr(signal, "alarm"):
        signal.alarm(0)


def main(words: Sequence[str] | None = None) -> int:
    """Run ``accelerate launch``, pass signals on, and return the exit code of the process that failed first.

    After a signal it waits without a time limit, because the cluster has one. A process that the signal ended before it
    could handle it has nothing to save: that is :data:`RESUME` too.

    Args:
        words: Options of ``accelerate launch``, the script and its arguments; by default those of the command line.

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
            except psutil.NoSuchProcess:  # it has ended
                continue

    words = list(sys.argv[1:] if words is None else words)
    args = launch_command_parser().parse_args(words)
    if args.module and args.training_script == "latent_medi.cli" and args.training_script_args[:1] == ["run"]:
        _become_runner(words[: -len(args.training_script_args) - 1], args.training_script_args)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torch's launcher would kill the processes 30 s after SIGTERM
    for number in NOTICES:
        signal.signal(number, pass_on)
    follow_parent()
    os.environ[PARENT] = str(os.getpid())
    if args.module:  # a script may need modules from its own folder
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


def _become_runner(options: list[str], words: list[str]) -> NoReturn:
    """Replace this process by the runner of an experiment, which has this process's number and gets its signals."""
    command = python_words("latent_medi.cli", *words)
    os.execve(command[0], command, environment(**{RUNNER_OPTIONS: json.dumps(options)}))


if __name__ == "__main__":
    run_program(main)
