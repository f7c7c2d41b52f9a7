"""Data that name neither patients nor sites: images in a folder per class, from import to report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_world import CLASS_SCHEMA, filters, render
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.real_baseline import floors
from latent_medi.evaluation.settings import EvaluateSettings, FloorsSettings
from latent_medi.report.render import render_report
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

PER_CLASS = {"blobs": 200, "rings": 100, "stripes": 60}
PATTERN = r"pattern=(?P<class>[^/]+)/.*\.png"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of such images, five of which are also there mirrored, under another name."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for kind, count in PER_CLASS.items():
        (folder / "tiles" / kind).mkdir(parents=True)
        for number in range(count):
            image = render(kind, "east", "formalin", draw)
            Image.fromarray(image).save(folder / "tiles" / kind / f"{number:03d}.png")
            if kind == "rings" and number < 5:
                Image.fromarray(image[:, ::-1]).save(folder / "tiles" / kind / f"copy-{number}.png")
    words = [f"folder={folder / 'tiles'}", f"out={folder / 'data'}", PATTERN, "source_mpp=0.5", "patch_size=32"]
    assert main(["shards", "images", *words]) == 2
    assert main(["shards", "images", *words, "patient_is=image"]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def divided(data: Path) -> PatchDataset:
    """With 5 % of the labels for training."""
    fractions = "fractions={train: 0.05, unlabelled: 0.35, probe: 0.2, test: 0.4}"
    assert main(["split", str(data), fractions, "stratify=[class]"]) == 0
    return PatchDataset.open(data)


def test_each_image_is_a_patient_and_says_so(divided: PatchDataset) -> None:
    assert divided.patient_is == "image"
    assert divided.index["patient"].nunique() == len(divided) == 365
    assert (divided.index["patient"] == divided.index["key"]).all()


def test_five_per_cent_of_the_labels_are_so_of_every_class(divided: PatchDataset) -> None:
    for kind in PER_CLASS:
        here = divided.index[divided.index["class"] == kind]
        assert (here["split_main"] == "train").mean() == pytest.approx(0.05, abs=0.005 + 0.5 / len(here)), kind


def test_copies_are_in_one_part(divided: PatchDataset) -> None:
    parts = divided.index.set_index("key")["split_main"]
    for number in range(5):
        assert parts[f"rings/{number:03d}"] == parts[f"rings/copy-{number}"]


def test_the_evaluation_needs_no_site_and_names_what_counts_as_a_patient(divided: PatchDataset, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    common = ("model", "model", 0, 0, 0.5)
    samples = [
        Patch(f"s/{kind}/{i}", render(kind, "east", "formalin", draw), *common, {"class": kind}, "synthetic")
        for kind in PER_CLASS
        for i in range(40)
    ]
    write_dataset(tmp_path / "medi", samples, "medi", CLASS_SCHEMA, 32, 0.5)
    settings = EvaluateSettings(
        real=str(divided.folder),
        synthetic={"medi": str(tmp_path / "medi")},
        out=str(tmp_path / "out"),
        colour_free=False,
        downstream=False,
        real_splits=20,
    )
    with pytest.raises(UserError, match="site_field=''"):
        evaluate(settings, [filters()])
    settings.site_field = ""
    metrics = evaluate(settings, [filters()])
    assert (metrics.dataset.site_field, metrics.dataset.patient_is) == ("", "image")
    assert any("each image counts as one" in text for text in metrics.warnings)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["dataset"]["patient_is"] == "image"
    page = tmp_path / "report.html"
    render_report(metrics, page, title="t", real=divided.folder, synthetic=settings.synthetic, per_cell=2)
    text = page.read_text()
    assert "each image counts as one" in text
    assert "has 365 real images (365 patches); no image is in both training and test, and a patient may be" in text


def test_real_images_alone_are_measured_without_a_site(divided: PatchDataset, tmp_path: Path) -> None:
    settings = FloorsSettings(data=str(divided.folder), out=str(tmp_path), colour_free=False, real_splits=20)
    with pytest.raises(UserError, match="no categorical field 'site'"):
        floors(settings, [filters()])
    settings.site_field = ""
    found = floors(settings, [filters()])
    assert {cell["combination"]["class"] for cell in found["encoders"]["filters"]["cells"]} == set(PER_CLASS)
