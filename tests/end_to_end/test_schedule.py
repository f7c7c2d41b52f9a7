"""The learning rate of real runs of 1, 2 and 4 processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cluster_parts import ALONE, LONGEST, SMALL, free_port, launcher, losses, start

BATCH, STEPS, PEAK = 8, 30, 1e-3
WARMUP, TOTAL = 6 * BATCH, STEPS * BATCH


@pytest.mark.slow
def test_learning_rate_is_the_same_function_of_images_for_any_number_of_processes(tiny: Path, tmp_path: Path) -> None:
    run = [f"max_steps={STEPS}", f"global_batch={BATCH}", f"lr={PEAK}", f"warmup_images={WARMUP}", "schedule=cosine"]
    run += [f"log_every_images={BATCH}", "checkpoint_every_images=0", *SMALL]
    rates = {}
    for processes in (1, 2, 4):
        out, errors = tmp_path / str(processes), tmp_path / f"errors-{processes}"
        where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={out}"]
        words = ALONE if processes == 1 else launcher(processes, free_port())
        done = start([*words, "train.py", "--config", "demo/medi", *where, *run], errors).wait(timeout=LONGEST)
        assert done == 0, errors.read_text()[-4000:]
        assert (f"{processes} processes" in errors.read_text()) == (processes > 1)
        rates[processes] = {images: float(rate) for images, (_, rate, _) in losses(out).items()}
    assert rates[1] == rates[2] == rates[4]
    assert list(rates[1]) == list(range(BATCH, TOTAL + 1, BATCH))
    for images, rate in rates[1].items():
        seen = images - BATCH  # where the update began
        if seen < WARMUP:
            assert rate == pytest.approx(PEAK * seen / WARMUP, abs=1e-15)
        else:
            assert rate == pytest.approx(PEAK / 2 * (1 + math.cos(math.pi * (seen - WARMUP) / (TOTAL - WARMUP))))
    assert rates[1][WARMUP + BATCH] == PEAK
    # It ends where it should: the last update is one batch from zero, not zero long before, nor far from it.
    assert 0 < rates[1][TOTAL] < 0.01 * PEAK
    assert rates[1][TOTAL] == min(rate for images, rate in rates[1].items() if images > WARMUP)
