"""The draws of labelled and test biopsies, and the experiments on them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.cli import main as latent_medi
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path
from latent_medi.shards.dataset import PatchDataset

LABELLED = {"one": 1, "two": 2}
CORPORA = ("other", "both")
ADAPTATIONS = ("guided", "finetuned", "lora")
OTHER_TISSUE = ("consep", "oral", "tiles")
CHOICES = ("random", "selected")
ADAPTING = ["shards", "encode", "train", "classifier", "plan", "sample", "real_classifier", "select"]
ADAPTING += ["image_classifier"]
PATCHES = 32
"""Patches of a biopsy, evenly over its manifest's rows: benign biopsies have about as many, others up to four times."""
TEST_SHARE = 0.3
NETWORK = {"block_out_channels": [96, 128], "attention": [False, True], "attention_head_dim": 32}
NETWORK |= {"layers_per_block": 1, "norm_num_groups": 16}
SELECT: dict[str, Any] = {"encoder": "image_classifier", "fields": ["class"], "cells": ["class"], "share": 1.0}
SELECT |= {"filters": ["centroid"], "rank": "centroid", "adjust": False, "farthest": 0}
GUIDE = {"block_out_channels": [64, 96], "attention": [False, True], "attention_head_dim": 32, "layers_per_block": 1}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Args:
        draws: Choices of biopsies.
        pretraining, adaptation, guide, classifier: Images of a pre-training, of an adaptation (three times as many
            without pre-training), of a guiding classifier and of an image classifier.
        steps: Of the sampler.
        percents: Synthetic patches per 100 labelled ones of the same class.
        patches: Patches of a biopsy.
        others: Images of each folder of other tissue; 0 for all.
    """

    draws: int = 5
    pretraining: int = 32_000
    adaptation: int = 4_800
    guide: int = 4_800
    classifier: int = 2_560
    steps: int = 20
    percents: tuple[int, ...] = (100,)
    patches: int = PATCHES
    others: int = 0


QUICK = Size(1, 64, 64, 64, 64, 2, (100,), 4, 8)
CORE_SECONDS = {"pretraining": 0.005, "adaptation": 0.005, "guide": 0.003, "sampled": 0.05, "classifier": 0.004}
"""Processor seconds per image, measured on the machine of docs/results.md."""
START_SECONDS = 5.0
"""Processor seconds until a command has imported what it needs."""


@dataclass(frozen=True)
class Job:
    """One experiment.

    Args:
        name: Its name.
        settings: Its settings.
        images: Images by kind, as in :data:`CORE_SECONDS`.
        commands: Commands that it starts.
    """

    name: str
    settings: Mapping[str, Any]
    images: Mapping[str, int]
    commands: int

    @property
    def seconds(self) -> float:
        """Processor seconds that it is expected to take."""
        return START_SECONDS * (1 + self.commands) + sum(CORE_SECONDS[kind] * n for kind, n in self.images.items())


class Benchmark:
    """The folders, the draws and the experiments.

    Args:
        shared: Folder of the inputs.
        out: Folder of everything that is made.
        size: How much is done.
    """

    def __init__(self, shared: Path, out: Path, size: Size) -> None:
        self.shared, self.out, self.size = shared, out, size
        self.data, self.latents = out / "data" / "prostate", out / "latents" / "prostate"
        self.taef2 = str(shared / "models" / "taef2")
        manifest = pd.read_csv(shared / "data" / "prostate" / "manifest.csv", dtype=str, keep_default_na=False)
        rank = manifest.groupby("patient").cumcount()
        count = manifest.groupby("patient")["image"].transform("size")
        # As many patches as fit, evenly over the rows of a biopsy.
        chosen = rank * size.patches // count != (rank - 1) * size.patches // count
        self.manifest = manifest[chosen | (rank == 0)]
        self.parts = draws_of(self.manifest, size.draws)

    def prepare(self) -> None:
        """Dataset folders, splits and latents, which all experiments share; what is there is kept."""
        sources, data = self.out / "sources", self.shared / "data"
        linked(sources / "prostate", data / "prostate", self.manifest)
        command("shards", "prostate", str(sources / "prostate"), str(self.data), "--patch-size", "64")
        common = ["class_field=", "patient_is=image", "patch_size=64", "source_mpp=1.0"]
        for name in ("consep", "oral"):
            where = thinned(sources / name, data / "unlabelled" / name, self.size.others)
            words = [f"folder={where}", f"out={self.out / 'data' / name}", r"pattern=.*\.(?:jpe?g|png)", f"name={name}"]
            command("shards", "images", *words, *common, "max_bad=0.1")
        tiles = ["--patch-size", "64", "--mpp", "1.0"]
        command("shards", "tcga-tiles", str(data / "tcga_tiles"), str(self.out / "data" / "tiles"), *tiles)
        self.parts.to_csv(self.out / "splits.csv", index=False)
        for column in self.parts.columns[1:]:
            name = column.removeprefix("split_")
            if name not in PatchDataset.open(self.data).splits:
                command("split", str(self.data), f"table={self.out / 'splits.csv'}", f"name={name}")
        words = [f"data={self.data}", f"autoencoder={self.taef2}", f"out={self.latents}", "device_batch=32"]
        command("encode", *words, "reconstruction_error.patches=0")
        for job in [*self.pretrainings(), *self.adaptations()]:
            if not (copy := Path(job.settings["latents"])).exists():
                with atomic_path(copy) as temporary:  # a killed command leaves no half of one
                    shutil.copytree(self.latents, temporary)

    def common(self, split: str, name: str) -> dict[str, Any]:
        """Settings of every experiment; each has a copy of the latents, since only one may open a folder to write."""
        return {
            "data": str(self.data),
            "latents": str(self.latents.with_name(name)),
            "split": split,
            "patch_size": 64,
            "processes": 1,
            "parallel": 1,
            "autoencoder": self.taef2,
            "encoders": ["demo"],
            "encode": {"device_batch": 32, "reconstruction_error": {"patches": 0}},
            "train": {"global_batch": 16, "lr": 1.0e-3, "model": NETWORK},
        }

    def pretrainings(self) -> list[Job]:
        """The pre-training on other tissue, and one on that and the biopsies of each draw that do not test."""
        return [self._pretraining("other", "draw0_pool", [])] + [
            self._pretraining(f"both{draw}", f"draw{draw}_pool", ["own"]) for draw in range(self.size.draws)
        ]

    def _pretraining(self, name: str, split: str, own: Sequence[str]) -> Job:
        sources: dict[str, Any] = {other: {"data": str(self.out / "data" / other)} for other in OTHER_TISSUE}
        sources |= {key: {"part": "train"} for key in own}
        steps = -(-self.size.pretraining // 16)
        settings = self.common(split, f"pretraining-{name}") | {
            "title": f"Pre-training, {name}",
            "out": str(self.out / "pretraining" / name),
            "stages": ["shards", "corpus", "encode", "train"],
            "generate": {"guidance": {"form": "none"}},
            "corpus": sources,
            "models": {
                "pretrained": {
                    "config": "demo/cls",
                    "data": "corpus",
                    "train": {"max_steps": steps, "model": {"fields": []}},
                }
            },
        }
        return Job(f"pretraining-{name}", settings, {"pretraining": self.size.pretraining}, 3)

    def adaptations(self) -> list[Job]:
        """An experiment for each draw and number of labelled biopsies."""
        return [self._adaptation(draw, name) for draw in range(self.size.draws) for name in LABELLED]

    def _adaptation(self, draw: int, labelled: str) -> Job:
        size, steps = self.size, -(-self.size.adaptation // 16)
        seen, split = {"balance": ["class"]}, f"draw{draw}_{labelled}"
        models: dict[str, Any] = {"scratch": {"config": "demo/cls", "train": seen | {"max_steps": 3 * steps}}}
        for corpus in CORPORA:
            folder = "other" if corpus == "other" else f"both{draw}"
            start, vectors = f"guided_{corpus}", f"vectors_{corpus}"
            models[start] = {
                "folder": str(self.out / "pretraining" / folder / "pretrained" / "model"),
                "classifier": "demo/classifier",
                "classifier_train": {"validation_value": "", "max_steps": -(-size.guide // 32), "network": GUIDE},
                "generate": {"classifier": {"scale": 10.0}, "guidance": {"form": "none"}},
            }
            models[f"finetuned_{corpus}"] = _from(start, seen | {"max_steps": steps})
            # An adapter adds no field: vectors of the classes first, with the network frozen.
            models[vectors] = _from(start, seen | {"max_steps": steps // 4, "train_parts": ["new"]}) | {"sample": False}
            models[f"lora_{corpus}"] = _from(vectors, seen | {"max_steps": steps - steps // 4, "lora": {"rank": 16}})
        wanted = size.patches * 2 * LABELLED[labelled] * max(size.percents) / 100
        settings = self.common(split, split) | {
            "title": f"Draw {draw}, {labelled} labelled",
            "out": str(self.out / "draws" / split),
            "stages": ADAPTING,
            "models": models,
            "plan_fields": ["class"],
            "seen_per_cell": round(1.5 * wanted),
            "max_images": 100_000,
            "generate": {
                "sampler": {"name": "ddim", "steps": size.steps},
                "guidance": {"form": "chain", "scale": 2.0, "interval": [0.0, 0.25]},
                "device_batch": 64,
            },
            "select": SELECT | {"percent": max(size.percents)},
            "image_classifier": "histodiffusion/demo_classifier",
            "image_classifier_train": {
                "seeds": 1,
                "percents": list(size.percents),
                "validation_value": "",
                "max_images": size.classifier,
            },
        }
        sampled = [name for name, model in models.items() if model.get("sample", True)]
        images = {
            "adaptation": size.adaptation * (3 + 2 * len(CORPORA)),
            "guide": size.guide * len(CORPORA),
            "sampled": settings["seen_per_cell"] * 3 * len(sampled),
            "classifier": size.classifier * (1 + len(CHOICES) * len(size.percents) * len(sampled)),
        }
        return Job(split, settings, images, len(models) + len(CORPORA) + len(sampled) + 1)


def _from(start: str, train: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": "demo/cls", "init_from": start, "train": dict(train)}


def draws_of(manifest: pd.DataFrame, draws: int) -> pd.DataFrame:
    """The splits of some draws, as a table with a row per biopsy.

    Args:
        manifest: A row per patch with patient, class and site.
        draws: How many.

    Returns:
        The columns patient and, of each draw N, split_drawN_one and _two (train is labelled, the others are test and
        unlabelled) and split_drawN_pool (train are all that do not test). No two draws divide the classes and hospitals
        with three biopsies in the same way.

    Raises:
        UserError: There are fewer ways to divide these.
    """
    biopsies = manifest.drop_duplicates("patient").sort_values("patient", ignore_index=True)
    ways = 6 ** int((biopsies.groupby(["class", "site"]).size() == 3).sum())
    if draws > ways:
        raise UserError(f"The classes and hospitals with three biopsies can be divided in {ways} ways, not {draws}.")
    columns: dict[str, list[str]] = {"patient": biopsies["patient"].tolist()}
    rng, known = np.random.default_rng(0), set[tuple[str, ...]]()
    while len(columns) < 1 + 3 * draws:
        parts = pd.DataFrame("unlabelled", biopsies.index, ["one", "two", "pool"])
        few: list[str] = []
        for _, rows in biopsies.groupby(["class", "site"], sort=True):
            order = rng.permutation(rows.index.to_numpy())
            tests = min(max(1, round(TEST_SHARE * len(order))), len(order) - max(LABELLED.values()))
            parts.loc[order[:tests], :] = "test"
            parts.loc[order[tests:], "pool"] = "train"
            for name, number in LABELLED.items():
                parts.loc[order[tests : tests + number], name] = "train"
            few += map(str, order[:2] if len(order) == 3 else ())
        if tuple(few) not in known:
            known.add(tuple(few))
            columns |= {f"split_draw{len(known) - 1}_{name}": parts[name].tolist() for name in parts}
    return pd.DataFrame(columns)


def linked(folder: Path, source: Path, manifest: pd.DataFrame) -> Path:
    """A folder with a manifest of its own and a link to the images of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest.to_csv(folder / "manifest.csv", index=False)
    if not (folder / "images").exists():
        (folder / "images").symlink_to((source / "images").resolve())
    return folder


def thinned(folder: Path, source: Path, count: int) -> Path:
    """A folder with links to the first images of another one; that one itself with 0."""
    if not count:
        return source
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir())[:count]:
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return folder


def command(*words: str) -> None:
    """Run ``latent-medi`` in this process."""
    if code := latent_medi(list(words)):
        sys.exit(code)
