"""A machine that trains has fewer packages than one that cuts slides: what only others need is never imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

ABSENT = (
    "openslide",
    "torchmetrics",
    "torch_fidelity",
    "argcomplete",
    "webdataset",
    "dask",
    "distributed",
    "peft",
    "bitsandbytes",
    "datasets",
    "tensorboard",
    "wandb",
    "s3fs",
    "gcsfs",
    "gradio",
)
"""What torch, torchvision, transformers, accelerate, diffusers, timm, pandas, pyarrow, scikit-learn, matplotlib and
jinja2 do not bring along."""

_OTHERS = ("latent_medi.shards.slides.", "latent_medi.report.")
"""Rooms for which slides' and pictures' packages are there."""
_PROGRAM = f"""
import importlib, pkgutil, latent_medi
from latent_medi.cli import main
for module in pkgutil.walk_packages(latent_medi.__path__, "latent_medi."):
    if not module.name.startswith({_OTHERS!r}) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for words in ("shards slides source=. out=new", "translate data=d model=m out=new --to site=radboud"):
    assert main(words.split()) == 2, words
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


def test_only_slides_and_the_report_need_what_only_they_use_and_what_is_absent_is_named(tmp_path: Path) -> None:
    done = Lean(tmp_path, (*ABSENT, "matplotlib")).python("-c", _PROGRAM)
    assert done.returncode == 0, done.stderr
    slides, measures = done.stderr.strip().split("error: ")[1:]
    assert slides.startswith("Cutting slides needs openslide-python openslide-bin")
    assert "pip install torchmetrics" in measures


@pytest.mark.slow
def test_a_whole_experiment_runs_there(tmp_path: Path) -> None:
    """shards → audit → encode → train → plan → sample → evaluate → report."""
    out, lean = tmp_path / "out", Lean(tmp_path, ABSENT)
    done = lean.python("-m", "latent_medi.cli", "shards", "demo", f"out={tmp_path / 'data'}", "scale=0.15")
    assert done.returncode == 0, done.stderr[-3000:]
    done = lean.python(
        "-m",
        "latent_medi.cli",
        "run",
        "--config",
        "demo/experiment",
        f"data={tmp_path / 'data'}",
        f"out={out}",
        "train.max_steps=4",
        "seen_per_cell=2",
        "unseen_per_cell=4",
        "evaluate.repeats=1",
        "evaluate.real_splits=0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "report.html").is_file()
