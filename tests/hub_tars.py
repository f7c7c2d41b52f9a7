"""Tars as the Hub has TCGA-UT: true barcodes and metadata of six cancer types, procedural pixels."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import nn

from latent_medi.features.registry import ENCODERS, Preprocessing
from latent_medi.metadata.tcga import read_site_codes

PROJECTS = {
    "Lung_adenocarcinoma": "TCGA-LUAD",
    "Lung_squamous_cell_carcinoma": "TCGA-LUSC",
    "Uterine_Corpus_Endometrial_Carcinoma": "TCGA-UCEC",
    "Uterine_Carcinosarcoma": "TCGA-UCS",
    "Kidney_renal_clear_cell_carcinoma": "TCGA-KIRC",
    "Kidney_renal_papillary_cell_carcinoma": "TCGA-KIRP",
}
"""Label of the Hub's JSON by project; two of each of the paper's tasks."""
UNLISTED = "TCGA-05-ZZZZ-01Z-00-DX1"
"""A slide of a true site that no table lists."""
SITES = {"train": 3, "test": 4}
"""Site codes of each class that have slides in the tars, at most; UCS has four for testing, with seven patients."""
PATIENTS = {"train": 4, "test": 5}
"""Patients of each of these codes, at most."""
HOSPITALS = (
    "Memorial Sloan Kettering Cancer Center",
    "University of North Carolina",
    "University of Pittsburgh",
    "Christiana Healthcare",
)
"""Each has lung adenocarcinoma or one of the kidney's, most of them all three."""


def published_parts(tables: Path) -> dict[str, str]:
    """Part of the published split by slide.

    Args:
        tables: Folder with train_ and holdout_metadata_df_complex.csv.
    """
    files = {"train": "train_metadata_df_complex.csv", "test": "holdout_metadata_df_complex.csv"}
    return {slide: part for part, file in files.items() for slide in _read(tables / file)["slide_submitter_id"]}


def chosen_slides(tables: Path) -> pd.DataFrame:
    """The slides of the tars: the codes with most patients, a slide of each patient.

    Args:
        tables: Folder with all_slide_metadata.csv and the two files of :func:`published_parts`.

    Returns:
        A row per slide with ``slide``, ``label``, ``tss`` and ``part``; that of :data:`UNLISTED` is "".
    """
    table = _read(tables / "all_slide_metadata.csv").drop_duplicates("case_submitter_id")
    labels = {project: label for label, project in PROJECTS.items()}
    table = table.assign(
        slide=table["slide_submitter_id"],
        label=table["project_id"].map(labels),
        tss=table["slide_submitter_id"].str[5:7],
        part=table["slide_submitter_id"].map(published_parts(tables)),
    ).dropna(subset=["label"])
    kept = []
    for (_, part), rows in table.groupby(["label", "part"]):
        sites = rows["tss"].value_counts(sort=True).sort_index().sort_values(ascending=False, kind="stable").index
        some = rows[rows["tss"].isin(sites[: SITES[part]])]
        kept.append(some.groupby("tss").head(PATIENTS[part]))
    kept.append(pd.DataFrame([{"slide": UNLISTED, "label": "Lung_adenocarcinoma", "tss": "05", "part": ""}]))
    return pd.concat(kept)[["slide", "label", "tss", "part"]].reset_index(drop=True)


