"""``run --config tcga_ut/paper`` and ``tcga_ut/beyond`` from tars as the Hub has them, at a size for processors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from announced import announced, check_announced
from cluster_parts import REPOSITORY, images_logged, relative_distance, tensors
from hub_tars import PROJECTS, UNLISTED, published_parts, slides_of_hospitals, write_hub_tars
from killed_runs import end_after_kills
from parts import stable_diffusion_vae

from latent_medi.evaluation.results import read_metrics
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import PatchDataset

STAGES = ("shards", "audit", "encode", "train", "plan", "sample", "evaluate", "report")
STEPS = 12
RCC = ["Kidney_renal_clear_cell_carcinoma", "Kidney_renal_papillary_cell_carcinoma"]
NETWORK = {"block_out_channels": [32, 64], "attention": [False, False], "layers_per_block": 1, "norm_num_groups": 8}


@pytest.fixture(scope="module")
def tables(shared: Path) -> Path:
    folder = shared / "data" / "tcga_metadata"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def small(base: str, folder: Path, tables: Path) -> dict[str, Any]:
    """A configuration with Stable Diffusion's autoencoder and UNI's architecture (one block of it), both of random
    weights, on patches of 32 px and with few steps; its tars are in ``folder/hub``."""
    train: dict[str, Any] = {"max_steps": STEPS, "global_batch": 16, "device_batch": 16, "precision": "fp32"}
    train |= {"channels_last": False, "model": NETWORK, "log_every_images": 16, "checkpoint_every_images": 32}
    return {
        "base": base,
        "source": str(folder / "hub"),
        "metadata": str(tables / "all_slide_metadata.csv"),
        "codes": str(tables / "tissueSourceSite.tsv"),
        "patch_size": 32,
        "autoencoder": str(stable_diffusion_vae(folder / "vae")),
        "encode": {"precision": "fp32", "reconstruction_error": {"patches": 0}},
        "encoders": ["hub_tars:one_block_uni"],
        "train": train,
        "generate": {"sampler": {"steps": 2}, "device_batch": 16, "precision": "fp32"},
        "processes": 1,
    }


@pytest.fixture(scope="module")
def config(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's configuration at that size."""
    folder = tmp_path_factory.mktemp("paper")
    write_hub_tars(folder / "hub", tables)
    values = small("tcga_ut/paper", folder, tables)
    values["plan"] = {"tasks": {"rcc": RCC}}  # the tars have no third class
    values["evaluate"] = {"medi_protocol": {"ratios": [0.0, 1.0], "sites": [2, 0], "seeds": 2}, "real_splits": 0}
    (folder / "paper.yaml").write_text(yaml.safe_dump(values))
    return folder / "paper.yaml"


