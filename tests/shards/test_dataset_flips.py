"""Single flipped bits in every file of a dataset folder: refused by name, or without any effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flips import flips

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.export import samples
from latent_medi.shards.reading.stream import PatchStream, epochs, webdataset_of
from latent_medi.shards.writing.writer import Patch, write_dataset


def _content(dataset: PatchDataset) -> list[Any]:
    return [json.dumps(dataset.info), dataset.schema.to_dict(), dataset.index]


def _read(folder: Path) -> Any:
    dataset = PatchDataset.open(folder)
    return [*_content(dataset), dataset.read(np.arange(len(dataset)))]


def _stream(folder: Path) -> Any:
    dataset = PatchDataset.open(folder)
    stream = PatchStream(dataset, epochs(np.arange(len(dataset)), 0), images=len(dataset), global_batch=6)
    return [(batch.rows, batch.images) for batch in stream]


def _webdataset(folder: Path) -> Any:
    return [[s["__key__"], s.get("png"), s.get("jpg"), s["json"]] for s in webdataset_of(PatchDataset.open(folder))]


def _export(folder: Path) -> Any:
    dataset = PatchDataset.open(folder)
    return list(samples(dataset, np.arange(len(dataset))))


def _verify(folder: Path) -> Any:
    """Its answer is the value: any problem counts as a refusal, and none leaves the dataset as it was."""
    dataset = PatchDataset.open(folder)
    if problems := dataset.verify(images=True):
        raise UserError("; ".join(problems))
    return _content(dataset)


READERS = {"read": _read, "stream": _stream, "webdataset": _webdataset, "export": _export, "verify": _verify}


@pytest.fixture(scope="module", params=["png", "jpg"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., list[Patch]]
) -> Path:
    """Two shards of patches that compress as smooth tissue does, so that a flip in a JPEG has its effect."""
    patches = make_patches(12, 32)
    for patch in patches:
        patch.image[:] = np.kron(patch.image[::8, ::8], np.ones((8, 8, 1), np.uint8))
    table = pd.DataFrame([dict(p.fields) for p in patches])
    schema = Schema.from_table(table, "class", ["site"], ["age"], {"age": "years"})
    where = tmp_path_factory.mktemp(request.param) / "d"
    made = write_dataset(where, patches, "d", schema, 32, 0.5, request.param, patches_per_shard=6)
    made.add_split("main", ["train"] * 8 + ["test"] * 4, {"kind": "by hand"})
    made.add_selection("best", {"": np.arange(12) < 3, "_score": np.linspace(0, 1, 12)}, {"n": 3}, {})
    return where


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["index.parquet", "dataset.json", "data/part-000001.tar"])
def test_a_flipped_bit_is_named_or_has_no_effect(folder: Path, name: str, reader: str) -> None:
    """What nobody reads and so may be flipped unseen, each by some of the readers only, never by ``verify``: in a shard
    padding and, for readers by offset, headers and JSON members. In the index and dataset.json there is nothing.
    """
    outcomes = flips(folder / name, lambda: READERS[reader](folder), 100)
    outcomes.check()
    if reader == "verify" or not name.startswith("data"):
        assert outcomes.harmless == 0
