"""Shards that a thread writes: making goes on meanwhile, nothing whole is lost, and whoever fails is heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latent_medi.core.errors import Preempted, UserError
from latent_medi.shards.writing.background_writer import write_behind
from latent_medi.shards.writing.records import finished_shards
from latent_medi.shards.writing.writer import Patch, write_shard

LONG = 60


def patch(key: str) -> Patch:
    image = np.random.default_rng(len(key)).integers(0, 256, (8, 8, 3), np.uint8)
    return Patch(key, image, key, key, 0, 0, 0.5, {"class": "a"}, "synthetic")


def test_the_next_patches_are_made_while_one_is_written() -> None:
    made, taken, further = [0], [0], threading.Event()
    most = [0]

    def making(shard: int) -> Iterator[Patch]:
        for i in range(12):
            made[0] += 1
            if made[0] == 4:
                further.set()
            most[0] = max(most[0], made[0] - taken[0])
            yield patch(f"p{shard}-{i}")

    def slow(number: int, patches: Iterator[Patch]) -> None:
        for _ in patches:
            taken[0] += 1
            assert further.wait(LONG), "nothing was made while the first patch was written"
            time.sleep(0.005)

    write_behind(((n, making(n)) for n in range(3)), slow, room=5)
    assert made == taken == [36]
    assert most[0] <= 5 + 2  # beside those that wait: one in each hand


def test_shards_come_in_order_and_with_the_bytes_that_one_thread_writes(tmp_path: Path) -> None:
    def shard(number: int) -> list[Patch]:
        return [patch(f"p{number}-{i}") for i in range(number + 1)]

    order: list[int] = []

    def write(number: int, patches: Iterator[Patch]) -> None:
        order.append(number)
        write_shard(tmp_path / "behind", number, patches)

    write_behind(((n, shard(n)) for n in (4, 0, 2)), write, room=2)
    assert order == [4, 0, 2]
    for number in order:
        write_shard(tmp_path / "alone", number, shard(number))
        name = f"data/part-{number:06d}.tar"
        assert (tmp_path / "behind" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_an_error_of_the_writer_ends_the_making_with_its_own_message(tmp_path: Path) -> None:
    made = []

    def making(number: int) -> Iterator[Patch]:
        for i in range(1000):
            made.append(number)
            yield patch("twice" if number and i > 3 else f"p{i}")

    with pytest.raises(UserError, match="Two patches have the key 'twice'"):
        write_behind(((n, making(n)) for n in (0, 1, 2)), lambda n, p: write_shard(tmp_path, n, p), room=3)
    assert 2 not in made
    assert list(finished_shards(tmp_path)) == [0]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["part-000000.tar"]
    assert not [t for t in threading.enumerate() if t.name == "shards"]


@pytest.mark.parametrize("error", [Preempted("told to stop"), KeyboardInterrupt(), UserError("no memory")])
def test_what_is_whole_is_written_when_the_making_ends_early(tmp_path: Path, error: BaseException) -> None:
    ended = threading.Event()

    def making(number: int) -> Iterator[Patch]:
        yield patch(f"p{number}-0")
        if number == 2:
            ended.set()
            raise error
        yield patch(f"p{number}-1")

    def late(number: int, patches: Iterator[Patch]) -> None:
        assert ended.wait(LONG)  # everything is still waiting when the making ends
        write_shard(tmp_path, number, patches)

    with pytest.raises(type(error)):
        write_behind(((n, making(n)) for n in range(4)), late, room=100)
    assert sorted(finished_shards(tmp_path)) == [0, 1]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["part-000000.tar", "part-000001.tar"]


def test_of_two_errors_the_writer_s_is_told() -> None:
    failed = threading.Event()

    def making() -> Iterator[Patch]:
        yield patch("p")
        assert failed.wait(LONG)
        raise Preempted("SIGTERM")

    def full(number: int, patches: Iterator[Patch]) -> None:
        next(patches)
        failed.set()
        raise UserError("The disk is full.")

    with pytest.raises(UserError, match="The disk is full"):
        write_behind([(0, making())], full, room=1)
