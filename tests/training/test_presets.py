"""Every packaged recipe for Stable Diffusion latents trains, samples and reloads, with an autoencoder of exactly that
architecture and random weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from parts import stable_diffusion_vae

from latent_medi.core import config
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.diffusion.settings import SamplerSettings
from latent_medi.latents.encode import encode
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.estimate.report import GIB, estimate
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.settings import EstimateSettings, TrainSettings

PRESETS = {"8gb": (8, 93), "12gb": (12, 210), "24gb": (24, 373), "80gb": (80, 373)}
"""GiB of memory and million parameters."""

# 80gb is 24gb with another device_batch, which is 1 here.
RECIPES = [*(f"presets/{name}" for name in PRESETS if name != "80gb"), "medi_faithful", "cls_faithful"]

CPU = ["global_batch=1", "device_batch=1", "compile=false", "max_steps=3", "log_every_images=1"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``data``, four patches of 256 px, their ``latents``, and the ``autoencoder``."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    stable_diffusion_vae(folder / "autoencoder")
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"class": list("abab"), "tss": ["aster", "birch", "NA", "aster"]})
    patches = [
        Patch(f"k{i}", draw.integers(0, 256, (256, 256, 3), dtype=np.uint8), f"p{i}", f"s{i}", 0, 0, 0.5, row)
        for i, row in enumerate(table.to_dict("records"))
    ]
    schema = Schema.from_table(table, "class", ["tss"])
    dataset = write_dataset(folder / "data", patches, "four", schema, 256, 0.5)
    parts = ["train"] * 3 + ["test"]
    for name in ("main", "medi"):
        dataset.add_split(name, parts, {"test": "p3"})
    encode(
        EncodeSettings(
            str(folder / "data"), str(folder / "latents"), str(folder / "autoencoder"), device_batch=2, device="cpu"
        )
    )
    return folder


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One at a time: L's checkpoint takes 6 GB of disk, and as much memory again."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "presets.lock"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_samples_and_reloads(name: str, encoded: Path, tmp_path: Path) -> None:
    words = [f"data={encoded / 'data'}", f"latents={encoded / 'latents'}", f"autoencoder={encoded / 'autoencoder'}"]
    # CPUs multiply bf16 slowly and have no fp16 autocast worth its name: the network is what is tried here.
    settings = config.parse(TrainSettings, ["--config", name, *words, f"out={tmp_path}", "precision=fp32", *CPU])
    model = train(settings)
    for _, checkpoint in checkpoint_folders(tmp_path / "checkpoints"):  # gigabytes, for L
        shutil.rmtree(checkpoint)
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["images"]) for row in rows] == [1, 2, 3]
    assert all(np.isfinite(float(row["loss"])) for row in rows)

    pipeline = MediPipeline.from_pretrained(model)
    fields = {"class": "a"} if name == "cls_faithful" else {"class": "a", "tss": "NA"}
    sampler = {"sampler": "ddim"} if "faithful" in name else {}
    images = pipeline(num_images=1, steps=2, output_type="np", **sampler, **fields).images
    assert np.shape(images) == (1, 256, 256, 3)
    # Saved by the pipeline and read again, it is the same model.
    latents = few_latents(pipeline, fields)
    shutil.rmtree(model)
    pipeline.save_pretrained(tmp_path / "again")
    hashed = pipeline.autoencoder.hash
    del pipeline
    again = MediPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(few_latents(again, fields), latents)
    assert again.autoencoder.hash == hashed
    shutil.rmtree(tmp_path)


def test_the_largest_preset_is_the_one_before_it_in_larger_batches() -> None:
    two = [config.parse(EstimateSettings, ["--config", f"presets/{name}"]) for name in ("24gb", "80gb")]
    assert replace(two[1], device_batch=two[0].device_batch) == two[0]


def few_latents(pipeline: MediPipeline, fields: dict[str, str]) -> torch.Tensor:
    """Latents of one sample after two steps; decoding them would take longer than all the rest."""
    noise, generators = draw_noise([0], pipeline.latent_shape)
    conditions = pipeline.conditions([fields])
    return pipeline.generate_latents(conditions, noise, SamplerSettings("ddim", 2), generators=generators)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fits_its_card(name: str) -> None:
    memory, millions = PRESETS[name]
    settings = config.parse(EstimateSettings, ["--config", f"presets/{name}"])
    result = estimate(settings)
    # With a second running average, and half a GiB for CUDA itself and for what else uses the card.
    peak = result["bytes"]["peak"] + result["bytes"]["weights"]
    assert peak < (memory - 0.5) * GIB
    assert round(result["parameters"] / 1e6) == millions
    assert settings.precision == "bf16"
    # The comment says what the estimate is; torch's next version may save a little more or less.
    told = re.search(r"Estimated: peak ([\d.]+) GiB", config.find_config(f"presets/{name}").read_text())
    assert told is not None
    assert float(told[1]) == pytest.approx(result["bytes"]["peak"] / GIB, rel=0.02)


def test_presets_differ_only_in_what_memory_decides() -> None:
    free = {"lr", "device_batch", "model", "checkpoint_activations"}
    loaded = [config.load_yaml(f"presets/{name}") for name in PRESETS]
    assert len({str({k: v for k, v in values.items() if k not in free}) for values in loaded}) == 1


def test_faithful_recipes_differ_in_the_fields_only() -> None:
    words = ["out=x"]
    medi, cls = (config.parse(TrainSettings, ["--config", f"{name}_faithful", *words]) for name in ("medi", "cls"))
    assert medi.model.fields == ["class", "tss"]
    assert replace(cls, model=replace(cls.model, fields=medi.model.fields)) == medi
    assert (medi.objective.prediction, medi.objective.schedule, medi.objective.weighting) == (
        "epsilon",
        "linear",
        "uniform",
    )
    assert medi.dropout.keep_all == 1
    assert medi.betas == (0.95, 0.999)
