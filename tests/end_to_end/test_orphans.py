"""No process outlives the command that started it, nor goes on when nobody reads what the command prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster_parts import REPOSITORY, SMALL, images_logged, images_saved, launcher, wait_until

from latent_medi.core.files import read_json

PROGRAM = """
import json, sys
from latent_medi import cli
from latent_medi.experiment.commands import run_in_parallel

def step(_):
    print("begun", flush=True)
    run_in_parallel({"long": json.loads(sys.argv[1])}, threads=1)

cli.VERBS["audit"] = (step, "")
sys.exit(cli.main(["audit"]))
"""
"""A command that has another one train, as an experiment's stages do."""


def train_words(tiny: Path, out: Path) -> list[str]:
    words = ["--config", "demo/medi", f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={out}"]
    return [*words, "max_steps=100000", "global_batch=8", "log_every_images=8", *SMALL]


def begun(
    words: list[str], out: Path, errors: Path, **pipes: int
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A command whose training has logged something, and all that it started."""
    with open(errors, "ab") as file:
        process = subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            **{"stdout": file, "stderr": file, **pipes},
        )
    wait_until(lambda: images_logged(out) > 0, process, errors, every=0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    return process, children


@pytest.mark.parametrize("how", ["killed", "stdout", "stderr"])
def test_a_step_ends_with_its_command(how: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-c", PROGRAM, json.dumps(["train", *train_words(tiny, out)])]
    pipes = {} if how == "killed" else {how: subprocess.PIPE}
    process, children = begun(words, out, tmp_path / "errors", **pipes)
    try:
        if how == "killed":
            process.kill()
        else:
            (process.stdout if how == "stdout" else process.stderr).close()  # type: ignore[union-attr]
        assert process.wait(timeout=60) == (-signal.SIGKILL if how == "killed" else 141)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        for each in children:
            if each.is_running():
                each.kill()
    if how != "killed":
        assert images_saved(out) > 0  # the step was told, and saved
        assert "Traceback" not in (tmp_path / "errors").read_text()


@pytest.mark.parametrize("module", ["latent_medi.launch", "accelerate.commands.launch"])
def test_launched_processes_end_with_their_launcher(module: str, tiny: Path, tmp_path: Path) -> None:
    """With ours at once; with another one, whose end may be the cluster's notice, once they have saved."""
    out = tmp_path / "run"
    words = [*launcher(2, 0, module=module), "train.py", *train_words(tiny, out)]
    process, children = begun(words, out, tmp_path / "errors")
    try:
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        for each in children:
            if each.is_running():
                each.kill()
    assert (images_saved(out) > 0) == (module != "latent_medi.launch")
    assert read_json(out / "run.json")["run"]


def test_workers_that_write_shards_end_with_their_command(tmp_path: Path) -> None:
    """They could overwrite what a rerun writes."""
    program = (
        "import time\nfrom latent_medi.shards.importing.workers import dispatch\n"
        "list(dispatch(time.sleep, [(300,)] * 2, jobs=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    working: list[psutil.Process] = []
    wait_until(
        lambda: (
            len(working) >= 2
            or working.extend(
                c for c in psutil.Process(process.pid).children() if "popen_loky" in " ".join(c.cmdline())
            )
        ),
        process,
        tmp_path / "errors",
        every=0.2,
    )
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(working, timeout=30)
    for each in alive:
        each.kill()
    assert not alive
