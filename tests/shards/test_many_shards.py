"""A slide is a shard, and cohorts have ten thousand: whoever reads patches keeps few files open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, resource, sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
import numpy as np, pandas as pd
from torch.utils.data import DataLoader
from latent_medi.cli import main
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.stream import PatchStream, epochs, webdataset_of
from latent_medi.shards.writing.rewrite import reopen_dataset
from latent_medi.shards.writing.finish import Description, finish_dataset
from latent_medi.shards.writing.writer import Patch, write_dataset

place, count, most = Path(sys.argv[1]), int(sys.argv[2]), [0]

def watch(event, arguments):
    if event == "open" and "/data/" in str(arguments[0]):
        most[0] = max(most[0], sum(1 for _ in os.scandir("/proc/self/fd")))

sys.addaudithook(watch)
image = np.zeros((8, 8, 3), np.uint8)
patches = [
    Patch(f"{i:05d}", image, f"p{i % 50}", f"s{i}", -1, -1, 0.5, {"class": "ab"[i % 50 % 2]}) for i in range(count)
]
schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"]}), "class")
dataset = write_dataset(place / "d", patches, "d", schema, 8, 0.5, patches_per_shard=1)
assert dataset.info["counts"]["shards"] == count
order = np.random.default_rng(0).permutation(count)
dataset.read(order)
dataset.read(order, workers=8)
sum(len(rows) for rows, _ in dataset.iterate(None, 64))
stream = PatchStream(dataset, epochs(np.arange(count), 0), images=count, global_batch=50)
for workers in (0, 2):
    loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch)
    assert sum(len(batch.rows) for batch in loader) == count
assert len(list(webdataset_of(dataset))) == count
assert sum(1 for _ in DataLoader(webdataset_of(dataset), batch_size=None, num_workers=2)) == count
assert main(["split", str(place / "d"), "name=main", "fractions={train: 0.8, test: 0.2}"]) == 0
assert main(["shards", "verify", str(place / "d")]) == 0
for form in ("webdataset", "folder"):
    assert main(["export", str(place / "d"), f"out={place / form}", f"format={form}", "split=main"]) == 0
reopen_dataset(place / "d")
again = finish_dataset(place / "d", Description("d", schema, 8, 0.5))
assert again.verify() == [] and again.splits == ["main"]
print("most open", most[0])
assert 0 < most[0] < 256, most
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_thousands_of_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "1500"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
