"""The embedded networks: small, loadable, and what their cards say; and the cohort is as hard as it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import latent_medi
from latent_medi.demo.cohort import HELD_OUT, patches, patients
from latent_medi.demo.pretrain import embed, shape_r2, tissue_bank
from latent_medi.demo.settings import CohortSettings
from latent_medi.features.tiny_encoder import TinyEncoder
from latent_medi.latents.autoencoder import load_autoencoder

WEIGHTS = Path(latent_medi.__file__).parent / "demo" / "weights"


def test_each_network_is_small_safetensors_with_a_card() -> None:
    for name in ("autoencoder", "encoder"):
        files = [p for p in (WEIGHTS / name).iterdir() if p.is_file()]
        assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
        assert sum(p.stat().st_size for p in files) <= 3_000_000
        assert (WEIGHTS / name / "README.md").is_file()


def test_encoder_reads_shape_so_it_is_no_colour_meter() -> None:
    images, truth = tissue_bank(1200, seed=77, jobs=1)
    encoder = TinyEncoder.load(WEIGHTS / "encoder")
    assert encoder.config["dim"] <= 64
    scores = shape_r2(encoder, images, truth)
    assert min(scores.values()) >= 0.5, scores


def test_autoencoder_keeps_what_the_encoder_sees() -> None:
    images, _ = tissue_bank(64, seed=78, jobs=1)
    autoencoder = load_autoencoder("demo")
    again = autoencoder.decode(autoencoder.encode(images)[0])
    error = (again.astype(float) - images).std()
    assert 20 * np.log10(255 / error) >= 27


@pytest.mark.slow
def test_cohort_is_calibrated() -> None:
    """Real patches alone: 80 to 97 % in distribution, 10 points under the oracle where combinations are missing."""
    settings = CohortSettings(seed=5)
    rows = [(p, patch) for p in patients(settings) for patch in patches(p, settings)]
    table = pd.DataFrame([{"split": p.split, "patient": p.name, **patch.fields} for p, patch in rows])
    features = embed(TinyEncoder.load(WEIGHTS / "encoder"), np.stack([patch.image for _, patch in rows]))
    held = np.logical_or.reduce([np.logical_and.reduce([table[k] == v for k, v in c.items()]) for c in HELD_OUT])
    train, probe, test = (table["split"].to_numpy() == name for name in ("train", "probe", "test"))
    assert not (train & held).any()
    shift = test & table["site"].isin({c["site"] for c in HELD_OUT}).to_numpy()

    def accuracy(fitted_on: np.ndarray, judged_on: np.ndarray) -> float:
        probe_model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000, class_weight="balanced"))
        probe_model.fit(features[fitted_on], table["class"][fitted_on])
        right = table[judged_on].assign(right=probe_model.predict(features[judged_on]) == table["class"][judged_on])
        return float(right.groupby(["class", "patient"])["right"].mean().groupby("class").mean().mean())

    assert 0.80 <= accuracy(train, test & ~held) <= 0.97
    assert accuracy(train | (probe & held), shift) - accuracy(train, shift) >= 0.10
