"""A cohort as MeDi's paper divides TCGA: training and test patients alone, at other sites, none of two classes.

Each class has sites of its own, two in training and two in test; what differs between sites is a little colour. Real
patches and samples come from one renderer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.writing.writer import Patch, write_dataset

CLASSES = ("LUAD", "LUSC", "UCEC", "UCS", "KIRC", "KIRP")
TRAIN_SITES, TEST_SITES, PATIENTS, PATCHES = 2, 2, 12, 2
SITES = tuple(f"{c}{i}" for c in CLASSES for i in range(TRAIN_SITES + TEST_SITES))
SIZE = 32
SCHEMA = Schema((Field("class", "class", CLASSES), Field("tss", "categorical", SITES)))
CLASS_SCHEMA = Schema((Field("class", "class", CLASSES),))


def train_sites(tumour: str) -> list[str]:
    """Sites of a class whose patients are trained on."""
    return [f"{tumour}{i}" for i in range(TRAIN_SITES)]


def _next(tumour: str) -> str:
    return CLASSES[(CLASSES.index(tumour) + 1) % len(CLASSES)]


def render(tumour: str, site: str, rng: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    """One patch, uint8 [32, 32, 3]: stripes as wide as the class asks for; ``shift`` makes them darker."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle, frequency = rng.uniform(0, np.pi), 2 + 0.6 * CLASSES.index(tumour) + rng.normal(0, 0.2)
    wave = np.sin(2 * np.pi * (frequency * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    density = 0.35 + shift + 0.25 * wave + rng.normal(0, 0.04, (SIZE, SIZE))
    colour = np.array([0.6, 0.7, 0.4]) + 0.03 * (int(site[-1]) - 2) * np.array([1, -1, 1])
    return np.rint(255 * 10.0 ** -(np.clip(density, 0, 2)[..., None] * colour)).astype(np.uint8)


def real_patches() -> Iterator[Patch]:
    """Training and test patients of every site."""
    rng = np.random.default_rng(0)
    for tumour in CLASSES:
        for number in range(TRAIN_SITES + TEST_SITES):
            split, site = "train" if number < TRAIN_SITES else "test", f"{tumour}{number}"
            for person in range(PATIENTS):
                name = f"{split}-{site}-{person}"
                for i in range(PATCHES):
                    yield Patch(
                        f"{name}/{i}",
                        render(tumour, site, rng),
                        name,
                        name,
                        i,
                        0,
                        0.5,
                        {"class": tumour, "tss": site},
                    )


def samples(knows_site: bool, union: bool = False, shift: float = 0.0, seed: int = 1) -> Iterator[Patch]:
    """As many samples as real training patches of every class and site; ``union`` adds sites of the next class."""
    rng, row = np.random.default_rng(seed), 0
    for tumour in CLASSES:
        for site in (s for c in ([tumour, _next(tumour)] if union else [tumour]) for s in train_sites(c)):
            for i in range(PATIENTS * PATCHES):
                fields = {"class": tumour} | ({"tss": site} if knows_site else {})
                name = f"synthetic:abc:{row}"
                image = render(tumour, site, rng, shift + (0.4 if site[:-1] != tumour else 0.0))
                yield Patch(f"s{row}/{i}", image, name, name, 0, 0, 0.5, fields, origin="synthetic")
            row += 1


def build(root: Path) -> EvaluateSettings:
    """Real patients, MeDi's samples (perfect) and CLS's (darker), and settings that compare them."""
    patches = list(real_patches())
    split = {p.patient: p.patient.split("-")[0] for p in patches}
    write_dataset(root / "real", patches, "r", SCHEMA, SIZE, 0.5, splits={"medi": (split, {"kind": "planted"})})
    write_dataset(root / "medi", list(samples(True, union=True)), "medi", SCHEMA, SIZE, 0.5)
    write_dataset(root / "cls", list(samples(False, shift=0.1)), "cls", CLASS_SCHEMA, SIZE, 0.5)
    return EvaluateSettings(
        real=str(root / "real"),
        synthetic={"medi": str(root / "medi"), "cls": str(root / "cls")},
        out=str(root / "out"),
        split="medi",
        site_field="tss",
        downstream=False,
        memorisation=False,
        real_splits=0,
        colour_free=False,
    )
