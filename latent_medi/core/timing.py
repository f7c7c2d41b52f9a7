"""Timing of work in batches, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

_MOST_REPEATS = 1000


def seconds_per_item(work: Callable[[int], None], most: int, budget: float = 3.0) -> float:
    """Seconds per item of work that takes a batch.

    A single item comes first, so that the largest batch that the budget allows can be chosen; a first batch is not
    counted where the budget allows a second.

    Args:
        work: Given a number of items, does them and returns once they are done.
        most: The largest batch.
        budget: Seconds that the timing may take, apart from the first two single items.
    """
    work(1)  # the first call of anything is slow
    start = time.perf_counter()
    work(1)
    one = time.perf_counter() - start
    count = max(1, min(most, int(budget / 2 / max(one, 1e-9))))
    if count == 1:
        return one
    start = time.perf_counter()
    work(count)
    first = time.perf_counter() - start
    repeats = min(_MOST_REPEATS, int((budget - first) / max(first, 1e-9)))
    if repeats < 1:
        return first / count
    start = time.perf_counter()
    for _ in range(repeats):
        work(count)
    return (time.perf_counter() - start) / (repeats * count)
