"""As many shards as a cohort has slides: few files are open at a time, and damage is found wherever it is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from latent_medi.core.errors import UserError
from latent_medi.latents.info import SCHEMA_VERSION, write_info
from latent_medi.latents.store import LatentStore

# Reads at random, in order, and for the statistics, under the limit it is given, and tells how many files were open.
READ = """
import os, resource, sys
import numpy as np
limit, folder, resident = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import torch
from latent_medi.latents.store import LatentStore
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
store = LatentStore(folder, resident)
rows = np.random.default_rng(0).permutation(len(store))
for i in range(0, len(rows), 512):
    mean, _ = store.moments(rows[i : i + 512])
    assert (mean[:, 0, 0, 0].numpy() == rows[i : i + 512] // 2 % 1024).all()
store.statistics(range(len(store)))
print(len(os.listdir("/proc/self/fd")) - before)
"""


def many_shards(folder: Path, count: int, views: int = 1) -> Path:
    """A latent folder of ``count`` shards of two patches; every number of a shard is its own number, below 1024."""
    (folder / "data").mkdir(parents=True)
    shards = []
    inner = (views, 1, 2, 2) if views > 1 else (1, 2, 2)
    for i in range(count):
        mean = np.full((2, *inner), i % 1024, np.float16)
        path = folder / "data" / f"part-{i:06d}.safetensors"
        save_file({"mean": mean, "std": np.full_like(mean, 0.5)}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        source = {"source": f"data/part-{i:06d}.tar", "source_sha256": f"{i:064x}"}
        shards.append({"file": f"data/{path.name}", "sha256": digest, "count": 2, **source})
    autoencoder = {"source": "x", "hash": "0" * 64, "deterministic": False}
    info = {"schema_version": SCHEMA_VERSION, "dataset": "many", "autoencoder": autoencoder, "shape": [1, 2, 2]}
    write_info(folder, {**info, "views": views, "count": 2 * count, "shards": shards})
    return folder


def opened(folder: Path, resident: str, limit: int) -> int:
    words = [sys.executable, "-c", READ, str(limit), str(folder), resident]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("resident", ["mmap", "ram"])
def test_many_shards_are_read_with_few_files_open(tmp_path: Path, resident: str) -> None:
    assert opened(many_shards(tmp_path / "latents", 1200), resident, 512) < 256


@pytest.mark.parametrize("views", [1, 8])
def test_neighbouring_and_repeated_rows_are_read_as_asked_for(tmp_path: Path, views: int) -> None:
    folder = many_shards(tmp_path / "latents", 100, views)
    on_disk, in_memory = LatentStore(folder, "mmap"), LatentStore(folder, "ram")
    rng = np.random.default_rng(0)
    for rows in (np.arange(200), np.arange(200)[::-1], rng.integers(200, size=300), np.array([5, 6, 7, 5, 6, 9])):
        views_of = rng.integers(views, size=len(rows))
        for a, b in zip(on_disk.moments(rows, views_of), in_memory.moments(rows, views_of), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("resident", ["mmap", "ram"])
@pytest.mark.parametrize("where", [0, 9, -1, -9])
def test_damage_is_found_before_anything_of_the_file_is_used(tmp_path: Path, resident: str, where: int) -> None:
    folder = many_shards(tmp_path / "latents", 100)
    path = folder / "data" / "part-000070.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-000070\.safetensors.*\n.*encode again"):
        LatentStore(folder, resident).moments([3, 140])


def test_a_file_that_changes_after_it_was_compared_is_compared_again(tmp_path: Path) -> None:
    folder = many_shards(tmp_path / "latents", 3)
    assert LatentStore(folder, "ram").moments([4])[0].unique().item() == 2
    path = folder / "data" / "part-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match="damaged"):
        LatentStore(folder, "ram")
