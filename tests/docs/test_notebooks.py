"""Both notebooks run from the first cell to the last, each in a folder of its own, in small sizes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from commands import REPOSITORY
from nbclient import NotebookClient
from tiny_model import make_model

from latent_medi.metadata.schema import Schema

NOTEBOOKS = REPOSITORY / "docs" / "notebooks"


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: str) -> list[str]:
    """Run a notebook with other values in its first cell of code; returns what its cells said and showed."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without output"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for variable, value in values.items():
        first.source, found = re.subn(rf"^{variable} = [^#\n]*", f"{variable} = {value}  ", first.source, flags=re.M)
        assert found == 1, variable
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [str(output.get("text", "") or output.get("data", "")) for output in outputs]


@pytest.mark.slow
def test_a_model_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"class": ["solid", "glandular"], "site": ["cedar", "aster"]})
    make_model(tmp_path, Schema.from_table(table, "class", ["site"]))
    said = execute("python_api", tmp_path, monkeypatch, MODEL='"model"', STEPS="2")
    assert "synthetic" in said[-1]
    assert sum("image/png" in text for text in said) >= 4


@pytest.mark.slow
def test_own_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "base: own/cpu\nseen_per_cell: 4\nunseen_per_cell: 24\n"
        "train: {max_steps: 3, global_batch: 8, checkpoint_every_images: 24}\n"
        "generate: {sampler: {steps: 2}}\nevaluate: {repeats: 2, real_splits: 20}\n"
    )
    said = execute("own_patches", tmp_path, monkeypatch, CONFIG='"tiny.yaml"', SCALE="0.1")
    assert (tmp_path / "runs" / "own" / "report.html").is_file()
    assert sum("image/png" in text for text in said) >= 3
    assert not any("Error" in text or "Traceback" in text for text in said), said
