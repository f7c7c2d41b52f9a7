"""``only`` in the verbs that read patches: each takes the rows that the filter keeps, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from evaluation_world import World, build_world, filters
from parts import small_model

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json, read_sealed
from latent_medi.evaluation.real_baseline import floors
from latent_medi.evaluation.settings import FloorsSettings
from latent_medi.experiment.shift_benchmark import benchmark_shift
from latent_medi.experiment.shift_settings import ShiftSettings
from latent_medi.latent_classifier.data import open_parts
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.selection.inputs import open_inputs
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

ONLY = {"site": ["aster", "NA"]}


@pytest.fixture(scope="module")
def some(tiny: Path, autoencoder: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the patches of two of three sites."""
    return encode_dataset(tiny / "data", autoencoder, tmp_path_factory.mktemp("some") / "latents", only=ONLY)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("planted"))


def run_settings(tiny: Path, out: Path, **values: Any) -> TrainSettings:
    defaults: dict[str, Any] = {"data": str(tiny / "data"), "latents": str(tiny / "latents"), "only": ONLY}
    return TrainSettings(**defaults | values, out=str(out), max_steps=2, global_batch=4, model=small_model())


def weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def test_training_is_the_same_from_latents_of_these_rows_alone(tiny: Path, some: Path, tmp_path: Path) -> None:
    whole = train(run_settings(tiny, tmp_path / "whole"))
    part = train(run_settings(tiny, tmp_path / "part", latents=str(some)))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(part)[name], value, rtol=1e-4, atol=1e-5)
    record = read_sealed(tmp_path / "part" / "run.json", "")[0]["run"]
    assert record["settings"]["only"] == ONLY
    with pytest.raises(UserError, match="patches have no latents in"):
        train(run_settings(tiny, tmp_path / "all", latents=str(some), only={}))
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(run_settings(tiny, tmp_path / "whole", only={"site": ["aster"]}))


def test_a_run_without_a_filter_has_the_record_of_earlier_versions(tiny: Path, tmp_path: Path) -> None:
    train(run_settings(tiny, tmp_path / "run", only={}))
    assert "only" not in read_sealed(tmp_path / "run" / "run.json", "")[0]["run"]["settings"]


def test_a_classifier_learns_and_is_scored_on_these_rows(tiny: Path, some: Path) -> None:
    settings = ClassifierSettings(str(tiny / "data"), "out", latents=str(some), only=ONLY, max_steps=1)
    dataset = PatchDataset.open(tiny / "data")
    data, validation, _, _ = open_parts(settings, None, torch.device("cpu"))
    for rows, value in ((data.rows, "train"), (validation.rows, "test")):
        found = dataset.index.iloc[rows]
        assert set(found["site"]) <= set(ONLY["site"])
        kept = (dataset.index["split_main"] == value) & dataset.index["site"].isin(ONLY["site"])
        assert len(found) == kept.sum()
    with pytest.raises(UserError, match="patches have no latents in"):
        open_parts(replace(settings, only={}), None, torch.device("cpu"))


def test_export_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    words = ["export", str(tiny / "data"), f"out={tmp_path / 'out'}", "split=main", "only.site=[aster, NA]"]
    assert main(words) == 0
    index = PatchDataset.open(tiny / "data").index
    counts = index[index["site"].isin(ONLY["site"])]["split_main"].value_counts().to_dict()
    manifest = read_json(tmp_path / "out" / "export.json")
    assert manifest["parts"] == counts
    assert manifest["only"] == ONLY
    assert main([*words[:2], f"out={tmp_path / 'none'}", "only.site=astre"]) == 2


def test_floors_and_selection_take_these_rows(planted: World, tmp_path: Path) -> None:
    only = {"class": ["rings", "stripes"]}
    settings = FloorsSettings(data=str(planted.real), out=str(tmp_path), colour_free=False, real_splits=20, only=only)
    (found,) = floors(settings, [filters()])["encoders"].values()
    assert {cell["combination"]["class"] for cell in found["cells"]} == set(only["class"])
    assert found["ceilings"]["class"]["chance"] == pytest.approx(1 / 2)
    chosen = SelectSettings(str(planted.medi), str(planted.real), only=only, filters=["outliers"], rank="distance")
    inputs = open_inputs(chosen)
    index = PatchDataset.open(planted.real).index
    expected = index[(index["split_main"] == "train") & index["class"].isin(only["class"])]
    pd.testing.assert_series_equal(inputs.real["key"], expected["key"].reset_index(drop=True))


def test_levels_of_the_shift_benchmark_are_drawn_from_these_rows(planted: World, tmp_path: Path) -> None:
    def note(changes: dict[str, Any]) -> None:
        ran.append(changes)
        raise InterruptedError

    ran: list[dict[str, Any]] = []
    names = []
    targets = [{"class": "rings", "site": "north"}]
    filtered: list[dict[str, list[str]]] = [{}, {"site": ["north", "east"]}]
    for only in filtered:
        out = str(tmp_path / str(len(ran)))
        settings = ShiftSettings(str(planted.real), out, levels=[1.0], held_out=targets, only=only)
        with pytest.raises(InterruptedError):
            benchmark_shift(settings, note)
        names.append(ran[-1]["split"])
        assert ran[-1].get("only", {}) == only
    index = PatchDataset.open(planted.real).index
    assert names[0] != names[1]
    outside = index["site"] == "south"
    assert set(index[f"split_{names[1]}"][outside]) == {""}
    assert set(index[f"split_{names[0]}"][outside]) > {"train", "test"}
