"""The shards load unchanged in webdataset and in datasets, with equal counts and metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slide_parts import tissue, write_slide

from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.cut import cut_slides
from latent_medi.shards.writing.writer import Patch, write_dataset


@pytest.fixture(scope="module", params=["written", "cut from slides"])
def dataset(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_patches: Callable[..., list[Patch]],
    schema: Schema,
) -> PatchDataset:
    folder = tmp_path_factory.mktemp("d")
    if request.param == "written":
        # the first five ages are unknown: a reader that infers types from them must still take the later ones
        return write_dataset(folder / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)
    rows = []
    for number in range(3):
        name = f"TCGA-3L-AA1B-01Z-00-DX{number}.8923A151-A690-40B7-9E5A-FCBEDFC2394F.tif"
        write_slide(folder / name, tissue(900, 700, number))
        rows.append(
            {"slide": name, "patient": f"p{number}", "site": ("NA", "01")[number % 2], "age": ("", "61")[number % 2]}
        )
    pd.DataFrame(rows).to_csv(folder / "slides.csv", index=False)
    settings = SlideSettings(
        source=str(folder),
        table=str(folder / "slides.csv"),
        out=str(folder / "set"),
        categorical=["site"],
        continuous=["age"],
        patch_size=64,
        mpp=1.0,
        max_patches=9,
    )
    cut_slides(settings)
    return PatchDataset.open(folder / "set")


of_the_index = {"shard", "offset", "size", "image_crc32", "json_crc32", "image_fingerprint", "shared_picture"}


def check(dataset: PatchDataset, samples: list[tuple[str, dict[str, object], np.ndarray]]) -> None:
    assert [key for key, _, _ in samples] == dataset.index["key"].tolist()
    assert np.array_equal(np.stack([image for _, _, image in samples]), dataset.read(np.arange(len(dataset))))
    for (_, found, _), (_, row) in zip(samples, dataset.index.iterrows(), strict=True):
        assert set(found) == set(row.index) - of_the_index
        for column in set(found) - {"age"}:
            assert found[column] == row[column], column
        assert found["age"] == "unknown" if np.isnan(row["age"]) else float(str(found["age"])) == row["age"]


def test_webdataset_reads_them(dataset: PatchDataset) -> None:
    import webdataset

    shards = sorted(str(p) for p in (dataset.folder / "data").glob("*.tar"))
    samples = [
        (s["__key__"], json.loads(s["json"]), np.asarray(Image.open(io.BytesIO(s["png"]))))
        for s in webdataset.WebDataset(shards, shardshuffle=False)
    ]
    check(dataset, samples)


def test_datasets_reads_them(dataset: PatchDataset, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(
        "webdataset", data_dir=str(dataset.folder), data_files="data/*.tar", split="train", cache_dir=str(tmp_path)
    )
    check(dataset, [(s["__key__"], s["json"], np.asarray(s["png"])) for s in loaded])
