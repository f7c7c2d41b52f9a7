"""The small network: the same budget and start for every training set, the same result for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_world import World, filters
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.cnn import NetworkClassifier, PatchPools, _batches, _turned
from latent_medi.evaluation.downstream.compare import choose, jobs
from latent_medi.evaluation.downstream.registry import plan_additions
from latent_medi.evaluation.downstream.training_sets import TrainingSet
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.settings import CnnSettings

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def study(world: World) -> Study:
    found = open_study(world.settings("cnn"))
    return replace(found, test=found.test[::4])


@pytest.fixture(scope="module")
def pools(study: Study) -> PatchPools:
    return PatchPools(study, plan_additions(study, 6, 0, 0.2))


def _training_set(study: Study, pools: PatchPools, n: int = 40, **more: Any) -> TrainingSet:
    rows = study.train[:: len(study.train) // n]
    return TrainingSet(pools.real[rows], study.index["class"].to_numpy(str)[rows], **more)


def test_pairs_lead_to_their_patches(study: Study, pools: PatchPools) -> None:
    made = pools.derived["stain_augmentation"]["jitter"][0]
    assert made is not None
    medi = study.synthetic["medi"]
    pairs = np.concatenate([pools.real[[5, 900]], pools.synthetic["medi"][[3]], made[[2]], pools.real[[7]]]).astype(
        float
    )
    images = pools.read(pairs)
    assert np.array_equal(images[[0, 1, 4]], study.real.read([5, 900, 7]))
    assert np.array_equal(images[2], medi.dataset.read([int(medi.rows[3])])[0])
    assert images[3].shape == (32, 32, 3)
    sources = pools.sources(study, plan_additions(study, 6, 0, 0.2), [None] * 3)
    chosen, _ = choose(sources, ["real", "reweight", "oversample"])
    assert len(jobs(chosen, sources, True, 2)) == 6  # reweighting is also a variant of oversampling, and trained once


def test_a_seed_gives_one_network(study: Study, pools: PatchPools) -> None:
    settings = CnnSettings(network=SMALL, steps=3, batch=8)
    classifier = NetworkClassifier(study, pools, filters(), settings)
    training_set = _training_set(study, pools)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = classifier.fit_predict(training_set, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)  # whatever was drawn elsewhere must not matter
    again = NetworkClassifier(study, pools, filters(), settings).fit_predict(training_set, 4)
    assert np.array_equal(first.probabilities, again.probabilities)
    assert first.probabilities.sum(axis=1) == pytest.approx(1.0)
    assert not np.array_equal(first.probabilities, classifier.fit_predict(training_set, 5).probabilities)
    # Nothing to learn from first is the same as learning from the real patches alone.
    nothing = (np.zeros((0, 2)), np.zeros(0, str))
    tuned = classifier.fit_predict(_training_set(study, pools, pretraining=nothing), 4)
    assert np.array_equal(first.probabilities, tuned.probabilities)


def test_networks_are_trained_and_predict_in_fp32(study: Study, pools: PatchPools) -> None:
    """Whatever was set before: on a GPU, convolutions would round their factors to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    classifier = NetworkClassifier(study, pools, filters(), CnnSettings(network="encoder", steps=1, batch=8))
    seen: set[bool] = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: seen.add(torch.backends.cudnn.allow_tf32))
    classifier.fit_predict(_training_set(study, pools), 0)
    hook.remove()
    assert seen == {False}
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


def test_every_training_set_takes_the_same_steps(
    study: Study, pools: PatchPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = NetworkClassifier(study, pools, filters(), CnnSettings(network="encoder", steps=7, batch=8))
    seen: list[np.ndarray] = []
    read = pools.read
    monkeypatch.setattr(pools, "read", lambda pairs: seen.append(np.asarray(pairs)) or read(pairs))
    batches = -(-len(study.test) // 8)
    arm = pools.synthetic["medi"]
    labels = study.synthetic["medi"].index["class"].to_numpy(str)
    for n, first in ((40, None), (90, None), (40, (arm, labels))):
        seen.clear()
        classifier.fit_predict(_training_set(study, pools, n, pretraining=first), 0)
        assert len(seen) == 7 + batches
        assert all(len(batch) == 8 for batch in seen[:7])
        assert [int(batch[0, 0]) for batch in seen[:7]] == ([0] * 7 if first is None else [1] * 3 + [0] * 4)


def test_batches_use_every_row_before_any_again() -> None:
    draws = _batches(10, 4, np.random.default_rng(0))
    rows = np.concatenate([next(draws) for _ in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    turned = _turned(images, np.random.default_rng(1))
    for a, b in zip(images, turned, strict=True):
        views = [np.rot90(v, k) for v in (a, a[:, ::-1]) for k in range(4)]
        assert any(np.array_equal(b, v) for v in views)


def test_weights_and_names_are_checked(study: Study, pools: PatchPools, tmp_path: Path) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    given = get_model(SMALL, weights=None, num_classes=11)  # trained for other classes
    save_file(given.state_dict(), tmp_path / "good.safetensors")
    settings = CnnSettings(network=SMALL, weights=str(tmp_path / "good.safetensors"), steps=1, batch=4)
    model = NetworkClassifier(study, pools, filters(), settings)._start()
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, given.state_dict()[name])
    assert model.state_dict()["fc.weight"].shape[0] == 3
    broken = {k: v for k, v in given.state_dict().items() if k != "conv1.0.weight"}
    save_file(broken, tmp_path / "bad.safetensors")
    bad = CnnSettings(network=SMALL, weights=str(tmp_path / "bad.safetensors"))
    with pytest.raises(UserError, match=r"conv1\.0\.weight"):
        NetworkClassifier(study, pools, filters(), bad)


@pytest.mark.slow
def test_a_network_takes_the_probe_s_place(world: World) -> None:
    """The planted classes are found from the pixels; the headline has the network's numbers."""
    cnn = CnnSettings(network="encoder", steps=150, batch=32, learning_rate=0.05, seeds=1)
    names = ["real", "medi", "pretrain_finetune_medi"]
    settings = world.settings("network", classifier="cnn", cnn=cnn, training_sets=names, colour_free=True)
    result = evaluate(settings, [filters()])
    assert set(result.downstream) == {"filters", "filters:haematoxylin"}
    record = result.downstream["filters"]
    assert (record.classifier.kind, record.classifier.network, record.classifier.steps) == ("cnn", "filters", 150)
    found = record.training_sets
    accuracy = found["real"].accuracy_in_distribution.value
    assert accuracy is not None
    assert accuracy > 0.5
    assert found["medi"].repeats == 1
    assert result.headline.accuracy_shift["medi"] == found["medi"].accuracy_shift.value
    assert record.not_converged == []
