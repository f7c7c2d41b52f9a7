"""``run --config histodiffusion/crc`` from the sources as they are published, at a size for processors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from cluster_parts import LONGEST, images_saved
from killed_runs import ForkedRun, end_after_kills
from parts import stable_diffusion_vae
from source_layouts import NCT_CRC_CLASSES, write_nct_crc, write_pannuke, write_pictures

from latent_medi.cli import main
from latent_medi.core import config as settings_files
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.image_classifier.comparison import METRICS
from latent_medi.shards.dataset import PatchDataset

MODELS = ("guided", "finetuned", "lora", "scratch")
PERCENTS = (50.0, 100.0, 300.0)
NETWORK = {"block_out_channels": [16, 32], "attention": [False, True], "attention_head_dim": 16}
NETWORK |= {"layers_per_block": 1, "norm_num_groups": 8}


def small(folder: Path) -> dict[str, Any]:
    """The configuration on patches of 32 px, with few steps, narrow networks and encoders that need no download."""
    steps = {"max_steps": 4, "warmup_images": 8}
    training: dict[str, Any] = {"global_batch": 8, "precision": "fp32", "log_every_images": 8}
    training |= {"checkpoint_every_images": 16}
    adaptation = {"max_steps": 3, "global_batch": 4, "precision": "fp32", "measure_patches": 9, "encoders": ["demo"]}
    adaptation |= {"perceptual": {"network": "demo"}, "classifier": {"network": "test_resnet"}}
    classifier = {"max_steps": 4, "global_batch": 8, "checkpoint_every_images": 16}
    return {
        "base": "histodiffusion/crc",
        "source": str(folder / "crc"),
        "corpus": {"pannuke": {"source": str(folder / "pannuke")}, "own": {"data": str(folder / "own")}},
        "patch_size": 32,
        "processes": 1,
        "parallel": 1,
        "autoencoder": str(stable_diffusion_vae(folder / "vae", widths=(16, 32, 64, 64))),
        "autoencoder_train": {**adaptation, "checkpoint_every_images": 4},
        "encode": {"precision": "fp32", "reconstruction_error": {"patches": 0}},
        "encoders": ["demo"],
        "train": {**training, "model": NETWORK},
        "models": {
            "guided": {
                "train": {"max_steps": 6, "warmup_images": 8},
                "classifier_train": {**classifier, "network": NETWORK},
            },
            "finetuned": {"train": steps},
            "class_vectors": {"train": steps},
            "lora": {"train": {**steps, "lora": {"rank": 2}}},
            "scratch": {"train": steps},
        },
        "seen_per_cell": 3,
        "generate": {"sampler": {"steps": 2}, "device_batch": 32, "precision": "fp32"},
        "select_rounds": 2,
        "image_classifier_train": {
            "network": "test_vit",
            "image_size": 32,
            "max_steps": 2,
            "max_images": 0,
            "global_batch": 8,
            "precision": "fp32",
            "evaluate_every_images": 0,
            "seeds": 2,
        },
        "evaluate": {"repeats": 1, "real_splits": 0},
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration beside its sources: NCT-CRC's folders of TIFF, PanNuke's arrays, and a dataset folder of
    further pictures, of which two are of the target's test set."""
    folder = tmp_path_factory.mktemp("crc")
    write_nct_crc(folder / "crc", train=40, test=3)
    write_pannuke(folder / "pannuke")
    write_pictures(folder / "pictures", 6)
    for kind in ("ADI", "TUM"):
        file = folder / "crc" / "CRC-VAL-HE-7K" / kind / f"{kind}-CRC000.tif"
        shutil.copy(file, folder / "pictures" / f"copy-{kind}.tif")
    words = ["shards", "images", f"folder={folder / 'pictures'}", f"out={folder / 'own'}", "name=own"]
    words += ["class_field=", "patient_is=image", "source_mpp=0.5", "patch_size=32"]
    assert main([*words, r"pattern=.*\.(?:png|tif)"]) == 0
    (folder / "crc.yaml").write_text(yaml.safe_dump(small(folder)))
    return folder / "crc.yaml"


def start_run(config: Path, out: Path) -> ForkedRun:
    return ForkedRun(["run", "--config", str(config), f"out={out}"], out.with_suffix(".log"))


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """Folder of the experiment that nobody disturbs."""
    out = config.parent / "unbroken"
    assert start_run(config, out).wait(timeout=3 * LONGEST) == 0, out.with_suffix(".log").read_text()[-4000:]
    return out


@pytest.mark.slow
def test_from_the_published_layouts_to_the_papers_table(finished: Path) -> None:
    index = PatchDataset.open(finished / "data").index
    labelled = index[index["split_few"] == "train"]
    assert labelled["class"].value_counts().tolist() == [2] * len(NCT_CRC_CLASSES)  # 5 % of 40
    corpus = PatchDataset.open(finished / "corpus").index
    assert sorted(corpus.loc[corpus["split_corpus"] != "train", "key"]) == ["copy-ADI", "copy-TUM"]
    assert len(corpus) == 3 * 5 + 6 + 2
    table = pd.read_csv(finished / "image_classifiers" / "classifiers.csv")
    assert table["training_set"].unique().tolist() == ["real", *MODELS]
    for name in MODELS:
        rows = table[table["training_set"] == name]
        assert sorted(zip(rows["choice"], rows["percent"], strict=True)) == [
            (choice, percent) for choice in ("random", "selected") for percent in PERCENTS
        ]
    assert (table["seeds"] == 2).all()
    for metric in METRICS:
        assert table[[f"{metric}_mean", f"{metric}_sem"]].notna().all(axis=None)
    assert (finished / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_killed_once_in_each_stage_it_ends_with_an_equal_table(config: Path, finished: Path) -> None:
    out = config.parent / "killed"
    stages = settings_files.load(ExperimentSettings, config)["stages"]
    signs = {
        "autoencoder": lambda: images_saved(out / "autoencoder"),
        "train": lambda: images_saved(out / "guided"),
        "classifier": lambda: images_saved(out / "classifiers" / "guided"),
        "sample": lambda: (out / "synthetic" / "guided").is_dir(),
        "image_classifier": lambda: list((out / "image_classifiers" / "guided").glob("*/model")),
    }
    end_after_kills(lambda: start_run(config, out), out, stages, signs)
    names = sorted(path.relative_to(finished) for path in finished.rglob("*.csv"))
    tables = [name for name in names if len(name.parts) == 1 or name.name == "classifiers.csv"]
    assert Path("image_classifiers/classifiers.csv") in tables
    assert Path("per_class_distance.csv") in tables
    for name in tables:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
