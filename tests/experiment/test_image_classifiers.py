"""Image classifiers in an experiment: of real patches alone, as the space of the selection, and of growing shares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from evaluation_world import Size, write_real
from source_layouts import write_nct_crc

from latent_medi.cli import main
from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.features.encoders import load_encoder
from latent_medi.image_classifier.comparison import read_comparison
from latent_medi.metadata.settings import SplitSettings
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.split import split_folder

NETWORK = {
    "block_out_channels": [16, 32],
    "attention": [False, True],
    "attention_head_dim": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
STAGES = ["shards", "encode", "train", "plan", "sample", "real_classifier", "select", "image_classifier"]


def packaged(name: str, folder: Path, **values: Any) -> Experiment:
    found = config.merge(config.load(ExperimentSettings, Path(name)), {"out": str(folder / "out")} | values)
    return Experiment(config.make(ExperimentSettings, found, name))


def test_packaged_experiments_fit_together(tmp_path: Path) -> None:
    """Each of them declares every stage; 5 % of each class of the colorectal images is labelled."""
    demo = packaged("histodiffusion/demo", tmp_path)
    crc = packaged("histodiffusion/crc", tmp_path, source=str(tmp_path / "crc"))
    write_real(tmp_path / "other", Size(train=1, probe=0, test=0, patches=1), seed=5)
    second = {"second": {"data": str(tmp_path / "other")}}
    prostate = packaged("histodiffusion/prostate", tmp_path, source=str(tmp_path / "p"), corpus=second)
    for experiment in (demo, crc, prostate):
        declare(experiment)
        assert list(experiment.synthetic) == ["guided", "finetuned", "lora", "scratch"]
        # An adapter adds no field, and sees as many images as the whole model's fine-tuning.
        steps = {name: (model.training or {})["max_steps"] for name, model in experiment.models.items()}
        assert experiment.models["lora"].parent is experiment.models["class_vectors"]
        assert steps["class_vectors"] + steps["lora"] == steps["finetuned"] <= steps["scratch"] / 3
        assert experiment.comparison().percents == [50, 100, 300]
        assert experiment.selection("guided").encoder.endswith("image_classifiers/real/seed0/model")
        assert experiment.models["guided"].fields == []
        assert experiment.models["finetuned"].fields == ["class"]
    assert crc.autoencoder == str(tmp_path / "out" / "autoencoder" / "autoencoder")
    assert crc.encodings[""].autoencoder == crc.autoencoder
    assert (crc.adaptation().init, crc.adaptation().split) == ("sd-vae-ft-mse", "few")

    folder = tmp_path / "data"
    load_recipe("nct-crc").build(write_nct_crc(tmp_path / "crc", 40, 3), folder, patch_size=56)
    values = config.merge({"site_field": ""}, crc.settings.split_settings) | {"data": str(folder), "name": "few"}
    split_folder(config.make(SplitSettings, values, "split_settings"))
    index = PatchDataset.open(folder).index
    counts = pd.crosstab(index["class"].astype(str), index["split_few"])
    assert (counts[["train", "val", "rest", "test"]].to_numpy() == [2, 2, 36, 3]).all()
    assert set(index.loc[index["split_few"] == "test", "set"]) == {"CRC-VAL-HE-7K"}


@pytest.mark.parametrize(
    ("stages", "values", "words"),
    [
        (STAGES, {"image_classifier": ""}, "names no configuration"),
        (["shards", "plan", "sample", "select"], {}, "does not list real_classifier"),
        (STAGES, {"models": {"real": {"config": "demo/cls"}}}, "can be called 'real'"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(stages: list[str], values: dict[str, Any], words: str) -> None:
    own: dict[str, Any] = {"data": "data", "stages": stages, "select": {"encoder": "image_classifier"}}
    own |= {"image_classifier": "histodiffusion/vit", "models": {"cls": {"config": "demo/cls"}}}
    with pytest.raises(UserError, match=words):
        Experiment(config.build(ExperimentSettings, own | values))


def settings(folder: Path) -> dict[str, Any]:
    """An experiment on a planted cohort, which takes seconds where it trains."""
    write_real(folder / "data", Size(train=10, probe=10, test=10, patches=2))
    classifier = {"network": "test_resnet", "image_size": 64, "max_steps": 6, "global_batch": 16, "lr": 3e-3}
    classifier |= {"validation_value": "probe", "augment": {"rand_augment": ""}}
    (folder / "classifier.yaml").write_text(yaml.safe_dump(classifier))
    return {
        "data": str(folder / "data"),
        "out": str(folder / "out"),
        "stages": STAGES,
        "models": {"plain": {"config": "demo/cls"}},
        "train": {"max_steps": 2, "global_batch": 8, "log_every_images": 8, "model": NETWORK},
        "plan_fields": ["class"],
        "seen_per_cell": 8,
        "generate": {"sampler": {"steps": 2}},
        "select": {
            "encoder": "image_classifier",
            "fields": ["class"],
            "cells": ["class"],
            "filters": ["centroid"],
            "rank": "centroid",
            "adjust": False,
            "farthest": 0,
            "percent": 10,
            "share": 1.0,
        },
        "image_classifier": str(folder / "classifier.yaml"),
        "image_classifier_train": {"seeds": 1, "percents": [10]},
    }


def words(folder: Path, values: dict[str, Any]) -> list[str]:
    (folder / "experiment.yaml").write_text(yaml.safe_dump(values))
    return ["run", "--config", str(folder / "experiment.yaml")]


def made(out: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (out / "image_classifiers" / name / "model" / "classifier.json").stat().st_mtime_ns for name in names}


@pytest.mark.slow
def test_selected_by_the_labelled_patches_own_classifier_then_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, out = settings(tmp_path), tmp_path / "out"
    assert main(words(tmp_path, values)) == 0
    printed = capsys.readouterr().out
    assert "real patches alone" in printed
    assert "plain, selected" in printed
    found = read_comparison(out / "image_classifiers")
    assert [(row.training_set, row.choice) for row in found.rows] == [
        ("real", "none"),
        ("plain", "random"),
        ("plain", "selected"),
    ]
    recipe = PatchDataset.open(out / "synthetic" / "plain").info["selections"]["best"]["recipe"]
    labelled = load_encoder(out / "image_classifiers" / "real" / "seed0" / "model")
    assert recipe["encoder"]["fingerprint"] == labelled.fingerprint
    first = ["real/seed0", "plain/random-10-seed0", "plain/selected-10-seed0"]
    before = made(out, first)
    # Nothing is left to do; another seed adds trainings and keeps those that there are.
    assert main(words(tmp_path, values)) == 0
    values["image_classifier_train"]["seeds"] = 2
    assert main(words(tmp_path, values)) == 0
    assert made(out, first) == before
    more = read_comparison(out / "image_classifiers")
    assert [row.accuracy.by_seed[0] for row in more.rows] == [row.accuracy.mean for row in found.rows]
    assert len(more.rows[0].accuracy.by_seed) == 2
