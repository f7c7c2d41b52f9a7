"""The demo's cohort: three classes at four hospitals, skewed as real data are, with combinations held out.

Shape depends on class, patient and patch, stain on hospital and slide, and neither on the other. A generator that has
separated class from hospital can therefore draw every combination, and :func:`latent_medi.demo.tissue.render` gives the
truth for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import cpu_count

from latent_medi.core.files import sha256_bytes
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.demo.settings import CohortFolderSettings, CohortSettings
from latent_medi.demo.tissue import MPP, PATCH_SIZE, Shape, Stain, jitter_stain, render
from latent_medi.features.registry import DEMO_GENERATOR
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.workers import dispatch
from latent_medi.shards.listing import Listing, in_shards
from latent_medi.shards.writing.finish import Description, finish_dataset, finished_dataset
from latent_medi.shards.writing.records import kept_shards
from latent_medi.shards.writing.rewrite import prepare_rewrite
from latent_medi.shards.writing.writer import Patch, write_shard

CLASSES = ("glandular", "solid", "spindle")
SITES = {
    "aster": Stain(),
    "birch": Stain(
        haematoxylin=(0.74, 0.62, 0.26),
        eosin=(0.14, 0.95, 0.28),
        haematoxylin_strength=1.25,
        eosin_strength=0.45,
        background=(0.94, 0.95, 0.97),
    ),
    "cedar": Stain(
        haematoxylin=(0.58, 0.74, 0.31),
        eosin=(0.06, 0.93, 0.30),
        haematoxylin_strength=0.95,
        eosin_strength=0.75,
        background=(0.97, 0.95, 0.91),
    ),
    # A thicker section in poor focus: the structural difference that no change of colour imitates.
    "dogwood": Stain(
        haematoxylin=(0.67, 0.67, 0.32),
        eosin=(0.10, 0.96, 0.20),
        haematoxylin_strength=0.85,
        eosin_strength=0.45,
        background=(0.91, 0.90, 0.92),
        blur=1.25,
    ),
}
FIXATIONS = ("formalin", "frozen")
HELD_OUT = (
    {"class": "solid", "site": "cedar"},
    {"class": "glandular", "site": "dogwood"},
    {"site": "dogwood", "fixation": "frozen"},
)
"""Combinations without a training patch."""

_TRAIN_PATIENTS = {  # skewed: some hospitals are specialised, as referral centres are
    "aster": {"glandular": 108, "solid": 26, "spindle": 22},
    "birch": {"glandular": 26, "solid": 114, "spindle": 22},
    "cedar": {"glandular": 60, "solid": 0, "spindle": 60},
    "dogwood": {"glandular": 0, "solid": 48, "spindle": 120},
}
_FROZEN_SHARE = {"aster": 0.25, "birch": 0.35, "cedar": 0.45, "dogwood": 0.0}
_UNKNOWN_AGE = 0.15


@dataclass(frozen=True)
class Patient:
    """One patient with one slide; ``shape`` and ``stain`` are the slide's, patches vary around them."""

    name: str
    tumour: str
    site: str
    fixation: str
    age: float | None
    split: str
    shape: Shape
    stain: Stain


_TYPICAL = {
    "glandular": Shape(
        nucleus_radius=4.8, nucleus_aspect=1.4, alignment=0.2, density=13.5, gland_radius=7.0, fibre=0.42
    ),
    "solid": Shape(nucleus_radius=5.0, nucleus_aspect=1.4, alignment=0.2, density=16.6, gland_radius=0.8, fibre=0.35),
    "spindle": Shape(nucleus_radius=4.6, nucleus_aspect=1.72, alignment=0.4, density=12.2, gland_radius=0.9, fibre=0.6),
}
"""The middle of each class; patients lie around it, and the classes overlap."""


def _clipped(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, sd), low, high))


