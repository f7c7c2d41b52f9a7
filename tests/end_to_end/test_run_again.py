"""What a finished run lost is made again by the same command, and nothing else."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from parts import make_cohort

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.experiment.damaged_outputs import (
    damaged_dataset,
    damaged_latents,
    damaged_metrics,
    damaged_model,
    reopen,
)
from latent_medi.experiment.stages import Stage, Stages
from latent_medi.latents.encode import encode_dataset

SMALL = """
model: {block_out_channels: [32, 32], attention: [false, true], attention_head_dim: 16, layers_per_block: 1,
  norm_num_groups: 16%s}
global_batch: 8
max_steps: 4
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_run_makes_again_what_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_cohort(tmp_path / "data", ("aster", "birch"))
    patients = sorted(set(dataset.index["patient"]))
    part = dict(zip(patients, ["train", "train", "probe", "test"] * len(patients), strict=False))
    dataset.add_split("three", [part[p] for p in dataset.index["patient"]], {})
    (tmp_path / "medi.yaml").write_text(SMALL % "")
    (tmp_path / "cls.yaml").write_text(SMALL % ", fields: [class]")
    out = tmp_path / "out"
    words = [
        "run",
        f"data={tmp_path / 'data'}",
        f"out={out}",
        "split=three",
        f"models.medi.config={tmp_path / 'medi.yaml'}",
        f"models.cls.config={tmp_path / 'cls.yaml'}",
        "seen_per_cell=3",
        "generate.sampler.steps=2",
        "generate.device_batch=8",
        "evaluate={unseen: false, downstream: false}",
        "autoencoder=demo",
    ]
    assert main(words) == 0
    capsys.readouterr()
    whole = contents(out)
    assert main(words) == 0
    assert set(contents(out)) == set(whole)

    lost = ["report.html", "audit.txt", "plan-cls.csv"]
    for name in lost:
        (out / name).unlink()
    (out / "metrics.json").write_text("{")
    shutil.rmtree(out / "synthetic" / "medi")
    shutil.rmtree(out / "cls" / "model" / "unet")
    shutil.rmtree(out / "reference")
    shutil.rmtree(out / "latents" / "data")
    assert main(words) == 0
    again = contents(out)
    assert set(whole) <= set(again)
    kept = {name for name in again if ".damaged" in name}  # under another name, in case it was worth something
    assert set(again) - set(whole) == kept
    assert (out / "metrics.json.damaged").read_text() == "{"
    same = ("medi/model/", "cls/model/", "synthetic/", "latents/data/", "plan-")
    assert [name for name in whole if name.startswith(same) and again[name] != whole[name]] == []


def some_stages(folder: Path, done: list[str], **options: object) -> Stages:
    def action() -> None:
        done.append("made")
        (folder / "a.txt").write_text("a")
        (folder / "b").mkdir(exist_ok=True)
        (folder / "b" / "c.txt").write_text("c")

    stages = Stages(folder, ["one"])
    stages.add("one", Stage(action, 1, outputs=("a.txt",), extras=("b",), **options))  # type: ignore[arg-type]
    return stages


@pytest.mark.parametrize("lost", ["a.txt", "b/c.txt"])
def test_a_stage_whose_output_is_gone_runs_again(tmp_path: Path, lost: str) -> None:
    done: list[str] = []
    for _ in range(2):
        some_stages(tmp_path, done).run("one")
    assert done == ["made"]
    (tmp_path / lost).unlink()
    stages = some_stages(tmp_path, done)
    assert not stages.finished("one")
    stages.run("one")
    assert done == ["made", "made"]
    assert some_stages(tmp_path, done).finished("one")


def test_a_stage_whose_output_is_damaged_runs_again_without_it(tmp_path: Path) -> None:
    done: list[str] = []
    some_stages(tmp_path, done).run("one")
    (tmp_path / "a.txt").write_text("damaged")

    def damaged() -> list[Path]:
        text = (tmp_path / "a.txt").read_text() if (tmp_path / "a.txt").exists() else "absent"
        return [] if text == "a" else [tmp_path / "a.txt"]

    some_stages(tmp_path, done, damaged=damaged).run("one")
    assert done == ["made", "made"]
    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_stage_removes_nothing_that_was_there_before_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    done: list[str] = []
    stages = some_stages(tmp_path, done)
    stages.begin()
    stages.run("one")
    stages = some_stages(tmp_path, done)
    stages.begin()
    stages.add("one", Stage(lambda: None, 2, outputs=("a.txt",), extras=("b",)))
    with pytest.raises(UserError, match=r"b does not fit .*no run of this experiment made it"):
        stages.run("one")
    assert (tmp_path / "b" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "a.txt").exists()


def test_a_run_refuses_a_folder_with_a_file_it_would_replace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a\.txt exists and was not written by this command"):
        some_stages(tmp_path, []).begin()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "settings.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"settings\.yaml "):
        some_stages(tmp_path, []).begin("settings.yaml")


def test_records_of_earlier_versions_count(tmp_path: Path) -> None:
    """They do not say which outputs there were besides those that there always are."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "one.json").write_text('{"made_from": {"one": 1}, "seconds": 2.0}')
    assert not some_stages(tmp_path, []).finished("one")
    (tmp_path / "a.txt").write_text("a")
    assert some_stages(tmp_path, []).finished("one")


def test_what_is_absent_or_cut_off_is_found(tmp_path: Path, autoencoder) -> None:
    dataset = make_cohort(tmp_path / "data", ("aster", "birch"))
    encode_dataset(tmp_path / "data", autoencoder, tmp_path / "latents")
    assert damaged_dataset(tmp_path / "data") == []
    assert damaged_latents(tmp_path / "latents") == []
    tar = tmp_path / "data" / dataset.info["shards"][0]["file"]
    tar.write_bytes(tar.read_bytes()[:-512])
    assert damaged_dataset(tmp_path / "data") == [tar]
    tar.unlink()
    assert damaged_dataset(tmp_path / "data") == [tar]
    splits = dataset.splits
    reopen(tmp_path / "data")
    assert make_cohort(tmp_path / "data", ("aster", "birch")).splits == splits
    assert damaged_dataset(tmp_path / "data") == []
    (tmp_path / "data" / "index.parquet").write_bytes(b"PAR1")
    assert tmp_path / "data" / "index.parquet" in damaged_dataset(tmp_path / "data")
    part = next((tmp_path / "latents" / "data").iterdir())
    part.write_bytes(part.read_bytes()[:-10])
    assert damaged_latents(tmp_path / "latents") == [tmp_path / "latents" / "latents.json"]
    (tmp_path / "a.json").write_text("[1]")
    assert damaged_metrics(tmp_path / "a.json") == [tmp_path / "a.json"]


def test_a_model_without_one_of_its_files_is_not_whole(tmp_path: Path) -> None:
    from test_experiment import given_model

    model = given_model(tmp_path, [["benign", "aster", 2]])
    assert damaged_model(model) == []
    for name in ("unet", "conditioning", "autoencoder.json", "model_index.json"):
        moved = model / name
        moved.rename(tmp_path / "away")
        assert damaged_model(model) == [model], name
        (tmp_path / "away").rename(moved)
    weights = next(model.glob("unet/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    assert damaged_model(model) == [model]
    assert damaged_model(tmp_path / "absent") == [tmp_path / "absent"]
