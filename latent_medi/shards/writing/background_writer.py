"""Shards written by a thread while a device makes the next patches: encoding images takes as long as making them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

from latent_medi.shards.writing.patch import Patch

_WHOLE, _OVER = object(), object()


class _GivenUp(Exception):
    """No more patches come for a shard that is being written."""


def write_behind(
    shards: Iterable[tuple[int, Iterable[Patch]]], write: Callable[[int, Iterator[Patch]], object], room: int
) -> None:
    """Have shards written by a thread, in their order, while the caller's thread makes their patches.

    If making them ends early, whatever the reason, the shards that are whole are written before it is told, and the one
    that is not is given up. If writing fails, no more patches are made.

    Args:
        shards: Number and patches of each; asked for in the caller's thread, where signals arrive.
        write: Writes a shard, as :func:`latent_medi.shards.writing.writer.write_shard` does.
        room: Patches that may wait to be written, at least 1; then the making of more waits.

    Raises:
        BaseException: What making or writing raised; both did: what writing did.
    """
    waiting: Queue[Any] = Queue(room)
    failed: list[BaseException] = []

    def patches() -> Iterator[Patch]:
        while (item := waiting.get()) is not _WHOLE:
            if item is _OVER:
                raise _GivenUp
            yield item

    def work() -> None:
        try:
            while (number := waiting.get()) is not _OVER:
                write(number, patches())
        except _GivenUp:
            return
        except BaseException as error:
            failed.append(error)
            while waiting.get() is not _OVER:  # or who makes them would wait for room for ever
                pass

    thread = Thread(target=work, name="shards", daemon=True)
    thread.start()
    try:
        for item in _in_turn(shards):
            if failed:
                break
            waiting.put(item)
    finally:
        waiting.put(_OVER)
        thread.join()
        if failed:
            raise failed[0]


def _in_turn(shards: Iterable[tuple[int, Iterable[Patch]]]) -> Iterator[Any]:
    for number, patches in shards:
        yield number
        yield from patches
        yield _WHOLE