def class_shape(tumour: str, age: float, frozen: bool, rng: np.random.Generator) -> Shape:
    """Shape parameters of one patient's tumour; the classes overlap, as grades do.

    Args:
        tumour: One of :data:`CLASSES`.
        age: Years; stroma grows more fibrous with age.
        frozen: Whether the section was cut frozen, which leaves ice-crystal holes and swollen nuclei.
        rng: Source of the patient effect.
    """
    typical = _TYPICAL[tumour]
    fibre = float(np.clip(typical.fibre + 0.006 * (age - 60) + rng.normal(0, 0.1), 0.1, 0.9))
    shape = Shape(
        nucleus_radius=_clipped(rng, typical.nucleus_radius, 0.3, 3.8, 5.9),
        nucleus_aspect=_clipped(rng, typical.nucleus_aspect, 0.2, 1.1, 2.8),
        alignment=_clipped(rng, typical.alignment, 0.12, 0, 1),
        density=_clipped(rng, typical.density, 1.9, 8, 21),
        pleomorphism=_clipped(rng, 0.14, 0.04, 0.05, 0.3),
        gland_radius=_clipped(rng, typical.gland_radius, 2.3, 0.0, 14.0),
        fibre=fibre,
    )
    if frozen:
        shape = replace(shape, vacuoles=_clipped(rng, 6, 1.5, 2, 10), nucleus_radius=1.08 * shape.nucleus_radius)
    return shape


def patch_shape(shape: Shape, rng: np.random.Generator) -> Shape:
    """One patch's shape parameters around its slide's."""
    gland = shape.gland_radius + rng.normal(0, 0.9)
    return replace(
        shape,
        orientation=float(rng.normal(0, 0.2)),  # blocks are embedded along the fibres
        nucleus_aspect=max(1.0, shape.nucleus_aspect + float(rng.normal(0, 0.12))),
        alignment=float(np.clip(shape.alignment + rng.normal(0, 0.08), 0, 1)),
        gland_radius=float(gland) if gland >= 2.0 else 0.0,
        density=shape.density * float(np.exp(rng.normal(0, 0.08))),
    )


def is_held_out(values: dict[str, str]) -> bool:
    """Whether a patient with these field values belongs to a held-out combination."""
    return any(all(values[k] == v for k, v in combination.items()) for combination in HELD_OUT)


def patients(settings: CohortSettings) -> list[Patient]:
    """The patients of all three splits: ``train`` (no held-out combination), ``probe`` and ``test`` (all of them)."""
    cohort: list[Patient] = []
    for split in ("train", "probe", "test"):
        for site, stain in SITES.items():
            for tumour in CLASSES:
                unseen_cell = is_held_out({"class": tumour, "site": site, "fixation": ""})
                count = {
                    "train": settings.train_patients or _TRAIN_PATIENTS[site][tumour],
                    # Held-out cells have no training patients: linear probes and the oracle need more of them here.
                    "probe": settings.probe_patients * (2 if unseen_cell else 1),
                    "test": settings.test_patients,
                }[split]
                for number in range(max(1, round(count * settings.scale)) if count else 0):
                    name = f"{split}-{site}-{tumour}-{number:03d}"
                    digest = hashlib.sha256(f"{settings.seed}/{name}".encode()).digest()
                    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
                    share = _FROZEN_SHARE[site] if split == "train" and not settings.train_patients else 0.4
                    frozen = bool(rng.random() < share)
                    age = _clipped(rng, 62, 11, 25, 90)
                    shape = class_shape(tumour, age, frozen, rng)
                    cohort.append(
                        Patient(
                            name,
                            tumour,
                            site,
                            FIXATIONS[frozen],
                            None if rng.random() < _UNKNOWN_AGE else round(age, 1),
                            split,
                            shape,
                            jitter_stain(stain, rng),
                        )
                    )
    return cohort


