"""The image classifier's training as a user launches it on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cluster_parts import ALONE, LONGEST, free_port, launcher, start, tensors

from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.training.log import read_log

SMALL = ["image_size=64", "max_images=96", "global_batch=8", "evaluate_every_images=48", "log_every_images=48"]
SMALL += ["validation_value=probe", "precision=fp32", "warmup_fraction=0.1"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "data"
    cohort.build(folder, CohortSettings(train_patients=1, probe_patients=1, test_patients=1, patches_per_patient=2), 1)
    return folder


def command(words: list[str], data: Path, out: Path, network: str) -> list[str]:
    named = [f"data={data}", f"out={out}", f"network={network}"]
    return [*words, "-m", "latent_medi.cli", "image-classifier", "--config", "histodiffusion/vit", *named, *SMALL]


@pytest.mark.slow
def test_two_launched_processes_train_the_image_classifier_of_one(small: Path, tmp_path: Path) -> None:
    for name, words in (("one", ALONE), ("two", launcher(2, free_port()))):
        errors = tmp_path / f"{name}.txt"
        process = start(command(words, small, tmp_path / name, "test_vit"), errors)
        assert process.wait(timeout=LONGEST) == 0, errors.read_text()[-4000:]
    ours, theirs = (
        torch.cat([v.double().flatten() for v in tensors(tmp_path / n / "model").values()]) for n in ("one", "two")
    )
    assert float((ours - theirs).norm() / ours.norm()) <= 1e-5
    for file, columns in (("log.csv", ("loss", "accuracy")), ("evaluation.csv", ("loss", "balanced_accuracy", "n"))):
        rows = list(zip(*(read_log(tmp_path / name / file) for name in ("one", "two")), strict=True))
        assert rows
        for one, two in rows:
            for column in columns:
                assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-3), (file, column)
    assert (tmp_path / "one" / "scores.json").read_bytes() == (tmp_path / "two" / "scores.json").read_bytes()


@pytest.mark.slow
def test_processes_without_a_gpu_cannot_share_batch_normalisation(small: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors.txt"
    process = start(command(launcher(2, free_port()), small, tmp_path / "run", "test_resnet"), errors)
    assert process.wait(timeout=LONGEST) == 2
    assert "batch normalisation, whose statistics 2 processes without a GPU cannot share" in errors.read_text()
