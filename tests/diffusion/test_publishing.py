"""A model is published on a hub of this machine and comes back as the same model; its card's example runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusion_parts import make_denoiser
from hub_server import HubServer, hub_server
from huggingface_hub import ModelCard
from parts import make_autoencoder

from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.metadata.schema import Schema


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(monkeypatch) as server:
        yield server


def pipeline_of(schema: Schema | None) -> MediPipeline:
    denoiser = make_denoiser(schema)
    return MediPipeline.from_parts(denoiser, ObjectiveSettings(), make_autoencoder(), torch.zeros(4), torch.ones(4))


def test_a_published_model_comes_back(hub: HubServer, schema: Schema, tmp_path: Path) -> None:
    pipe = pipeline_of(schema)
    url = pipe.push_to_hub("owner/medi", include_autoencoder=True)
    assert url.startswith(f"{hub.url}/owner/medi")
    files = hub.files["owner/medi"]
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert 'MediPipeline.from_pretrained("owner/medi")' in files["README.md"].decode()
    options = {"cache_dir": str(tmp_path / "cache")}
    loaded = MediPipeline.from_pretrained("owner/medi", revision="v1", **options)
    assert loaded.model_hash == pipe.model_hash
    assert hub.revisions >= {"v1"}
    hub.files.clear()
    with pytest.raises(UserError, match="cannot be downloaded"):
        MediPipeline.from_pretrained("owner/medi", force_download=True, **options)
    again = MediPipeline.from_pretrained("owner/medi", revision="v1", local_files_only=True, **options)
    assert again.model_hash == pipe.model_hash


def test_saving_can_publish(hub: HubServer, schema: Schema, tmp_path: Path) -> None:
    pipe = pipeline_of(schema)
    pipe.save_pretrained(tmp_path / "medi", push_to_hub=True, repo_id="owner/other", private=True)
    assert (tmp_path / "medi" / "model_index.json").read_bytes() == hub.files["owner/other"]["model_index.json"]


TABLES = {
    "plain": ({"grade": "benign", "site": "it's"}, ["site"], ["age"]),
    "odd": ({"tissue class": "benign", "tumour part": "edge"}, ["tumour part"], []),
    "argument": ({"class": "benign", "batch": "b1"}, ["batch"], []),
    "unconditional": ({}, [], []),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_example_of_a_card_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, fields, numbers = TABLES[name]
    table = pd.DataFrame([row | dict.fromkeys(numbers, age) for age in ("50", "60")])
    schema = Schema.from_table(table, next(iter(row)), fields, numbers) if row else None
    monkeypatch.chdir(tmp_path)
    pipeline_of(schema).save_pretrained("medi", include_autoencoder=True)
    card = ModelCard.load("medi/README.md")
    assert card.data.library_name == "latent-medi"
    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example[1], names)
    images = names["images"]
    assert isinstance(images, list)
    assert len(images) == 4
    assert np.asarray(images[0]).shape == (32, 32, 3)
