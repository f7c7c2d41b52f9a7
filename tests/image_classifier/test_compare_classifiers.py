"""Image classifiers on growing shares of synthetic patches: numbers by hand, paired intervals, what is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.image_classifier import compare
from latent_medi.image_classifier.compare import compare_classifiers
from latent_medi.image_classifier.comparison import TestScores, comparison_text, read_comparison
from latent_medi.image_classifier.settings import CompareClassifiersSettings, ImageClassifierSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.start import training_accelerator

Make = Callable[..., ImageClassifierSettings]


def sweep(make: Make, samples: PatchDataset, **values: Any) -> CompareClassifiersSettings:
    defaults: dict[str, Any] = {"synthetic": {"guided": str(samples.folder)}, "selection": "best"}
    own = {"percents": [5.0, 10.0], "seeds": 2, "max_steps": 4} | defaults | values
    fields = {field.name for field in dataclasses.fields(ImageClassifierSettings)}
    single = vars(make(**{name: value for name, value in own.items() if name in fields}))
    return CompareClassifiersSettings(**single, **{k: v for k, v in own.items() if k not in fields})


def written_at(out: Path) -> dict[str, int]:
    return {str(path.parent): path.stat().st_mtime_ns for path in out.glob("*/*/model/classifier.json")}


def test_the_table_and_what_a_changed_sweep_keeps(make: Make, synthetic: PatchDataset) -> None:
    settings = sweep(make, synthetic)
    found = compare_classifiers(settings)
    kinds = [(row.training_set, row.choice, row.percent) for row in found.rows]
    shares = [("random", 5.0), ("random", 10.0), ("selected", 5.0), ("selected", 10.0)]
    assert kinds == [("real", "none", 0.0), *(("guided", choice, percent) for choice, percent in shares)]
    assert [row.n_real for row in found.rows] == [192] * 5
    assert [row.n_synthetic for row in found.rows] == [0, 9, 18, 9, 18]  # ⌊5 % of 64⌋ of each of three classes
    assert (found.images, found.seeds, found.n_patches, found.n_patients) == (32, 2, 96, 24)
    out = Path(settings.out)
    # Numbers from the files that the trainings wrote.
    tables = [pd.read_csv(out / "guided" / f"selected-10-seed{seed}" / "test_predictions.csv") for seed in (0, 1)]
    right = [(table["truth"] == table["predicted"]).mean() for table in tables]
    assert found.rows[4].accuracy.by_seed == pytest.approx(right)
    assert found.rows[4].accuracy.sem == pytest.approx(np.std(right, ddof=1) / np.sqrt(2))
    real = found.rows[0].accuracy
    assert found.rows[4].minus_real is not None
    assert found.rows[4].minus_real.accuracy.value == pytest.approx(np.mean(right) - real.mean)
    assert found.rows[4].minus_random is not None
    assert found.rows[2].minus_random is None
    assert not list(out.rglob("checkpoints"))
    assert read_comparison(out) == found
    table = pd.read_csv(out / "classifiers.csv")
    assert table["accuracy_mean"].tolist() == pytest.approx([row.accuracy.mean for row in found.rows])
    text = comparison_text(found)
    assert "macro F1, mean ± SEM over seeds" in text
    assert "guided, selected" in text
    assert "96 test patches of 24 patients" in text

    before = written_at(out)
    more = compare_classifiers(dataclasses.replace(settings, percents=[5.0, 10.0, 20.0], choices=["random"]))
    assert [row.n_synthetic for row in more.rows] == [0, 9, 18, 36]
    assert {name: time for name, time in written_at(out).items() if name in before} == before
    assert more.rows[:3] == found.rows[:3]


def test_a_killed_comparison_continues_and_gives_the_same_table(
    make: Make, synthetic: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sweep(make, synthetic, percents=[10.0], choices=["selected"], seeds=1)
    whole = compare_classifiers(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    count, true = [0], compare.train_image_classifier

    def killed(run: ImageClassifierSettings, accelerator: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return true(run, accelerator)

    monkeypatch.setattr(compare, "train_image_classifier", killed)
    with pytest.raises(KeyboardInterrupt):
        compare_classifiers(settings)
    before = written_at(Path(settings.out))
    assert len(before) == 1
    assert compare_classifiers(settings) == whole
    after = written_at(Path(settings.out))
    assert len(after) == 2
    assert before.items() <= after.items()


def test_a_difference_is_paired_by_seed_and_patient() -> None:
    """Of accuracies, whose value without a patient is known; two classes, 24 patients of two patches."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(24), 2)
    truth = (patients >= 12).astype(int)
    first = [np.where(rng.random(48) < 0.9, truth, 1 - truth) for _ in range(3)]
    second = [np.where(rng.random(48) < 0.6, truth, 1 - truth) for _ in range(3)]
    test = TestScores(truth, patients, 2)
    found = test.differences(test.of(first), test.of(second)).accuracy
    changes = np.stack([(a == truth).astype(float) - (b == truth) for a, b in zip(first, second, strict=True)])
    assert found.value == pytest.approx(changes.mean())
    left = np.stack([changes[:, patients != p].mean(axis=1) for p in range(24)], axis=1)  # [seeds, patients]
    parts = [left.mean(axis=0)[:12], left.mean(axis=0)[12:]]
    variances = [11 / 12 * ((part - part.mean()) ** 2).sum() for part in parts]
    spread_of_seeds = left - left.mean(axis=0)
    interaction = sum(
        11 / 12 * ((own - own.mean(axis=1, keepdims=True)) ** 2).sum() / 2
        for own in (spread_of_seeds[:, :12], spread_of_seeds[:, 12:])
    )
    over_seeds = max(0.0, changes.mean(axis=1).var(ddof=1) - interaction) / 3
    variances += [over_seeds] if over_seeds else []
    variance = sum(variances)
    dof = variance**2 / sum(v**2 / d for v, d in zip(variances, (11, 11, 2), strict=False))
    reach = stats.t.ppf(0.975, dof) * np.sqrt(variance)
    assert found.interval == pytest.approx((changes.mean() - reach, changes.mean() + reach))
    # The same classifiers twice: no difference, and no interval but for what seeds cannot tell.
    same = test.differences(test.of(first), test.of(first)).accuracy
    assert same.value == 0
    single = test.differences(test.of(first[:1]), test.of(second[:1])).accuracy
    assert single.interval is None or single.interval == "not estimable"
    assert single.reason == "the noise of the training is unknown: it takes at least two seeds"