def patches(patient: Patient, settings: CohortSettings) -> Iterator[Patch]:
    """One patient's patches, which depend on the seed and the patient's name alone."""
    digest = hashlib.sha256(f"{settings.seed}/{patient.name}/patches".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    for number in range(settings.patches_per_patient):
        yield Patch(
            key=f"{patient.name}/{number:02d}",
            image=render(patch_shape(patient.shape, rng), patient.stain, rng),
            patient=patient.name,
            slide=f"{patient.name}-a",
            x=64 * number,
            y=0,
            source_mpp=MPP,
            fields={
                "class": patient.tumour,
                "site": patient.site,
                "fixation": patient.fixation,
                "age": "unknown" if patient.age is None else patient.age,
            },
        )


def _values(cohort: list[Patient]) -> pd.DataFrame:
    """The fields of each patient as text."""
    rows = [
        {"class": p.tumour, "site": p.site, "fixation": p.fixation, "age": "unknown" if p.age is None else str(p.age)}
        for p in cohort
    ]
    return pd.DataFrame(rows)


def schema(cohort: list[Patient]) -> Schema:
    """The demo's schema; the scaling of age comes from the training patients."""
    table = _values(cohort)[[p.split == "train" for p in cohort]]
    return Schema.from_table(
        table, class_field="class", categorical=["site", "fixation"], continuous=["age"], units={"age": "years"}
    )


_PATIENTS_PER_SHARD = 64


def _write_part(folder: Path, number: int, part: list[Patient], settings: CohortSettings, token: str) -> None:
    write_shard(folder, number, [patch for patient in part for patch in patches(patient, settings)], token=token)


def build(folder: Path, settings: CohortSettings, jobs: int = 2) -> PatchDataset:
    """Render the cohort into a dataset folder with the split ``main`` (train, probe, test).

    A rerun keeps existing shards of the same settings.

    Args:
        folder: Where to write; what it holds of another cohort is replaced.
        settings: The cohort.
        jobs: Processes that render.
    """
    folder = folder.resolve()  # a worker process of an earlier call may have another working folder
    with output_lock(folder):
        return _build(folder, settings, jobs)


def _build(folder: Path, settings: CohortSettings, jobs: int) -> PatchDataset:
    cohort = patients(settings)
    parts = [cohort[i : i + _PATIENTS_PER_SHARD] for i in range(0, len(cohort), _PATIENTS_PER_SHARD)]
    provenance = {"generator": DEMO_GENERATOR, "settings": asdict(settings)}
    split = {p.name: p.split for p in cohort}
    recipe = {"kind": "by patient", "held_out_of_train": [] if settings.train_patients else list(HELD_OUT)}
    splits = {"main": (split, recipe)}
    about = Description("procedural tissue", schema(cohort), PATCH_SIZE, MPP, "png", provenance, splits)
    # A shard of a cohort of other settings is not one of this one.
    token = sha256_bytes(json.dumps(provenance, sort_keys=True).encode())
    tokens = [token] * len(parts)
    if whole := finished_dataset(folder, about, tokens, same_provenance=True):
        return whole
    prepare_rewrite(folder, splits)
    kept = kept_shards(folder, tokens)
    work = [(folder, number, part, settings, token) for number, part in enumerate(parts) if number not in kept]
    sizes = [len(part) * settings.patches_per_patient for _, _, part, *_ in work]
    for _ in progress(dispatch(_write_part, work, jobs), desc="rendering", unit="patches", each=sizes):
        pass
    return finish_dataset(folder, about, range(len(parts)))


def listing(settings: CohortSettings) -> Listing:
    """The patches that :func:`build` will render."""
    cohort, each = patients(settings), settings.patches_per_patient
    table = _values(cohort).assign(patient=[p.name for p in cohort], split_main=[p.split for p in cohort])
    table["age"] = pd.to_numeric(table["age"].where(table["age"] != "unknown"))
    index = table.loc[table.index.repeat(each)].reset_index(drop=True)
    index["key"] = [f"{name}/{number % each:02d}" for number, name in enumerate(index["patient"])]
    index["slide"] = index["patient"] + "-a"
    counts = [each * count for count in in_shards(len(cohort), _PATIENTS_PER_SHARD)]
    return Listing(index, schema(cohort), counts)


def build_folder(settings: CohortFolderSettings) -> PatchDataset:
    """The cohort that the settings describe, in the folder that they name."""
    cohort = CohortSettings(**{part.name: getattr(settings, part.name) for part in fields(CohortSettings)})
    return build(Path(settings.out), cohort, jobs=settings.processes or cpu_count())
