"""A machine that trains has fewer packages than one that cuts slides: what only others need is never imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

ABSENT = (
    "openslide", "torchmetrics", "torch_fidelity", "jsonargparse", "webdataset", "dask", "distributed", "peft",
    "bitsandbytes", "datasets", "tensorboard", "wandb", "s3fs", "gcsfs",
)  # fmt: skip
"""What torch, torchvision, transformers, accelerate, diffusers, timm, pandas, pyarrow, scikit-learn, matplotlib and
jinja2 do not bring along."""

_OTHERS = ("latent_medi.shards.slide", "latent_medi.report.")
"""Rooms for which slides' and pictures' packages are there."""
_IMPORT_ALL = f"""
import importlib, pkgutil, latent_medi
for module in pkgutil.walk_packages(latent_medi.__path__, "latent_medi."):
    if not module.name.startswith({_OTHERS!r}) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


class Lean:
    """Runs Python where packages are absent, in every process that is started from there."""

    def __init__(self, folder: Path, absent: tuple[str, ...]) -> None:
        # Read by every interpreter as it starts. None in sys.modules is how Python itself marks what is not there.
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
        self.surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], env=self.surroundings, capture_output=True, text=True, check=False, timeout=600
        )

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "latent_medi.cli", *words)


@pytest.fixture
def lean(tmp_path: Path) -> Lean:
    (tmp_path / "lean").mkdir()
    return Lean(tmp_path / "lean", ABSENT)


def test_no_room_but_slides_and_the_report_needs_what_only_they_use(tmp_path: Path) -> None:
    done = Lean(tmp_path, (*ABSENT, "matplotlib")).python("-c", _IMPORT_ALL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shards", "slides", "source=.", "out=new"], "Cutting slides needs openslide-python openslide-bin"),
        (["train", "--help"], "pip install 'jsonargparse[signatures]'"),
        (["translate", "data=d", "model=m", "out=new", "--to", "site=radboud"], "pip install torchmetrics"),
    ],
)
def test_what_is_absent_is_named_with_how_to_get_it(lean: Lean, words: list[str], said: str) -> None:
    done = lean(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_whole_experiment_runs_there(lean: Lean, tmp_path: Path) -> None:
    """shards → audit → encode → train → plan → sample → evaluate → report."""
    out = tmp_path / "out"
    done = lean(
        "run", "--config", "demo/experiment", f"out={out}", "train.max_steps=4", "seen_per_cell=2", "unseen_per_cell=4",
        "evaluate.resamples=20", "evaluate.repeats=1", "evaluate.deals=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "report.html").is_file()
