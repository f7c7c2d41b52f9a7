"""Scores by biopsy, a page of them, and a picture of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.image_classifier.classify import classify
from latent_medi.image_classifier.compare import Kind
from latent_medi.image_classifier.settings import REAL, ClassifySettings
from latent_medi.sampling.grids import contact_sheet, save_sheet
from latent_medi.shards.dataset import PatchDataset

from .experiments import ADAPTATIONS, CHOICES, CORPORA, LABELLED, Benchmark, Size


def kinds(size: Size) -> Iterator[Kind]:
    """What image classifiers are trained on, real patches alone first."""
    yield Kind(REAL)
    for name in ["scratch", *(f"{a}_{corpus}" for corpus in CORPORA for a in ADAPTATIONS)]:
        for percent in size.percents:
            for choice in CHOICES:
                yield Kind(name, choice, float(percent))  # type: ignore[arg-type]


def scored(benchmark: Benchmark) -> list[dict[str, Any]]:
    """A row per draw, number of labelled biopsies and training set."""
    rows = []
    for job in benchmark.adaptations():
        draw, labelled = job.name.removeprefix("draw").split("_")
        for kind in kinds(benchmark.size):
            run = benchmark.out / "draws" / job.name / "image_classifiers" / kind.folder(0)
            row = {"draw": int(draw), "labelled": LABELLED[labelled], "training_set": kind.training_set}
            row |= {"choice": kind.choice, "percent": kind.percent}
            rows.append(row | _scores(benchmark, run, job.name, kind))
    return rows


def _scores(benchmark: Benchmark, run: Path, job: str, kind: Kind) -> dict[str, Any]:
    table, model = benchmark.out / "biopsies" / job / f"{kind.folder(0).replace('/', '-')}.csv", run / "model"
    if not table.is_file() or table.stat().st_mtime < (model / "classifier.json").stat().st_mtime:
        table.parent.mkdir(parents=True, exist_ok=True)
        classify(ClassifySettings(str(model), str(benchmark.data), str(table), split=job, by="patient"))
    biopsies = benchmark.manifest.drop_duplicates("patient").set_index("patient")
    found = pd.read_csv(table, dtype={"patient": str}).set_index("patient").join(biopsies[["class", "site"]])
    right = found["predicted"] == found["class"]
    patches = pd.read_csv(run / "test_predictions.csv", dtype=str, keep_default_na=False)
    share = (patches["predicted"] == patches["truth"]).groupby(patches["patient"]).mean()
    return {
        "biopsies": float(right.groupby(found["class"]).mean().mean()),
        "patches": float(share.groupby(found["class"]).mean().mean()),
        "by_cell": {
            " × ".join(cell): [int(rows.sum()), len(rows)]
            for cell, rows in right.groupby([found["class"], found["site"]])
        },
    }


def markdown(rows: Sequence[Mapping[str, Any]], benchmark: Benchmark) -> str:
    """The results as a page: a row per training set, the points of all draws in order, and their mean."""
    size, table = benchmark.size, pd.DataFrame(rows)
    tested = benchmark.parts.filter(like="_pool").eq("test").sum()
    lines = [
        f"{size.draws} draws, {tested.min()} test biopsies in each; {size.patches} patches of a biopsy at most. "
        f"Pre-training {size.pretraining:,} images, adaptation {size.adaptation:,} (without pre-training three times "
        f"as many), image classifier {size.classifier:,}. Mean over draws, then the points of the draws in order.",
    ]
    for score in ("biopsies", "patches"):
        lines += ["", f"Balanced accuracy, {score}:", "", "| training set | " + " | ".join(_heads()) + " |"]
        lines.append("| --- " * (1 + len(LABELLED)) + "|")
        for kind in kinds(size):
            own = table[
                (table["training_set"] == kind.training_set)
                & (table["choice"] == kind.choice)
                & (table["percent"] == kind.percent)
            ]
            cells = []
            for number in LABELLED.values():
                points = own[own["labelled"] == number].sort_values("draw")[score]
                cells.append(f"**{points.mean():.3f}** " + " ".join(f"{point:.2f}" for point in points))
            lines.append(f"| {_name(kind)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _heads() -> list[str]:
    return ["1 labelled biopsy" if n == 1 else f"{n} labelled biopsies" for n in LABELLED.values()]


def _name(kind: Kind) -> str:
    if kind.training_set == REAL:
        return "real patches alone"
    name, _, corpus = kind.training_set.partition("_")
    start = {"": "not pre-trained", "other": "other tissue", "both": "other tissue and biopsies"}[corpus]
    return f"+ {name} ({start}), {kind.percent:g} % {kind.choice}"


def draw_samples(benchmark: Benchmark) -> None:
    """samples.png: labelled patches of the first draw, and selected ones of each set, four of each class."""
    job = f"draw0_{list(LABELLED)[-1]}"
    real = PatchDataset.open(benchmark.data)
    classes, rows, labels = sorted(real.index["class"].astype(str).unique()), [], []
    sets = {"labelled": (real, real.index[f"split_{job}"] == "train")}
    for kind in kinds(replace(benchmark.size, percents=benchmark.size.percents[:1])):
        if kind.choice == "selected":
            made = PatchDataset.open(benchmark.out / "draws" / job / "synthetic" / kind.training_set)
            sets[kind.training_set] = (made, made.index["selected_best"].astype(bool))
    for name, (dataset, chosen) in sets.items():
        row: list[np.ndarray] = []
        for value in classes:
            found = np.flatnonzero(chosen & (dataset.index["class"].astype(str) == value))
            found = found[np.linspace(0, len(found) - 1, min(4, len(found))).astype(int)]
            blank = [np.full((64, 64, 3), 255, np.uint8)] * (4 - len(found))
            row += [*dataset.read(found), *blank]
        rows.append(row)
        labels.append(name)
    sheet = contact_sheet(rows, labels, [value for value in classes for _ in range(4)])
    save_sheet(sheet, benchmark.out / "samples.png")