def test_where_nothing_helps_one_of_many_seldom_seems_to() -> None:
    """Six training sets that are as good as real patches alone, judged on the same patients, 200 times."""
    rng, sets, trials = np.random.default_rng(0), 6, 200
    truth, patients = np.tile([0, 1], 120), np.repeat(np.arange(60), 4)
    seems = [0, 0]
    for _ in range(trials):
        hard = 0.3 + 0.1 * rng.normal(size=60)[patients]
        test = TestScores(truth, patients, 2)
        each = [test.of([truth ^ (rng.random(240) < hard) for _ in range(3)]) for _ in range(sets + 1)]
        found = [test.differences(scores, each[0], sets) for scores in each[1:]]
        for number, changes in enumerate([[f.accuracy for f in found], [f.accuracy_of_all for f in found]]):
            bounds = [change.interval for change in changes if change and isinstance(change.interval, tuple)]
            assert len(bounds) == sets
            seems[number] += any(low > 0 or high < 0 for low, high in bounds)
    assert seems[0] > 0.05 * trials  # one interval at a time would call something helpful far too often
    assert seems[1] <= 0.05 * trials + 2 * (0.05 * 0.95 * trials) ** 0.5


def test_what_cannot_be_compared_is_refused(make: Make, synthetic: PatchDataset) -> None:
    for values, words in [
        ({"test_value": ""}, "test_value is empty"),
        ({"selection": ""}, "selection is empty"),
        ({"percents": []}, "needs percents"),
        ({"synthetic": {"real": str(synthetic.folder)}}, "stands for real patches"),
    ]:
        with pytest.raises(UserError, match=words):
            compare_classifiers(sweep(make, synthetic, **values))


def test_the_verb_prints_the_table(
    make: Make, tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare-classifiers", f"data={tissue}", f"out={tmp_path / 'run'}", "validation_value=probe"]
    words += ["network=test_vit", "image_size=64", "max_steps=1", "global_batch=8", "seeds=1"]
    assert main([*words, "--json", str(tmp_path / "result.json")]) == 0
    assert "real patches alone" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["training_set"] == "real"


def test_each_training_starts_from_the_same_scale_of_the_loss(
    make: Make, synthetic: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, also those before which another was trained in the same process."""
    settings = sweep(make, synthetic)
    accelerator = training_accelerator(settings.training())
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scales: list[float] = []

    def trained(run: ImageClassifierSettings, given: Accelerator) -> None:
        scales.append(given.scaler.get_scale())
        given.scaler.scale(torch.ones(1))
        given.scaler.update(2.0)

    monkeypatch.setattr(compare, "train_image_classifier", trained)
    with pytest.raises(UserError):  # nothing was trained
        compare_classifiers(settings, accelerator)
    assert scales == [64.0] * 10
