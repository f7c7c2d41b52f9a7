"""A run killed anywhere and started again by the same command gives the unbroken run, for real processes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from cluster_parts import (
    ALONE,
    LONGEST,
    assert_same_bits,
    free_port,
    images_logged,
    images_saved,
    kill,
    launcher,
    losses,
    relative_distance,
    start,
    wait_until,
)
from cluster_parts import SMALL as MODEL

BATCH, STEPS = 8, 200


def arguments(tiny: Path, out: Path) -> list[str]:
    where = [f"data={tiny / 'data'}", f"latents={tiny / 'latents'}", f"out={out}"]
    run = [f"max_steps={STEPS}", f"global_batch={BATCH}", f"log_every_images={BATCH}"]
    return ["train.py", "--config", "demo/medi", *where, *run, f"checkpoint_every_images={2 * BATCH}", *MODEL]


def finish(words: list[str], errors: Path) -> None:
    assert start(words, errors).wait(timeout=LONGEST) == 0, errors.read_text()[-4000:]


def half_written(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".tmp-*"))


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody disturbs."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish([*ALONE, *arguments(tiny, out)], out.parent / "errors")
    assert len(losses(out)) == STEPS
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_ten_kills_change_no_bit(seed: int, tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    out, errors = tmp_path / "run", tmp_path / "errors"
    words = [*ALONE, *arguments(tiny, out)]
    reached, torn = 0, 0
    for number in range(10):
        process = start(words, errors)
        target = (20 * number + draw.randrange(5, 16)) * BATCH  # one in each tenth of the run
        wait_until(lambda: images_logged(out) >= target, process, errors)  # noqa: B023
        if number % 2:  # while a checkpoint is being written
            wait_until(lambda: half_written(out), process, errors, every=0)
        time.sleep(draw.uniform(0, 0.02))
        kill(process)
        torn += bool(half_written(out))
        assert not (out / "model").exists()
        assert images_saved(out) > reached  # it went on from where it was, and came further
        reached = images_saved(out)
    assert torn >= 2
    finish(words, errors)
    assert_same_bits(unbroken, out)
    assert not half_written(out)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resumed_by_another_number_of_processes(
    before: int, after: int, tiny: Path, unbroken: Path, tmp_path: Path
) -> None:
    out, errors = tmp_path / "run", tmp_path / "errors"

    def words(processes: int) -> list[str]:
        return [*(ALONE if processes == 1 else launcher(processes, free_port())), *arguments(tiny, out)]

    process = start(words(before), errors)
    wait_until(lambda: images_logged(out) >= 70 * BATCH, process, errors)
    kill(process)
    assert 60 * BATCH <= images_saved(out) < 190 * BATCH
    finish(words(after), errors)
    for part in ("model.safetensors", "model/unet"):
        assert relative_distance(unbroken, out, part) <= 1e-5
    ours, theirs = losses(unbroken), losses(out)
    assert ours.keys() == theirs.keys()
    for images, (loss, rate, _) in ours.items():
        assert rate == theirs[images][1]
        assert abs(float(loss) - float(theirs[images][0])) <= 1e-5
    assert ours != theirs  # the sums were taken in another order
