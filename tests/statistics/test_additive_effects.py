"""Effects of fields add up, and a patient with many patches weighs as one with few."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from latent_medi.statistics.additive_effects import additive_effects, patient_weights

SITES = ("aster", "birch", "cedar")
COMBINATIONS = [(c, s) for c in ("benign", "tumour") for s in SITES]
UNSEEN = ("tumour", "cedar")


def test_patients_weigh_the_same() -> None:
    labels = np.array(["a", "a", "a", "a", "b"])
    patients = np.array(["p", "p", "p", "q", "p"])
    assert patient_weights(labels, patients) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2, 1])


def test_effects_add_up_in_combinations_that_training_lacks() -> None:
    rng = np.random.default_rng(0)
    seen = [pair for pair in COMBINATIONS if pair != UNSEEN]
    rows = [(*seen[i % 5], f"p{i // 3}") for i in range(90)] + [
        ("benign", "aster", "p0")
    ] * 40  # and one patient is many
    table = pd.DataFrame(rows, columns=["class", "site", "patient"])
    of = {name: rng.normal(size=8) for name in ("benign", "tumour", *SITES)}
    features = np.stack([of[row["class"]] + of[row["site"]] + 3.0 for _, row in table.iterrows()]).astype(np.float32)
    effects = additive_effects(features, table, ["class", "site"])
    wanted = pd.DataFrame([(*pair, "s") for pair in COMBINATIONS] + [("benign", "unknown", "s")], columns=table.columns)
    theirs = [of[row["class"]] + of.get(row["site"], 0.0) + 3.0 for _, row in wanted.iterrows()]
    adjusted = effects.subtract(np.stack(theirs).astype(np.float32), wanted, ["site"])
    mean = np.mean([of[site] for site in SITES], axis=0) + 3.0
    for row, (kind, _) in zip(adjusted, COMBINATIONS, strict=False):
        assert row == pytest.approx(of[kind] + mean, abs=1e-4)  # of the class alone, unseen or not
    assert adjusted[-1] == pytest.approx(theirs[-1], abs=1e-6)  # nothing is known, nothing is taken out
