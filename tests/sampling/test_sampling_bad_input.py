"""What goes wrong while sampling, as a user sees it: one clear error, exit code 2, nothing finished is lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.cli import main
from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    """The command without its folder: 600 patches of 32 px in shards of 60, noise that no codec makes small."""
    plan = pd.DataFrame([{"class": "tumour", "site": "aster", "count": 600, "seed": 3}])
    plan.to_csv(tmp_path / "plan.csv", index=False)
    words = ["sample", f"plan={tmp_path / 'plan.csv'}", f"model={model}", "sampler.name=ddim", "sampler.steps=1"]
    return [*words, "guidance.form=none", "patches_per_shard=60", "name=n"]


def test_a_full_disk_stops_and_a_rerun_with_room_goes_on(
    words: list[str], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "out"
    assert main([*words, f"out={out}"]) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert not (out / "dataset.json").exists()
    kept = {path: path.stat().st_ino for path in (out / "data").glob("part-*.tar")}
    assert kept
    assert not list(out.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert main([*words, f"out={out}"]) == 0
    assert {path: path.stat().st_ino for path in kept} == kept  # not written again
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    for file in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "whole")).read_bytes()


@pytest.mark.parametrize("what", ["unet", "conditioning", "autoencoder", "model_index.json"])
def test_a_damaged_model_is_named_and_nothing_is_written(
    what: str, words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = shutil.copytree(model, tmp_path / "model") / what
    weights = next(part.glob("*.safetensors")) if part.is_dir() else part
    weights.write_bytes(weights.read_bytes()[: -max(2, weights.stat().st_size // 10)])
    words = [word.replace(f"model={model}", f"model={tmp_path / 'model'}") for word in words]
    assert main([*words, f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert str(part) in error, error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_refused_before_the_weights_are_read(
    words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    next((folder / "unet").glob("*.safetensors")).unlink()  # reading it would be the error
    picture = f"out={tmp_path / 'sheet.png'}"
    data = tmp_path / "data"
    table = pd.DataFrame({"class": ["benign", "tumour"], "site": ["aster", "birch"]})
    image = np.zeros((16, 16, 3), np.uint8)
    patches = [Patch(f"k{i}", image, f"p{i}", f"s{i}", -1, -1, 0.5, dict(table.iloc[i])) for i in range(2)]
    write_dataset(data, patches, "data", Schema.from_table(table, "class", ["site"]), 16, 0.5)
    for given, named in [
        (["sample", "--class", "tumor", "--n", "2", f"out={tmp_path / 'out'}"], "'tumour'"),
        (["sample", "--class", "tumour", "--sitee", "aster", "--n", "2", f"out={tmp_path / 'out'}"], "'site'"),
        (["grid", "kind=trajectory", "fields.class=tumor", picture], "'tumour'"),
        (["grid", "kind=blend", "field=site", "start=aster", "stop=brich", picture], "'birch'"),
        (["translate", f"data={data}", "to.site=brich", "split=", f"out={tmp_path / 'out'}"], "'birch'"),
    ]:
        assert main([*given, f"model={folder}"]) == 2, given
        assert named in capsys.readouterr().err, given
