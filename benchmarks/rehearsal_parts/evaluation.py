"""The evaluation's part of the rehearsal: the study of MeDi's paper on random features, and its report in a browser."""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import evaluation_at_size
import numpy as np
import pandas as pd
from output import timed_command

from latent_medi.core import config
from latent_medi.core.checksums import save_tensors
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import make_plans
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.features.cache import cache_file
from latent_medi.features.encoders import load_encoder
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.shards.dataset import PatchDataset
from rehearsal_parts.folders import write_samples

ENCODER = "evaluation_at_size:encoder"
_STRENGTHS = {"class": 0.15, "tss": 0.1, "patient": 0.1}
"""Standard deviation, between the values of a field, of a feature that varies by 1 among patches of one value."""


def evaluation(data: Path, out: Path, features: int, changes: Sequence[str]) -> dict[str, float]:
    """Plan the paper's study, put samples of its plans and random features in place, and evaluate.

    Args:
        data: The real dataset.
        out: Folder of the study.
        features: Number of features.
        changes: Settings of the study.

    Returns:
        Samples of each model, and what the evaluation took.
    """
    words = ["--config", "tcga_ut/paper", f"data={data}", f"out={out}", f"encoders=[{ENCODER}]"]
    study = Experiment(config.parse(ExperimentSettings, [*words, *changes], "run"))
    real, result = PatchDataset.open(data), {}
    for name, plan in make_plans(study).items():
        write_samples(study.synthetic[name], plan, real.schema)
        result[f"samples_{name}"] = float(plan["count"].sum())
    with mock.patch.dict("os.environ", {evaluation_at_size.WIDTH: str(features)}):
        encoder = load_encoder(ENCODER)
    for number, folder in enumerate([data, *study.synthetic.values()]):
        dataset = PatchDataset.open(folder)
        # A generator that is not perfect: its features are a little off.
        tensors = {"features": random_features(dataset.index, features, number, 0.05 * number)}
        tensors["known"] = np.ones(len(dataset), np.uint8)
        save_tensors(tensors, cache_file(dataset, encoder, out / "features"))
    return result | evaluation_at_size.evaluated(study.evaluation, features)


def random_features(index: pd.DataFrame, features: int, seed: int, shift: float) -> np.ndarray:
    """float32 [N, features] of patches, shifted by class, site code and patient: in every dataset by the same."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal((len(index), features), np.float32)
    for field, strength in _STRENGTHS.items():
        codes, values = pd.factorize(index[field])
        seeds = [zlib.crc32(f"{field}{value}".encode()) for value in values]
        centres = np.stack([np.random.default_rng(s).standard_normal(features, np.float32) for s in seeds])
        centres[np.asarray(values) == UNKNOWN_WORD] = 0
        for start in range(0, len(found), 10_000):
            found[start : start + 10_000] += np.float32(strength) * centres[codes[start : start + 10_000]]
    found += np.float32(shift)
    return found


def report(out: Path) -> dict[str, float | None]:
    """Make the report of an evaluation, and open it in Chromium if there is one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "report"))
    from browser import CHROMIUM, browser

    result: dict[str, float | None] = dict(timed_command(["report", f"metrics={out}", "patches_per_cell=6"]))
    page = out / "report.html"
    result |= {"page_mib": page.stat().st_size / 2**20, "opened_s": None}
    if CHROMIUM is not None:
        with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
            start = time.perf_counter()
            tab.open(page, 1280)
            result["opened_s"] = time.perf_counter() - start
            assert not tab.problems, tab.problems
    return result
