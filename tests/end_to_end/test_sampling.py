"""The same plan gives the same pixels: for any number of processes, after any kills, in batches of another size."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from cluster_parts import ALONE, LONGEST, SMALL, free_port, kill, launcher, start, wait_until

from latent_medi.shards.dataset import PatchDataset

SHARDS = 14


def pixels(folder: Path) -> tuple[list[str], np.ndarray]:
    """Keys, and the decoded images."""
    dataset = PatchDataset.open(folder)
    return dataset.index["key"].tolist(), dataset.read(np.arange(len(dataset)))


def sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.mark.slow
def test_processes_kills_and_batches_do_not_change_what_a_plan_gives(tiny: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={tmp_path / 'run'}"]
    words = [*ALONE, "train.py", "--config", "demo/medi", *where, "max_steps=20", "global_batch=8", *SMALL]
    assert start(words, errors).wait(timeout=LONGEST) == 0, errors.read_text()
    plan = tmp_path / "plan.csv"
    counts = "class,site,age,count,verdict,seed\ntumour,birch,real,90,seen,1\nbenign,NA,unknown,76,seen,2\n"
    plan.write_text(counts + "tumour,NA,61,58,seen,3\n")
    asked = ["sample.py", f"model={tmp_path / 'run' / 'model'}", f"plan={plan}", "patches_per_shard=16"]
    asked += ["sampler.name=dpmpp_2m_sde", "sampler.steps=6", "guidance.form=chain", "guidance.scale=2"]

    def run(launch: list[str], name: str, batch: int) -> tuple[list[str], np.ndarray]:
        out = [f"out={tmp_path / name / 'synthetic'}", f"device_batch={batch}"]
        assert start([*launch, *asked, *out], errors).wait(timeout=LONGEST) == 0, errors.read_text()[-4000:]
        return pixels(tmp_path / name / "synthetic")

    keys, images = run(ALONE, "one", 32)
    assert len(keys) == 224
    for name, launch in (("two", launcher(2, free_port())),):
        others, made = run(launch, name, 32)
        assert others == keys
        assert sha256(made) == sha256(images)

    torn, draw = tmp_path / "torn" / "synthetic", random.Random(0)
    finished = 0
    for _ in range(5):
        process = start([*ALONE, *asked, f"out={torn}", "device_batch=32"], errors)
        until = finished + draw.randint(1, 2)
        wait_until(lambda until=until: len(list((torn / "data").glob("part-*.tar"))) >= until, process, errors)
        kill(process)
        kept = len(list((torn / "data").glob("part-*.tar")))
        assert finished < kept < SHARDS
        finished = kept
    others, made = run(ALONE, "torn", 32)
    assert others == keys
    assert sha256(made) == sha256(images)

    others, made = run(ALONE, "seven", 7)
    assert others == keys
    apart = np.abs(made.astype(int) - images)
    assert apart.max() <= 1
    assert (apart == 0).mean() >= 0.999
