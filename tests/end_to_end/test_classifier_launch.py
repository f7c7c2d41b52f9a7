"""The classifier's training as a user launches it on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cluster_parts import ALONE, LONGEST, free_port, launcher, start, tensors

from latent_medi.training.log import read_log

SMALL = ["network.block_out_channels=[16,32]", "network.layers_per_block=1", "network.attention_head_dim=16"]
SMALL += ["network.norm_num_groups=8", "max_steps=24", "global_batch=8", "log_every_images=64"]


@pytest.mark.slow
def test_two_launched_processes_train_the_classifier_of_one(tiny: Path, tmp_path: Path) -> None:
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}"]
    for name, words in (("one", ALONE), ("two", launcher(2, free_port()))):
        command = [*words, "-m", "latent_medi.cli", "classifier", *where, f"out={tmp_path / name}", *SMALL]
        errors = tmp_path / f"{name}.txt"
        assert start(command, errors).wait(timeout=LONGEST) == 0, errors.read_text()[-4000:]
        assert ("2 processes" in errors.read_text()) == (name == "two")
    ours, theirs = (
        torch.cat([v.double().flatten() for v in tensors(tmp_path / n / "classifier").values()]) for n in ("one", "two")
    )
    assert float((ours - theirs).norm() / ours.norm()) <= 1e-5
    for file, columns in (("log.csv", ("loss", "accuracy", "lr")), ("evaluation.csv", ("loss", "n"))):
        rows = zip(*(read_log(tmp_path / name / file) for name in ("one", "two")), strict=True)
        for one, two in rows:
            for column in columns:
                assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-3), (file, column)
