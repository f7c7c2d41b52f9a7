"""Launching, watching and killing real runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.log import read_log

REPOSITORY = Path(__file__).resolve().parents[1]
ALONE = [sys.executable]
LONGEST = 300  # seconds that anything waited for may take
SMALL = ["model.block_out_channels=[16,32]", "model.attention=[false,true]", "model.attention_head_dim=16"]
SMALL += ["model.layers_per_block=1", "model.norm_num_groups=8"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(processes: int, port: int, *options: str, module: str = "latent_medi.launch") -> list[str]:
    """Words that start ``processes`` processes on this machine's processors, over all its nodes."""
    words = [sys.executable, "-m", module, "--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu.yaml")]
    return [*words, "--num_processes", str(processes), "--main_process_port", str(port), *options]


def start(words: list[str], errors: Path) -> subprocess.Popen[bytes]:
    """Start a command in the repository's folder; what it prints is appended to a file."""
    with open(errors, "ab") as file:
        return subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(
    true: Callable[[], object], process: subprocess.Popen[bytes], errors: Path, every: float = 0.001
) -> None:
    """Wait for something to become true while a command runs."""
    end = time.monotonic() + LONGEST
    while not true():
        assert process.poll() is None, f"ended with {process.returncode}:\n{errors.read_text()[-4000:]}"
        assert time.monotonic() < end, errors.read_text()[-4000:]
        time.sleep(every)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a command and all that it started (a launcher's processes have groups of their own), as when a machine
    loses its power."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in everyone:
        if child.is_running():
            child.kill()
    process.wait()
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive


def images_logged(out: Path) -> int:
    """Images seen when the last row of a run's log was written."""
    rows = read_log(out / "log.csv")
    return int(rows[-1]["images"]) if rows else 0


def images_saved(out: Path) -> int:
    """Images seen in the newest checkpoint."""
    found = checkpoint_folders(out / "checkpoints")
    return found[-1][0] if found else 0


def losses(out: Path) -> dict[int, tuple[str, str, str]]:
    """Loss, learning rate and gradient norm of every row of the log, in every digit, by images seen."""
    return {int(row["images"]): (row["loss"], row["lr"], row["grad_norm"]) for row in read_log(out / "log.csv")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": value for f in files for name, value in load_file(f).items()}


def everything(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished run: the model (averaged weights) and the last checkpoint (weights, averages,
    optimizer)."""
    last = checkpoint_folders(out / "checkpoints")[-1][1]
    return {**{f"model/{k}": v for k, v in tensors(out / "model").items()}, **tensors(last)}


def assert_same_bits(a: Path, b: Path) -> None:
    """Two finished runs agree in every bit and every logged number."""
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(a) == losses(b)


def relative_distance(a: Path, b: Path, part: str) -> float:
    """‖Δw‖/‖w‖ over the whole network; ``part`` is "model.safetensors" (last weights) or "model/unet" (averages)."""
    ours, theirs = everything(a), everything(b)
    names = [name for name in ours if name.startswith(part)]
    assert names
    assert ours.keys() == theirs.keys()
    before, after = (torch.cat([run[name].double().flatten() for name in names]) for run in (ours, theirs))
    return float((before - after).norm() / before.norm())
