"""A thread that writes shards while a device generates the next patches; encoding takes as long as generating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

from latent_medi.shards.writing.patch import Patch

_WHOLE, _OVER = object(), object()


class _GivenUp(Exception):
    """The patches of a shard that is being written end early."""


def write_behind(
    shards: Iterable[tuple[int, Iterable[Patch]]], write: Callable[[int, Iterator[Patch]], object], room: int
) -> None:
    """Write shards in a thread, in their order, while the caller's thread generates their patches.

    If generating ends early, for any reason, the complete shards are written first, and the incomplete one is dropped.
    If writing fails, no more patches are generated.

    Args:
        shards: Number and patches of each; iterated in the caller's thread, where signals arrive.
        write: Writes a shard, as :func:`latent_medi.shards.writing.writer.write_shard` does.
        room: Most patches that wait to be written, at least 1; with more, generating pauses.

    Raises:
        BaseException: The error of generating or of writing; if both failed, that of writing.
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
            while waiting.get() is not _OVER:  # otherwise the caller would wait for room for ever
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
