"""A writer that is killed at any operation on a file leaves the dataset as it was, or as it was to become."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latent_medi.shards.checking.verify import seal
from latent_medi.shards.dataset import PatchDataset

REPOSITORY = Path(__file__).resolve().parents[2]
OLD = REPOSITORY / "tests" / "fixtures" / "datasets" / "png"

# Kills itself at the n-th time that a file of the folder is opened, renamed or removed, for n = 1, 2, … until the work
# is done before that; one process for all, as starting one takes seconds.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.checking.verify import seal

what, base, place = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
parts = {"old": ["train"] * 8, "new": ["train"] * 4 + ["test"] * 4}
chosen = {"old": np.arange(8) < 3, "new": np.arange(8) >= 3}
work = {
    "split": lambda d: d.add_split("s", parts["new"], {"n": "new"}, replace=True),
    "first split": lambda d: d.add_split("t", parts["new"], {"n": "new"}),
    "selection": lambda d: d.add_selection("c", {"": chosen["new"]}, {"n": "new"}, {}, replace=True),
    "first selection": lambda d: d.add_selection("e", {"": chosen["new"]}, {"n": "new"}, {}),
    "seal": seal,
}[what]

def state(folder):
    dataset = PatchDataset.open(folder)
    assert dataset.verify() == [], dataset.verify()
    assert len(dataset.read(np.arange(8))) == 8
    return json.dumps([dataset.info["splits"], dataset.selections, dataset.index.to_dict("list")], default=str)

def die_at(n, folder):
    count = [0]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.truncate") and str(folder) in str(arguments[0]):
            count[0] += 1
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

whole = place / "whole"
shutil.copytree(base, whole)
before = state(whole)
work(PatchDataset.open(whole))
after = state(whole)
seen, n, leftovers = [], 0, 0
while True:
    n += 1
    folder = place / f"cut-{n}"
    shutil.copytree(base, folder)
    child = os.fork()
    if child == 0:
        try:
            dataset = PatchDataset.open(folder)
            die_at(n, folder)
            work(dataset)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    found = state(folder)
    seen.append("before" if found == before else "after" if found == after else "mixed")
    leftovers += len([p for p in folder.iterdir() if p.name.startswith(".")])
    dataset = PatchDataset.open(folder)
    dataset.add_split("later", parts["new"], {})  # the next writer puts all in order
    assert "split_later" in PatchDataset.open(folder).index and PatchDataset.open(folder).verify() == []
    assert sorted(p.name for p in folder.iterdir()) == ["data", "dataset.json", "index.parquet"]
    shutil.rmtree(folder)
    if code == 0:
        break
print(json.dumps({"seen": seen, "leftovers": leftovers}))
"""


@pytest.mark.parametrize(
    "what", ["split", "first split", "selection", "first selection", "first split, unsealed", "seal"]
)
def test_a_writer_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path, what: str) -> None:
    base = Path(shutil.copytree(OLD, tmp_path / "base"))
    if what not in ("seal", "first split, unsealed"):
        dataset = PatchDataset.open(base)
        dataset.add_split("s", ["train"] * 8, {"n": "old"})
        dataset.add_selection("c", {"": np.arange(8) < 3}, {"n": "old"}, {})
        seal(dataset)
    (tmp_path / "place").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what.removesuffix(", unsealed"), str(base), str(tmp_path / "place")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "mixed" not in result["seen"]
    assert result["seen"] == sorted(result["seen"], reverse=True)  # once it is new, it stays new
    assert {"before", "after"} <= set(result["seen"])
    assert len(result["seen"]) > 8
    assert result["leftovers"] > 0  # it was killed while something lay there
