"""Launched processes leave their group however they end, and one that fails waits for nobody."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from cluster_parts import REPOSITORY, launcher

PROGRAM = """
import atexit, os, signal, sys, time
from pathlib import Path
import torch
out, how = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]

@atexit.register  # those registered later are called before
def note():
    (out / f"rank-{rank}").write_text(str(torch.distributed.is_initialized()))

from latent_medi import cli
from latent_medi.core.errors import UserError
from latent_medi.launch import make_accelerator

def verb(words):
    accelerator = make_accelerator(cpu=True, patient=True)
    accelerator.wait_for_everyone()
    if how == "refused":
        raise UserError("refused")
    if how == "failed":
        raise RuntimeError("failed")
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if how == "alone" and rank == "0":
        torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        raise UserError("refused alone")
    if how == "alone":
        time.sleep(200)
    return {}

cli.VERBS["audit"] = (verb, "")
if how == "program":
    verb([])
else:
    sys.exit(cli.main(["audit"]))
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [("returned", 0), ("program", 0), ("refused", 2), ("failed", 1), ("interrupted", 130), ("terminated", 143)],
)
def test_the_group_is_left(how: str, code: int, tmp_path: Path) -> None:
    done, _ = launched(how, tmp_path)
    assert done.returncode == code, done.stderr
    assert "terminate called" not in done.stderr
    notes = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    there = [note.read_text() for note in notes if note.exists()]  # the launcher ends others when one has failed
    assert set(there) == {"False"}
    assert code or len(there) == 2


@pytest.mark.slow
def test_one_that_fails_alone_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """Though it has asked them for something that they will never give."""
    done, seconds = launched("alone", tmp_path)
    assert done.returncode != 0
    assert "refused alone" in done.stderr
    assert seconds < 150


def launched(how: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    start = time.monotonic()
    done = subprocess.run(
        [*launcher(2, 0), str(program), str(folder), how],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done, time.monotonic() - start
