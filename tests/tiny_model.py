"""A tiny untrained model with a class, a site and an age, and the autoencoder that belongs to it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import pytest
import torch
from parts import make_autoencoder, small_model

from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import DropoutSettings, ObjectiveSettings
from latent_medi.latents.autoencoder import load_autoencoder, save_autoencoder
from latent_medi.metadata.schema import Schema

SEEN = {
    "complete": True,
    "parts": [
        {"fields": ["class", "site"], "rows": [["benign", "NA", 2], ["benign", "aster", 6], ["benign", "birch", 4],
                                               ["tumour", "NA", 3], ["tumour", "aster", 3]]}
    ],
}  # fmt: skip
"""What the models say that they were shown: the table below."""


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """What the model was trained on: two classes at three sites, tumour never at birch; every third age unknown."""
    cells = [("benign", "aster")] * 6 + [("benign", "birch")] * 4 + [("tumour", "aster")] * 3 + [("tumour", "NA")] * 3
    cells += [("benign", "NA")] * 2
    return pd.DataFrame(
        [
            {
                "key": f"p{i}",
                "patient": f"patient{i}",
                "slide": f"slide{i}",
                "class": c,
                "site": s,
                "age": "unknown" if i % 3 == 0 else str(40 + i),
            }
            for i, (c, s) in enumerate(cells)
        ]
    )


@pytest.fixture(scope="session")
def index(table: pd.DataFrame) -> pd.DataFrame:
    """The same as a dataset's index has it: a continuous field is a number, NaN where unknown."""
    return table.assign(age=pd.to_numeric(table["age"].where(table["age"] != "unknown")))


@pytest.fixture(scope="session")
def schema(table: pd.DataFrame) -> Schema:
    """Its schema."""
    return Schema.from_table(table, "class", ["site"], ["age"], {"age": "years"})


def make_model(folder: Path, schema: Schema) -> Path:
    """Write a model with random weights and its autoencoder."""
    torch.manual_seed(0)
    save_autoencoder(make_autoencoder(), folder / "autoencoder")
    model = small_model()
    conditioner = None
    if schema.fields:
        patterns = asdict(DropoutSettings())
        conditioner = MetadataConditioner(schema.to_dict(), model.embed_dim, dropout_patterns=patterns)
    denoiser = Denoiser(build_unet(model, 4, 8, conditional=bool(schema.fields)), conditioner)
    autoencoder = load_autoencoder(str(folder / "autoencoder"))
    facts = {"name": "tiny", "mpp": 0.5, "patch_size": 32, "seen": SEEN}
    pipeline = MediPipeline.from_parts(denoiser, ObjectiveSettings(), autoencoder, torch.zeros(4), torch.ones(4), facts)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, schema: Schema) -> Path:
    """Folder of a model that knows class, site and age."""
    return make_model(tmp_path_factory.mktemp("model"), schema)


@pytest.fixture(scope="session")
def class_model(tmp_path_factory: pytest.TempPathFactory, schema: Schema) -> Path:
    """Folder of a model that knows the class only."""
    return make_model(tmp_path_factory.mktemp("class_model"), schema.subset(["class"]))


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that knows no field."""
    return make_model(tmp_path_factory.mktemp("unconditional"), Schema())
