"""JSON with one value of another type, or one key less: what a file of another program, or an edited one, may hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

OTHERS = (None, True, 7, -3, 0.5, "x", "../x", [], {}, [None], [[1, "x"]], {"x": {"y": 1}}, 10**30, "é" * 300)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, entry in inner for place in places(entry, (*at, key)))]


def changes(value: Any) -> st.SearchStrategy[tuple[tuple[Any, ...], Any]]:
    """(where, what to put there), where ``...`` stands for leaving it out."""
    at = st.sampled_from(places(value))
    return at.flatmap(lambda place: st.tuples(st.just(place), st.sampled_from((..., *_others(value, place)))))


def _others(value: Any, place: tuple[Any, ...]) -> list[Any]:
    """What is not of the type that is there, and a number beyond all bounds: another number can be meant."""
    for key in place:
        value = value[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [o for o in OTHERS if o == 10**30 or not (type(o) is type(value) or (number and type(o) in (int, float)))]


def changed(value: Any, change: tuple[tuple[Any, ...], Any]) -> Any:
    """A copy with one change of :func:`changes`."""
    (*outer, last), other = change[0] or [None], change[1]
    if last is None:
        return None if other is ... else other
    value = copy.deepcopy(value)
    inner = value
    for key in outer:
        inner = inner[key]
    if other is ...:
        del inner[last]
    else:
        inner[last] = other
    return value


@contextmanager
def with_change(path: Path, change: tuple[tuple[Any, ...], Any]) -> Iterator[None]:
    """The file so changed; put right afterwards."""
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps(changed(json.loads(whole), change)))
        yield
    finally:
        path.write_bytes(whole)
