"""The images and bytes that packaged experiments announce, against what small runs of them leave on the disk.

``tcga_ut/paper`` is in ``test_tcga_ut_paper.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hub_tars
import numpy as np
import pandas as pd
import pytest
from announced import announced, check_announced
from parts import make_autoencoder
from PIL import Image

from latent_medi.cli import main
from latent_medi.core import config
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.latents.autoencoder import save_autoencoder

SMALL = {
    "train": {
        "max_steps": 2,
        "max_images": 0,
        "global_batch": 16,
        "device_batch": 16,
        "precision": "fp32",
        "channels_last": False,
        "compile": False,
        "checkpoint_every_images": 16,
        "model": {
            "preset": "",
            "block_out_channels": [32, 64],
            "attention": [False, True],
            "attention_head_dim": 32,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    },
    "encode": {"precision": "fp32", "reconstruction_error": {"patches": 0}},
    "generate": {"sampler": {"steps": 1}, "precision": "fp32", "device_batch": 32},
    "seen_per_cell": 1,
    "unseen_per_cell": 2,
    "patch_size": 32,
    "processes": 1,
    "launch_processes": 1,
    "stages": ["shards", "audit", "encode", "train", "plan", "sample"],
}


def small(name: str, out: Path, **values: Any) -> ExperimentSettings:
    """A packaged experiment with few updates and samples of small networks."""
    packaged = config.load(ExperimentSettings, Path(name))
    return config.make(
        ExperimentSettings, config.merge(config.merge(packaged, SMALL), values | {"out": str(out)}), name
    )


def check_run(settings: ExperimentSettings, nowhere: Path) -> None:
    expected = announced(settings, nowhere)
    assert not [key for key, row in expected.items() if key[0] in ("encode", "train", "sample") and row.images is None]
    run(settings)
    check_announced(expected, settings)


@pytest.mark.slow
def test_prostate_at_256_px(shared: Path, tmp_path: Path) -> None:
    """Real biopsies, two patches of each, and the local TAEF2; patches of 64 px."""
    source, real = tmp_path / "source", shared / "data" / "prostate"
    if not (real / "manifest.csv").is_file():
        pytest.skip(f"{real} has no manifest.csv")
    source.mkdir()
    (source / "images").symlink_to(real / "images")
    table = pd.read_csv(real / "manifest.csv", dtype=str)
    table.groupby("patient").head(2).to_csv(source / "manifest.csv", index=False)
    taef2 = str(shared / "models" / "taef2")
    check_run(
        small("prostate/256px", tmp_path / "out", source=str(source), autoencoder=taef2, patch_size=64),
        tmp_path / "nowhere",
    )


@pytest.mark.slow
def test_beyond_from_tars(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own split, and a small autoencoder of random weights on patches of 32 px."""
    tables = shared / "data" / "tcga_metadata"
    if not tables.is_dir():
        pytest.skip(f"{tables} is absent")
    monkeypatch.setattr(hub_tars, "SITES", {"train": 5, "test": 5})
    hub_tars.write_hub_tars(tmp_path / "hub", tables, patches=1)
    save_autoencoder(make_autoencoder(), tmp_path / "small")
    settings = small(
        "tcga_ut/beyond",
        tmp_path / "out",
        source=str(tmp_path / "hub"),
        metadata=str(tables / "all_slide_metadata.csv"),
        codes=str(tables / "tissueSourceSite.tsv"),
        autoencoder=str(tmp_path / "small"),
        split_settings={"hold_out_share": 0.06},  # of few patients
        plan_fields=["class", "site"],
    )
    check_run(settings, tmp_path / "nowhere")


@pytest.mark.slow
def test_own_images(tmp_path: Path) -> None:
    """A folder of images, as the header of the configuration says; evaluated by the demo's encoder."""
    rng, rows = np.random.default_rng(0), []
    for number in range(96):
        tumour, site = ("normal", "tumour")[number % 2], ("north", "south")[number // 2 % 2]
        for patch in range(2):
            file = tmp_path / f"{number}_{patch}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
            rows.append({"image": file.name, "patient": str(number), "class": tumour, "site": site})
    pd.DataFrame(rows).to_csv(tmp_path / "patches.csv", index=False)
    data = tmp_path / "own"
    words = f"shards images table={tmp_path / 'patches.csv'} out={data} class_field=class categorical=[site]"
    assert main([*words.split(), "source_mpp=0.5", "patch_size=32"]) == 0
    words = "hold_out=[{class: tumour, site: north}]|hold_out_fractions={probe: 0.4, test: 0.6}|stratify=[class, site]"
    assert main(["split", str(data), *words.split("|"), "fractions={train: 0.7, probe: 0.15, test: 0.15}"]) == 0
    save_autoencoder(make_autoencoder(), tmp_path / "small")
    settings = small(
        "own/experiment",
        tmp_path / "out",
        data=str(data),
        autoencoder=str(tmp_path / "small"),
        encoders=["demo"],
        stages=[*SMALL["stages"], "evaluate"],
        evaluate={"downstream": False, "real_splits": 0},
        seen_per_cell=20,
        unseen_per_cell=40,
    )
    check_run(settings, tmp_path / "nowhere")