def slides_of_hospitals(tables: Path, patients: int = 17) -> pd.DataFrame:
    """A slide each of at most ``patients`` patients of three cancer types at each of the :data:`HOSPITALS`.

    Args:
        tables: Folder with all_slide_metadata.csv and tissueSourceSite.tsv.
        patients: At least 17 for a combination that a split can hold out: it keeps three fifths of them for testing,
            and an evaluation needs ten.

    Returns:
        As :func:`chosen_slides`, with ``site``; ``part`` is "".
    """
    table = _read(tables / "all_slide_metadata.csv").drop_duplicates("case_submitter_id")
    labels = {PROJECTS[label]: label for label in PROJECTS if label.startswith(("Kidney", "Lung_adeno"))}
    tss = table["slide_submitter_id"].str[5:7]
    site = tss.map(read_site_codes(tables / "tissueSourceSite.tsv")["institution"])
    label = table["project_id"].map(labels)
    table = table.assign(slide=table["slide_submitter_id"], label=label, tss=tss, site=site, part="")
    some = table[table["site"].isin(HOSPITALS)].groupby(["label", "site"]).head(patients)
    return some[["slide", "label", "tss", "part", "site"]].reset_index(drop=True)


def write_hub_tars(
    folder: Path, tables: Path, seed: int = 0, patches: int = 2, slides: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Write ``folder/data/dataset_internal_{train,valid,test}_part000.tar``.

    Args:
        folder: The source folder of the recipe.
        tables: As for :func:`chosen_slides`.
        seed: Of the order of the samples in the tars, and of their division into the Hub's own three parts; a patch is
            the same whatever the seed.
        patches: Patches per slide; of a class that has fewer than ten slides for testing, five of each of these, since
            a distance needs 20 patches.
        slides: Those of the tars; by default :func:`chosen_slides`.

    Returns:
        The slides.
    """
    slides = chosen_slides(tables) if slides is None else slides
    rng = np.random.default_rng(seed)
    slides_of = slides.groupby(["label", "part"])["slide"].transform("size")
    counts = [
        5 if part == "test" and size < 10 else patches for part, size in zip(slides["part"], slides_of, strict=True)
    ]
    order = rng.permutation([f"{i}/{n}" for i, count in enumerate(counts) for n in range(count)])
    samples: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    hubs_parts = rng.choice(list(samples), len(slides), p=(0.7, 0.15, 0.15))
    for entry in order:
        i, n = map(int, entry.split("/"))
        slide = slides.iloc[i]
        samples[str(hubs_parts[i])].append((f"{slide['slide']}/{n}_{n + 8}_{512 + n}", slide["label"]))
    (folder / "data").mkdir(parents=True)
    for part, members in samples.items():
        with tarfile.open(folder / "data" / f"dataset_internal_{part}_part000.tar", "w") as tar:
            for key, label in members:
                for ending, data in (("jpg", _picture(key, label)), ("json", json.dumps({"label": label}).encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return slides


def _picture(key: str, label: str) -> bytes:
    """A JPEG of 256 px whose stripes show the class, whose colour the site code, with blobs and noise of its own."""
    of_class, of_site, own = (_seed(text) for text in (label, key[5:7], key))
    rows, columns = np.mgrid[:256, :256]
    angle, length = np.pi * (of_class % 97) / 97, 12 + of_class % 31
    stripes = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / length + own % 7)
    base = np.array([190, 120, 170]) + np.random.default_rng(of_site).integers(-30, 30, 3)
    drawn = np.random.default_rng(own)
    # Without them patches would pass for the same picture.
    blobs = np.kron(drawn.normal(0, 35, (8, 8, 1)), np.ones((32, 32, 1)))
    noise = drawn.normal(0, 8, (256, 256, 3)) + blobs
    file = io.BytesIO()
    Image.fromarray(np.clip(base + 25 * stripes[..., None] + noise, 0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _seed(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def one_block_uni() -> tuple[nn.Module, Preprocessing]:
    """UNI's architecture, width and preprocessing with one block in place of 24, random weights: an encoder
    ``hub_tars:one_block_uni`` that needs 0.06 s per patch in place of 2."""
    entry = ENCODERS["uni"]
    torch.manual_seed(0)
    module = timm.create_model(entry.architecture, **{**entry.arguments, "depth": 1})
    module.dim = entry.dim  # what the contract of a user's encoder asks for
    assert entry.preprocessing is not None
    return module, entry.preprocessing
