"""Features that several launched processes make together are those of one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster_parts import ALONE, REPOSITORY, launcher
from evaluation_world import HELD_OUT, Size, build_world

from latent_medi.core.files import read_json
from latent_medi.shards.dataset import PatchDataset

TWO = launcher(2, 0, module="accelerate.commands.launch")


def _embed(words: list[str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    return _run([*words, str(REPOSITORY / "tests" / "end_to_end" / "embed.py"), *map(str, arguments)])


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_launched_processes_share_the_embedding(tiny: Path, tmp_path: Path) -> None:
    for name, words in (("one", ALONE), ("two", TWO)):
        done = _embed(words, tiny / "data", tmp_path / name / "cache", tmp_path / name)
        assert done.returncode == 0, done.stderr
    n = len(PatchDataset.open(tiny / "data"))
    one = np.load(tmp_path / "one" / "rank-0.npz")
    two = [np.load(tmp_path / "two" / f"rank-{rank}.npz") for rank in (0, 1)]
    assert one["features"].shape[0] == n == one["seen"]
    assert sum(int(part["seen"]) for part in two) == n  # nothing twice
    assert min(int(part["seen"]) for part in two) >= n // 2 - 3
    for part in two:
        assert part["processes"] == 2  # not two that know nothing of each other
        np.testing.assert_array_equal(part["features"], one["features"])
    ((first,), (second,)) = (list((tmp_path / name / "cache").iterdir()) for name in ("one", "two"))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_processes_with_caches_of_their_own_are_refused(tiny: Path, tmp_path: Path) -> None:
    """A part of another process would be put in wrong places."""
    begun = _embed(ALONE, tiny / "data", tmp_path / "apart", tmp_path / "one")  # fills the first process's only
    assert begun.returncode == 0, begun.stderr
    done = _embed(TWO, tiny / "data", tmp_path / "apart", tmp_path / "two")
    assert done.returncode != 0
    assert "every process can read it" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "floors"])
def test_two_launched_processes_find_what_one_does(verb: str, tmp_path: Path) -> None:
    """They share the embedding; the first does the rest, with the same numbers to the last digit."""
    world = build_world(tmp_path, Size(5, 5, 5, 2), count=4)
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(
            {
                "real": str(world.real),
                "synthetic": {"medi": str(world.medi)},
                "held_out": HELD_OUT,
                "real_splits": 0,
                "repeats": 1,
                "training_sets": ["real", "oversample", "medi"],
            }
            if verb == "evaluate"
            else {"data": str(world.real), "real_splits": 20}
        )
    )
    found = []
    for name, words in (("one", ALONE), ("two", TWO)):
        verb_words = [verb, "--config", str(tmp_path / "settings.yaml"), "encoders=[demo]", f"out={tmp_path / name}"]
        done = _run([*words, "-m", "latent_medi.cli", *verb_words])
        assert done.returncode == 0, done.stderr
        file = tmp_path / name / ("metrics.json" if verb == "evaluate" else "floors.json")
        result = read_json(file)
        result.get("headline", {}).pop("seconds", None)
        for part in ("run", "seconds", "settings", "seal"):
            result.pop(part, None)
        found.append(result)
        assert ("2 processes" in done.stderr) == (name == "two")
    assert found[0] == found[1]
