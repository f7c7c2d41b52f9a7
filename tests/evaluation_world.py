"""A small planted cohort: stripes of three widths (class) in three stains (site), one of which is also blurred.

``stripes × south`` and ``south × frozen`` are held out. Real and perfect synthetic patches come from one renderer, so
what an evaluation must find is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.results import metrics_json
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.encoders import ImageEncoder
from latent_medi.features.networks import Network, Preprocessing
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

CLASSES = ("blobs", "rings", "stripes")
SITES = ("east", "north", "south")
PREPARATIONS = ("formalin", "frozen")
HELD_OUT = [{"class": "stripes", "site": "south"}, {"site": "south", "preparation": "frozen"}]
SIZE = 32
FREQUENCY = {"blobs": 2.0, "rings": 3.0, "stripes": 4.2}
COLOUR = {"east": (0.55, 0.8, 0.3), "north": (0.75, 0.6, 0.25), "south": (0.6, 0.6, 0.5)}
SCHEMA = Schema(
    (
        Field("class", "class", CLASSES),
        Field("site", "categorical", SITES),
        Field("preparation", "categorical", PREPARATIONS),
        Field("age", "continuous", mean=60.0, std=10.0),
    )
)
CLASS_SCHEMA = Schema((Field("class", "class", CLASSES),))


def render(tumour: str, site: str, preparation: str, rng: np.random.Generator) -> np.ndarray:
    """One patch, uint8 [32, 32, 3]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle = rng.uniform(0, np.pi)
    frequency = FREQUENCY[tumour] + rng.normal(0, 0.25)
    if site == "south":
        frequency *= 0.8  # an optic of another scale: no change of colour imitates it
    wave = np.sin(2 * np.pi * (frequency * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    density = 0.35 + 0.25 * wave + rng.normal(0, 0.04, (SIZE, SIZE))
    if preparation == "frozen":
        density[rng.random((SIZE, SIZE)) < 0.08] = 0.0
    colour = np.array(COLOUR[site]) * rng.normal(1, 0.05)
    return np.rint(255 * 10.0 ** -(np.clip(density, 0, 2)[..., None] * colour)).astype(np.uint8)


def _held_out(values: dict[str, str]) -> bool:
    return any(all(values[k] == v for k, v in c.items()) for c in HELD_OUT)


@dataclass(frozen=True)
class Size:
    """Patients per class × site cell in each split, and patches per patient."""

    train: int = 14
    probe: int = 14
    test: int = 12
    patches: int = 4


def real_patches(size: Size, seed: int = 0) -> Iterator[Patch]:
    """Every split's patients; training has no held-out combination."""
    rng = np.random.default_rng(seed)
    for split in ("train", "probe", "test"):
        for tumour in CLASSES:
            for site in SITES:
                for number in range(getattr(size, split)):
                    values = {"class": tumour, "site": site, "preparation": PREPARATIONS[number % 3 == 0]}
                    if split == "train" and site == "south":
                        values["preparation"] = "formalin"
                    if split == "train" and _held_out(values):
                        continue
                    name = f"{split}-{tumour}-{site}-{number}"
                    for i in range(size.patches):
                        image = render(tumour, site, values["preparation"], rng)
                        yield Patch(f"{name}/{i}", image, name, name, i, 0, 0.5, values | {"age": 60})


def synthetic_patches(count: int, site_of: dict[str, str] | None, class_only: bool, seed: int = 1) -> Iterator[Patch]:
    """``count`` patches of every combination; ``site_of`` draws some sites as others (None: as asked)."""
    rng = np.random.default_rng(seed)
    row = 0
    for tumour in CLASSES:
        for site in SITES:
            for preparation in PREPARATIONS:
                for i in range(count):
                    drawn_site = (site_of or {}).get(site, site)
                    drawn_preparation = preparation
                    if class_only:  # what a model that knows the class alone draws: the training patches' mix
                        drawn_site = rng.choice(["east", "north"] if tumour == "stripes" else SITES)
                        drawn_preparation = "formalin" if drawn_site == "south" else PREPARATIONS[rng.random() < 0.33]
                    fields: dict[str, str | float] = {"class": tumour}
                    if not class_only:
                        fields |= {"site": site, "preparation": preparation, "age": "unknown"}
                    image = render(tumour, drawn_site, drawn_preparation, rng)
                    name = f"synthetic:abc:{row}"
                    yield Patch(f"s{row}/{i}", image, name, name, 0, 0, 0.5, fields, origin="synthetic")
                row += 1


@dataclass
class World:
    """Folders of the cohort and a ready settings object."""

    root: Path
    real: Path
    medi: Path
    cls: Path

    def settings(self, name: str, **changes: object) -> EvaluateSettings:
        """Settings that write into a folder of their own; features are cached for all."""
        base: dict[str, object] = {
            "real": str(self.real),
            "synthetic": {"medi": str(self.medi), "cls": str(self.cls)},
            "out": str(self.root / name),
            "held_out": HELD_OUT,
            "repeats": 2,
            "real_splits": 0,
            "memorisation": False,
            "cache": str(self.root / "features"),
            "colour_free": False,
        }
        return EvaluateSettings(**(base | changes))  # type: ignore[arg-type]


def write_real(
    folder: Path, size: Size, seed: int = 0, merge_probe: bool = False, classes: Sequence[str] = CLASSES
) -> PatchDataset:
    """The real dataset with its split "main"; ``merge_probe`` leaves the probe patients out."""
    patches = [
        p
        for p in real_patches(size, seed)
        if p.fields["class"] in classes and not (merge_probe and p.patient.startswith("probe"))
    ]
    split = {p.patient: p.patient.split("-")[0] for p in patches}
    return write_dataset(folder, patches, "planted", SCHEMA, SIZE, 0.5, splits={"main": (split, {"kind": "planted"})})


def build_world(root: Path, size: Size | None = None, count: int = 40) -> World:
    """Write real, medi (perfect) and cls datasets."""
    world = World(root, root / "real", root / "medi", root / "cls")
    write_real(world.real, size or Size())
    perfect = list(synthetic_patches(count, None, False))
    write_dataset(world.medi, perfect, "medi", SCHEMA, SIZE, 0.5, provenance={"model": "perfect"})
    write_dataset(world.cls, list(synthetic_patches(count, None, True)), "cls", CLASS_SCHEMA, SIZE, 0.5)
    return world


class Filters(torch.nn.Module):
    """Fixed random filters, mean and spread of their responses: features that know colour and width."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("kernels", torch.randn(dim // 2 - 3, 3, 7, 7, generator=generator) * 0.1)
        self.kernels -= self.kernels.mean(dim=(2, 3), keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, dim]."""
        y = torch.nn.functional.conv2d(x, self.kernels).abs().flatten(2)
        z = x.flatten(2)
        return torch.cat([y.mean(2), y.std(2), z.mean(2), z.std(2)], 1)


def evaluated(settings: EvaluateSettings, encoders: list[ImageEncoder] | None) -> dict[str, Any]:
    """What an evaluation writes."""
    return metrics_json(evaluate(settings, encoders))


def filters(dim: int = 16) -> ImageEncoder:
    """The test encoder."""
    return ImageEncoder(Network("filters", Filters(dim), dim, Preprocessing(0, (0.5,) * 3, (0.25,) * 3), "none"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))
