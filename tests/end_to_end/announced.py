"""What an experiment announced, against what its folder then holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from latent_medi.experiment.cost import experiment_cost
from latent_medi.experiment.cost_records import StageCost
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.shards.dataset import PatchDataset


def announced(settings: ExperimentSettings, nowhere: Path) -> dict[tuple[str, str], StageCost]:
    """What a run announces before anything is made, by stage and model; in another folder, so that nothing is."""
    experiment = Experiment(replace(settings, out=str(nowhere)))
    declare(experiment)
    rows = experiment_cost(experiment).stages
    assert not nowhere.exists()
    return {(row.stage, row.model): row for row in rows}


def check_announced(rows: dict[tuple[str, str], StageCost], settings: ExperimentSettings) -> None:
    """Images and bytes of every row are those of the folder, wherever a row says so."""
    out = Path(settings.out)
    for (stage, model), row in rows.items():
        where = f"{stage} {model}"
        if stage == "shards":
            assert row.images == len(PatchDataset.open(out / "data")), where
            assert row.bytes is None, where
        elif stage == "encode":
            info = json.loads((out / "latents" / "latents.json").read_text())
            assert (row.images, row.bytes) == (sum(s["count"] for s in info["shards"]), tensors(out / "latents")), where
        elif stage == "train":
            seen = json.loads((out / model / "model" / "provenance.json").read_text())["images_seen"]
            assert (row.images, row.bytes) == (seen, tensors(out / model)), where
        elif stage == "sample":
            assert row.images == len(PatchDataset.open(out / "synthetic" / model)), where
            assert not row.exact, where
        elif stage == "evaluate" and row.bytes is not None:
            files = list((out / "features").glob("*.safetensors"))
            assert row.bytes == tensors(out / "features"), where
            times = len(files) // (1 + len([key for key in rows if key[0] == "sample"]))  # coloured or not, by encoder
            assert times * (row.images or 0) == sum(int(load_file(file)["known"].sum()) for file in files), where


def tensors(folder: Path) -> int:
    """Bytes of a folder's files of tensors; all else but pictures is small text."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
