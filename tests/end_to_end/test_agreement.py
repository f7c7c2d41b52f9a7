"""Launched processes that read other data or have other settings are refused, every one with the same message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from cluster_parts import REPOSITORY, SMALL, launcher
from evaluation_world import HELD_OUT, Size, build_world, write_real
from parts import make_cohort

from latent_medi.core.files import read_json
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset

TWO = launcher(2, 0)
HERE = REPOSITORY / "tests" / "end_to_end"
Case = tuple[list[str], dict[str, str]]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, autoencoder: Autoencoder) -> Path:
    """The same patches with the sites of others."""
    folder = tmp_path_factory.mktemp("other")
    make_cohort(folder / "data", ("NA", "birch", "aster"))
    encode_dataset(folder / "data", autoencoder, folder / "latents")
    return folder


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TWO, *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def told(cases: list[Case], folder: Path) -> list[list[str]]:
    """What the first and the second process were told of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = launch([str(HERE / "differing.py"), str(folder / "cases.json"), str(folder)])
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def train_words(source: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "--config", "demo/medi", f"data={source / 'data'}", f"latents={source / 'latents'}", f"out={out}"]
    return [*words, "max_steps=2", "global_batch=8", *SMALL, *more]


@pytest.mark.slow
def test_what_is_read_is_compared(tiny: Path, other: Path, tmp_path: Path, autoencoder: Autoencoder) -> None:
    here, copied = tmp_path / "run", tmp_path / "copied"
    shutil.copytree(tiny, copied)  # as on the nodes' own disks
    for name, number in (("plan.csv", 1), ("another.csv", 2)):
        (tmp_path / name).write_text(f"class,site,age,count,verdict,seed\ntumour,birch,50,{number},seen,1\n")
    source, away = str(tiny / "data"), {str(tiny): str(other)}
    model, encoder = here / "model", autoencoder.description["source"]
    asked = [f"plan={tmp_path / 'plan.csv'}", f"out={tmp_path / 'made'}", "sampler.steps=2"]
    sample = ["sample", f"model={model}", *asked]
    wanted = ["translate", f"data={source}", f"model={model}", f"out={tmp_path / 'moved'}", "to.site=birch", "steps=2"]
    classes = [f"data={source}", f"latents={tiny / 'latents'}", f"model={model}", f"out={tmp_path / 'cls'}"]
    classes += ["validation_value=test"]
    cases: list[Case] = [
        (train_words(tiny, here), away),
        (train_words(tiny, here, "seed=1"), {"seed=1": "seed=2"}),
        (train_words(tiny, here), {str(tiny): str(tmp_path / "nowhere")}),
        (train_words(tiny, here), {str(tiny): str(copied)}),
        (["encode", f"data={source}", f"autoencoder={encoder}", f"out={tmp_path / 'e'}"], away),
        (sample, {"plan.csv": "another.csv"}),
        (sample, {"steps=2": "steps=3"}),
        (wanted, away),
        (["classifier", "--config", "demo/classifier", *classes], away),
        (["floors", f"data={source}", "encoders=[demo]", f"out={tmp_path / 'floors'}"], away),
    ]
    first, second = told(cases, tmp_path)
    assert first[2] == f"Process 1 cannot begin: {second[2]}"  # and does not leave the other waiting
    second[2] = first[2]
    assert first == second
    named = [
        "data is",
        "seed is 1 in process 0, and 2 in process 1",
        "Process 1 cannot begin",
        "",
        "data is",
        "plan is",
        "sampler.steps is 2 in process 0, and 3 in process 1",
        "data is",
        "latents is",
        "data is",
    ]
    for (words, _), message, expected in zip(cases, first, named, strict=True):
        assert (expected in message) if expected else not message, (words[0], message)
        assert not message or "rocess 1" in message
    for message in (first[0], first[4], first[7], first[8], first[9]):
        assert str(tiny) in message
        assert str(other) in message
    assert model.is_dir()  # of the copies: content counts, not the path
    assert not any((tmp_path / name).exists() for name in ("e", "made", "moved", "cls"))


@pytest.mark.slow
def test_what_judges_is_compared_too(tmp_path: Path) -> None:
    world = build_world(tmp_path, Size(5, 5, 5, 2), count=2)
    write_real(tmp_path / "real2", Size(5, 5, 5, 2), seed=1)
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"synthetic": {"medi": str(world.medi)}, "held_out": HELD_OUT, "encoders": ["demo"]})
    )
    judged = ["evaluate", "--config", str(tmp_path / "settings.yaml"), f"real={world.real}", f"out={tmp_path / 'out'}"]
    chosen = ["select", f"data={world.medi}", f"real={world.real}", "encoder=demo", "filters=[copies]"]
    chosen += ["cells=[class]", "rank=distance"]
    away = {str(world.real): str(tmp_path / "real2")}
    first, second = told([(judged, away), (chosen, away), (chosen, {})], tmp_path)
    assert first == second
    for message in first[:2]:
        assert f"real is {world.real} in process 0, and {tmp_path / 'real2'} with other content in process 1" in message
    assert not first[2]  # and two processes select what one does
    assert "best" in read_json(world.medi / "dataset.json")["selections"]


def test_the_command_exits_non_zero_at_once_with_a_message_of_each(tiny: Path, other: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom latent_medi.cli import main\nold, new, *words = sys.argv[1:]\n"
        "if os.environ['RANK'] == '1':\n    words = [word.replace(old, new) for word in words]\nsys.exit(main(words))\n"
    )
    start = time.monotonic()
    done = launch([str(program), str(tiny), str(other), *train_words(tiny, tmp_path / "run")])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: The 2 processes were not started alike") == 2
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 120
    assert not (tmp_path / "run").exists()