def start_run(config: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start the experiment; what it prints is appended to a file beside its folder."""
    with open(out.with_suffix(".log"), "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "latent_medi.cli", "run", "--config", str(config), f"out={out}", *words],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(config: Path, out: Path, *words: str) -> Path:
    """Run the experiment to its end; returns its folder."""
    assert start_run(config, out, *words).wait(timeout=900) == 0, out.with_suffix(".log").read_text()[-4000:]
    return out


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """Folder of the experiment that nobody disturbs."""
    return run(config, config.parent / "unbroken")


def test_the_configuration_asks_for_the_papers_study() -> None:
    from latent_medi.core import config as settings_files

    values = settings_files.load(ExperimentSettings, Path("tcga_ut/paper"))
    assert (values["recipe"], values["split"], values["site_field"]) == ("tcga-ut", "medi", "tss")
    for name, fields in (("medi", ["class", "tss"]), ("cls", ["class"])):
        from latent_medi.training.settings import TrainSettings

        training = settings_files.load(TrainSettings, Path(values["models"][name]["config"]))
        assert training["model"]["fields"] == fields


@pytest.mark.slow
def test_the_split_is_the_published_one_whatever_the_order_of_the_tars(tables: Path, tmp_path: Path) -> None:
    published = published_parts(tables)
    orders = set()
    for seed in range(3):
        source = tmp_path / f"hub-{seed}"
        slides = write_hub_tars(source, tables, seed)
        files = {"metadata": tables / "all_slide_metadata.csv", "codes": tables / "tissueSourceSite.tsv"}
        index = load_recipe("tcga-ut").build(source, tmp_path / f"data-{seed}", 32, **files).index
        orders.add(tuple(index["slide"]))
        found = index.set_index("slide")["split_medi"].fillna("").to_dict()
        assert found == {slide: published.get(slide, "") for slide in slides["slide"]}
        assert found[UNLISTED] == ""
    assert len(orders) == 3


@pytest.mark.slow
def test_from_the_hubs_tars_to_the_papers_tables(finished: Path, tables: Path) -> None:
    index = PatchDataset.open(finished / "data").index
    assert set(index["class"]) == set(PROJECTS)
    published = published_parts(tables)
    found = index.set_index("slide")["split_medi"].fillna("").to_dict()
    assert found == {slide: published.get(slide, "") for slide in index["slide"]}
    distances = pd.read_csv(finished / "per_class_distance.csv").query("`class` != 'mean'")
    for reference in ("training images", "held-out patients"):
        rows = distances[distances["reference"] == reference]
        assert set(rows["class"]) == set(PROJECTS)
        assert np.isfinite(rows[["medi_kid", "cls_kid"]].to_numpy()).all()
    scores = pd.read_csv(finished / "medi_summary.csv")
    assert set(scores["task"]) == {"nsclc", "uterine", "rcc"}
    assert set(scores["pool"].dropna()) >= {"union", "separate"}
    assert scores["mean"].notna().all()
    assert (finished / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_it_takes_what_was_announced(config: Path, finished: Path) -> None:
    from latent_medi.core import config as settings_files

    values = settings_files.load(ExperimentSettings, config)
    settings = settings_files.make(ExperimentSettings, values, str(config))
    told = announced(settings, config.parent / "nowhere")
    check_announced(told, replace(settings, out=str(finished)))


@pytest.mark.slow
def test_killed_once_in_each_stage_it_ends_with_equal_tables(config: Path, finished: Path) -> None:
    out = config.parent / "killed"

    # A model is broken off after a checkpoint and before its end.
    signs = {"train": lambda: images_logged(out / "medi") >= 16 * STEPS // 2}
    end_after_kills(lambda: start_run(config, out), out, STAGES, signs)
    tables = sorted(path.name for path in finished.glob("*.csv"))
    assert {"per_class_distance.csv", "medi_results.csv", "medi_summary.csv"} <= set(tables)
    for name in tables:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config: Path, finished: Path) -> None:
    """Latents to a step of fp16 in few values, as a process has another number of threads; weights and images to
    rounding, as sums of gradients are taken in another order. Tables are of those images: an image's features move by
    as little (distances by 1.4e-5 where this was measured), and no patch of these changes its class."""
    two = run(config, config.parent / "two", "launch_processes=2")
    log = two.with_suffix(".log").read_text()
    stages = ("encode", "medi", "cls", "embed")
    assert [name for name in stages if f"[{name}] " in log] == list(stages)
    assert log.count("2 processes; the first has cpu") == 6  # encode, two models twice, embed
    ours, theirs = tensors(finished / "latents"), tensors(two / "latents")
    assert ours.keys() == theirs.keys()
    for key, whole in ours.items():
        torch.testing.assert_close(theirs[key].double(), whole.double(), rtol=2**-10, atol=1e-5)
        assert (theirs[key] != whole).double().mean() < 0.01
    for name in ("medi", "cls"):
        assert (two / f"plan-{name}.csv").read_bytes() == (finished / f"plan-{name}.csv").read_bytes()
        assert relative_distance(finished / name, two / name, "model/unet") <= 1e-5
        images = [PatchDataset.open(folder / "synthetic" / name) for folder in (finished, two)]
        rows = np.arange(len(images[0]))
        assert len(images[1]) == len(rows)
        one, other = (np.stack(list(each.read(rows))).astype(int) for each in images)
        assert np.abs(one - other).max() <= 1
    for name in sorted(path.name for path in finished.glob("*.csv")):
        found = [pd.read_csv(folder / name) for folder in (finished, two)]
        pd.testing.assert_frame_equal(*found, rtol=2e-4, atol=1e-11)


@pytest.mark.slow
def test_beyond_the_paper_what_has_too_few_patients_is_listed(tables: Path, tmp_path: Path) -> None:
    """The run makes its own split, evaluates the held-out combinations that have the patients, and names the others."""
    slides = write_hub_tars(tmp_path / "hub", tables, slides=slides_of_hospitals(tables))
    values = small("tcga_ut/beyond", tmp_path, tables) | {"seen_per_cell": 1, "unseen_per_cell": 6}
    values["train"] |= {"max_images": 0, "compile": False, "model": {**NETWORK, "preset": ""}}
    values["evaluate"] = {"repeats": 1, "real_splits": 0, "colour_free": False}
    (tmp_path / "beyond.yaml").write_text(yaml.safe_dump(values))
    out = run(tmp_path / "beyond.yaml", tmp_path / "out")

    data = PatchDataset.open(out / "data")
    held_out = data.info["splits"]["beyond"]["recipe"]["held_out"]
    part = data.index.groupby("patient")["split_beyond"].unique()
    assert part.str.len().eq(1).all()
    tested = {}
    for combination in held_out:
        rows = data.index[(data.index[list(combination)].astype(str) == pd.Series(combination)).all(axis=1)]
        assert "train" not in set(rows["split_beyond"])
        tested[tuple(combination.values())] = rows[rows["split_beyond"] == "test"]["patient"].nunique()
    assert set(data.index["site"]) == set(slides["site"])
    metrics = read_metrics(out)
    evaluated = {tuple(each.values()) for each in metrics.dataset.held_out}
    listed = {tuple(each.combination.values()): each.reason for each in metrics.dataset.not_evaluated}
    assert evaluated == {each for each, patients in tested.items() if patients >= 10}
    few = {each: patients for each, patients in tested.items() if patients < 10}
    assert listed == {each: f"{n} test patients, 10 are needed" for each, n in few.items()}
    assert evaluated
    assert listed
    log = (tmp_path / "out.log").read_text()
    assert f"{len(evaluated)} of {len(held_out)} combinations that the split holds out are evaluated" in log
    for name, fields in (("medi", {"class", "site", "gender", "race", "age"}), ("cls", {"class"})):
        assert set(PatchDataset.open(out / "synthetic" / name).schema.names) == fields
    assert (out / "report.html").stat().st_size > 10_000
