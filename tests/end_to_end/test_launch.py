"""The entry points as a user launches them: ``accelerate launch`` on two processes, and alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster_parts import ALONE, REPOSITORY, SMALL, launcher, losses, relative_distance
from parts import make_cohort

from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.shards.dataset import PatchDataset

TWO = launcher(2, 0, module="accelerate.commands.launch")


def run(launcher: list[str], *arguments: str | Path, open_files: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run an entry point in the repository's folder; no process may have more than ``open_files`` open."""
    limit = None if open_files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.slow
def test_two_launched_processes_train_a_model_that_sample_reads(tiny: Path, tmp_path: Path) -> None:
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={tmp_path / 'run'}"]
    small = ["max_steps=20", "global_batch=8", "log_every_images=80", *SMALL]
    trained = run(TWO, "train.py", "--config", "demo/medi", *where, *small)
    assert trained.returncode == 0, trained.stderr
    assert "2 processes" in trained.stderr  # not one, nor two that know nothing of each other
    model = tmp_path / "run" / "model"
    pipeline = MediPipeline.from_pretrained(model)
    assert pipeline(class_="tumour", site="NA", num_images=2, steps=2).images[1].size == (32, 32)

    plan = tmp_path / "plan.csv"
    plan.write_text("class,site,age,count,verdict,seed\ntumour,birch,50,3,seen,1\nbenign,NA,unknown,2,seen,2\n")
    made = {}
    for name, words in (("two", TWO), ("one", ALONE)):
        made[name] = tmp_path / name
        sampled = run(
            words,
            "sample.py",
            f"model={model}",
            f"plan={plan}",
            f"out={made[name]}",
            "sampler.steps=2",
            "device_batch=4",
        )
        assert sampled.returncode == 0, sampled.stderr
        assert ("2 processes" in sampled.stderr) == (name == "two")
    one, two = (PatchDataset.open(made[name]) for name in ("one", "two"))
    assert one.index["class"].tolist() == ["tumour"] * 3 + ["benign"] * 2
    assert set(one.index["origin"]) == {"synthetic"}
    assert one.index.equals(two.index)
    for name in sorted(p.name for p in (one.folder / "data").iterdir()):
        assert (one.folder / "data" / name).read_bytes() == (two.folder / "data" / name).read_bytes()


@pytest.mark.slow
def test_two_launched_processes_train_straight_from_images(tiny: Path, tmp_path: Path) -> None:
    """Every process streams its own share, and the run is that of stored latents."""
    source = json.loads((tiny / "latents" / "latents.json").read_text())["autoencoder"]["source"]
    for name, latents in (("stored", f"latents={tiny / 'latents'}"), ("streamed", "latents=")):
        where = [f"data={tiny / 'data'}", latents, f"autoencoder={source}", f"out={tmp_path / name}"]
        small = ["max_steps=6", "global_batch=8", "log_every_images=8", *SMALL]
        trained = run(TWO, "train.py", "--config", "demo/medi", *where, *small)
        assert trained.returncode == 0, trained.stderr
        assert "2 processes" in trained.stderr
    assert losses(tmp_path / "stored").keys() == losses(tmp_path / "streamed").keys()
    for part in ("model.safetensors", "model/unet"):  # batches of another size may be encoded with other roundings
        assert relative_distance(tmp_path / "streamed", tmp_path / "stored", part) <= 1e-5


def test_two_launched_processes_encode_the_same_latents(tiny: Path, tmp_path: Path) -> None:
    encoder = json.loads((tiny / "latents" / "latents.json").read_text())["autoencoder"]["source"]
    words = ["-m", "latent_medi.cli", "encode", f"data={tiny / 'data'}", f"autoencoder={encoder}"]
    encoded = run(TWO, *words, f"out={tmp_path / 'latents'}")
    assert encoded.returncode == 0, encoded.stderr
    assert "2 processes" in encoded.stderr
    files = sorted(p.relative_to(tiny / "latents") for p in (tiny / "latents" / "data").iterdir())
    assert len(files) == 3
    for file in files:
        assert (tiny / "latents" / file).read_bytes() == (tmp_path / "latents" / file).read_bytes()


@pytest.mark.parametrize("launcher", [ALONE, TWO], ids=["alone", "launched"])
def test_a_crash_exits_non_zero(launcher: list[str], tiny: Path, tmp_path: Path) -> None:
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={tmp_path / 'run'}"]
    failed = run(
        launcher, "train.py", "--config", "demo/medi", *where, "max_steps=4", "global_batch=8", "split_value=nobody"
    )
    assert failed.returncode != 0
    assert "nobody" in failed.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    failed = run(ALONE, "train.py", "--config", "demo/medi", "max_step=4", f"out={tmp_path}")
    assert failed.returncode != 0
    assert "max_steps" in failed.stderr


def test_a_terminated_command_takes_the_commands_it_started_along(tiny: Path, tmp_path: Path) -> None:
    words = ["train", "--config", "demo/medi", f"data={tiny / 'data'}", f"latents={tiny / 'latents'}"]
    words += [f"out={tmp_path / 'run'}", "max_steps=100000", "global_batch=8", "log_every_images=8", *SMALL]
    program = (
        "import sys; from latent_medi import cli; from latent_medi.experiment.commands import run_in_parallel\n"
        f"cli.VERBS['audit'] = (lambda rest: run_in_parallel({{'long': {words!r}}}, threads=1), '')\n"
        "sys.exit(cli.main(['audit']))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "log.csv"
    for _ in range(1200):
        if log.is_file() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.terminate()
    assert parent.wait(timeout=60) == 75  # training has saved: the same command continues
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.slow
def test_two_processes_read_a_thousand_shards_with_few_open_files(tiny: Path, tmp_path: Path) -> None:
    shards = 1000
    source = json.loads((tiny / "latents" / "latents.json").read_text())["autoencoder"]["source"]
    data, latents = f"data={tmp_path / 'data'}", f"latents={tmp_path / 'latents'}"
    make_cohort(tmp_path / "data", ("aster", "NA", "birch"), patches=shards, patches_per_shard=1)
    words = ["-m", "latent_medi.cli", "encode", data, f"autoencoder={source}", f"out={tmp_path / 'latents'}"]
    done = run(TWO, *words, open_files=256)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "latents" / "data").iterdir())) == shards
    small = ["max_steps=10", "global_batch=200", "log_every_images=200", *SMALL]  # twice through the data
    for name, where in (("disk", [latents, "resident=mmap"]), ("streamed", ["latents=", f"autoencoder={source}"])):
        done = run(
            TWO, "train.py", "--config", "demo/medi", data, *where, f"out={tmp_path / name}", *small, open_files=256
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 processes" in done.stderr
        assert max(losses(tmp_path / name)) == 2000
