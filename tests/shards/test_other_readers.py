"""The shards load unchanged in webdataset and in datasets, with equal counts and metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writer import Patch, write_dataset


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., list[Patch]], schema: Schema
) -> PatchDataset:
    # the first five ages are unknown: a reader that infers types from them must still take the later ones
    return write_dataset(
        tmp_path_factory.mktemp("d") / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7
    )


def check(dataset: PatchDataset, samples: list[tuple[str, dict[str, object], np.ndarray]]) -> None:
    assert [key for key, _, _ in samples] == dataset.index["key"].tolist()
    assert np.array_equal(np.stack([image for _, _, image in samples]), dataset.read(np.arange(len(dataset))))
    for (_, found, _), (_, row) in zip(samples, dataset.index.iterrows(), strict=True):
        for column in (
            "key",
            "patient",
            "slide",
            "origin",
            "class",
            "site",
            "x",
            "y",
            "source_mpp",
            "number",
            "note",
            "score",
        ):
            assert found[column] == row[column], column
        assert found["age"] == ("unknown" if np.isnan(row["age"]) else repr(row["age"]))


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
