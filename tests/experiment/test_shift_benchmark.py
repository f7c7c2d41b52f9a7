"""The benchmark makes nested splits of one size, lets each level be judged on real patients, and reads the curve."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from evaluation_world import World, filters

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json, read_sealed, write_json
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.shift_benchmark import benchmark_shift
from latent_medi.experiment.shift_result import loss, mean_of_seeds
from latent_medi.experiment.shift_settings import ShiftSettings
from latent_medi.shards.dataset import PatchDataset


def judge(changes: dict[str, Any], ran: list[dict[str, Any]]) -> None:
    """A level without models: the rivals alone, which need none."""
    ran.append(changes)
    own = {key: changes[key] for key in ("out", "split", "held_out", "seed", "site_field")}
    settings = EvaluateSettings(
        real=changes["data"],
        repeats=1,
        real_splits=0,
        memorisation=False,
        colour_free=False,
        training_sets=["real", "stain_transfer", "oracle"],
        **own,
        **changes["evaluate"],
    )
    if not (Path(changes["out"]) / "metrics.json").is_file():
        evaluate(settings, [filters()])


def test_the_curve_of_a_planted_cohort(world: World, tmp_path: Path) -> None:
    targets = [{"class": "stripes", "site": "north"}, {"class": "rings", "site": "east"}]
    data = shutil.copytree(world.real, tmp_path / "real")  # it gains splits
    settings = ShiftSettings(data=str(data), out=str(tmp_path / "out"), levels=[1.0, 0.0], held_out=targets)
    ran: list[dict[str, Any]] = []
    result = benchmark_shift(settings, lambda changes: judge(changes, ran))
    assert (result, True) == read_sealed(tmp_path / "out" / "shift.json", "")
    free, tied = result["levels"]
    assert (free["level"], tied["level"]) == (0.0, 1.0)
    assert free["tie"] < tied["tie"]
    assert free["n_patients"] == tied["n_patients"]
    for name, record in (("0.000", free), ("1.000", tied)):
        found = next(iter(read_json(tmp_path / "out" / f"level-{name}" / "metrics.json")["fidelity"].values()))
        assert record["distance"] == {"metric": "kid", "real": found["unseen"]["means"]["real"]["value"]}
    # The loss is the real patches', not the oracle's, who is given patients of the targets.
    accuracy = {
        name: (free["arms"][name]["accuracy_shift"], tied["arms"][name]["accuracy_shift"]) for name in free["arms"]
    }
    assert accuracy["real"][1] < accuracy["real"][0]
    assert tied["arms"]["real"]["recall"] < free["arms"]["real"]["recall"]
    assert result["loss"]["real"] == pytest.approx(accuracy["real"][1] / accuracy["real"][0] - 1)
    assert result["loss"]["oracle"] > result["loss"]["real"]
    dataset = PatchDataset.open(data)
    index = dataset.index
    for changes, record in zip(ran, result["levels"], strict=True):
        column = index[f"split_{changes['split']}"]
        assert index["patient"][column == "train"].nunique() == record["n_patients"]
        assert (column[index["split_main"] != "train"] == index["split_main"][index["split_main"] != "train"]).all()
        kept = index[column == "train"]
        shown = [((kept["class"] == t["class"]) & (kept["site"] == t["site"])).any() for t in targets]
        assert shown == [record["level"] < 1] * 2
    table = pd.read_csv(tmp_path / "out" / "shift.csv")
    assert set(table["arm"]) == {"real", "stain_transfer", "oracle"}
    assert (tmp_path / "out" / "shift.png").stat().st_size > 10_000
    # The same command finds all of it finished; another one is refused; other levels draw patients of their own.
    assert benchmark_shift(settings, lambda changes: judge(changes, ran)) == result
    with pytest.raises(UserError, match="holds another benchmark"):
        benchmark_shift(ShiftSettings(**{**vars(settings), "levels": [0.5]}), lambda changes: judge(changes, ran))
    names = {changes["split"] for changes in ran}
    more = ShiftSettings(**{**vars(settings), "levels": [0.0], "out": str(tmp_path / "more")})
    benchmark_shift(more, lambda changes: judge(changes, ran))
    assert ran[-1]["split"] not in names
    # Models that are there already are judged at level 1, where what they must not have been shown is certain.
    given = {"medi": "runs/medi/model"}
    taken = ShiftSettings(**{**vars(settings), "levels": [1.0], "out": str(tmp_path / "taken"), "models": given})
    benchmark_shift(taken, lambda changes: judge(changes, ran))
    assert ran[-1]["models"] == {"medi": {"folder": given["medi"]}}
    assert ran[-1]["evaluate"] == {"unseen": True}


def test_bad_input(world: World, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        benchmark_shift(ShiftSettings(data=str(world.real), out=str(tmp_path / "x"), **changes), lambda _: None)

    with pytest.raises(UserError, match=r"no split 'mian'.*'main'"):
        run(split="mian")
    with pytest.raises(UserError, match=r"no field 'hospital'"):
        run(site_field="hospital")
    with pytest.raises(UserError, match=r"not 2"):
        run(levels=[2.0], held_out=[{"class": "rings", "site": "east"}])
    with pytest.raises(UserError, match=r"trained already cannot be of the levels \[0\.0, 1\.0\]"):
        run(levels=[0, 1], models={"medi": "m"})
    with pytest.raises(UserError, match=r"changes\.evaluate\.downstream is false"):
        run(changes={"evaluate": {"downstream": False}})
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="real_splits is 5"):
        evaluate(world.settings("few", real_splits=5), [filters()])


def finished(folder: Path, seed: int, medi: list[float], **changes: Any) -> str:
    """A finished benchmark of two levels with these accuracies of MeDi."""
    levels = []
    for level, value in zip((0.0, 1.0), medi, strict=True):
        arm = {"accuracy_shift": value, "interval": [0, 1], "recall": value, "false_positive_rate": 0.1}
        arms = {"real": arm | {"accuracy_shift": 0.8}, "stain_transfer": arm | {"accuracy_shift": 0.7}, "medi": arm}
        levels.append({"level": level, "tie": level / 2, "n_patients": 40, "n_patches": 80, "arms": arms})
    folder.mkdir()
    result = {"settings": {"seed": seed, "data": "d"}, "targets": [], "levels": levels, "loss": loss(levels)} | changes
    write_json(folder / "shift.json", result)
    return str(folder)


def test_the_mean_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [finished(tmp_path / str(seed), seed, [0.8, value]) for seed, value in enumerate((0.70, 0.76, 0.76))]
    assert main(["benchmark-shift", "--mean", *folders, f"out={tmp_path / 'mean'}"]) == 0
    assert "0.740 ± 0.020" in capsys.readouterr().out
    result = read_json(tmp_path / "mean" / "shift.json")
    assert result["seeds"] == [0, 1, 2]
    medi = result["levels"][1]["arms"]["medi"]
    assert medi["accuracy_shift"] == pytest.approx(0.74)
    assert medi["accuracy_shift_sem"] == pytest.approx(0.02)  # 0.0346 / √3
    assert medi["over_stain_transfer"] == pytest.approx(0.04)
    assert medi["over_stain_transfer_sem"] == pytest.approx(0.02)
    assert result["levels"][1]["arms"]["real"]["accuracy_shift_sem"] == pytest.approx(0)
    assert result["loss"]["medi"] == pytest.approx(0.74 / 0.8 - 1)
    assert (tmp_path / "mean" / "shift.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "mean" / "shift.csv")) == 6


def test_a_loss_needs_the_real_patches_alone() -> None:
    """They may be left out of the arms that were asked for."""
    records = [{"arms": {"medi": {"accuracy_shift": value}}} for value in (0.8, 0.7)]
    assert loss(records) == {"medi": None}


def test_benchmarks_without_a_mean(tmp_path: Path) -> None:
    one, again = (finished(tmp_path / name, 0, [0.8, 0.7]) for name in ("one", "again"))
    with pytest.raises(UserError, match="two benchmarks or more"):
        mean_of_seeds([one], str(tmp_path / "out"))
    with pytest.raises(UserError, match="seed 0 is given twice"):
        mean_of_seeds([one, again], str(tmp_path / "out"))
    other = finished(tmp_path / "other", 1, [0.8, 0.7], levels=read_json(Path(one) / "shift.json")["levels"][:1])
    with pytest.raises(UserError, match=r"other.* has the levels \[0\.0\]"):
        mean_of_seeds([one, other], str(tmp_path / "out"))
    coarse = finished(tmp_path / "coarse", 1, [0.8, 0.7], settings={"seed": 1, "data": "d", "changes": {"repeats": 1}})
    with pytest.raises(UserError, match=r"coarse.* has changes="):
        mean_of_seeds([one, coarse], str(tmp_path / "out"))
    second = finished(tmp_path / "second", 1, [0.8, 0.7])
    with pytest.raises(UserError, match=r"would replace .*one"):
        mean_of_seeds([one, second], one)
    with pytest.raises(UserError, match=r"missing.* does not exist"):
        mean_of_seeds([one, str(tmp_path / "missing")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
