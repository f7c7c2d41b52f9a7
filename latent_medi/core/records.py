"""Results as dataclasses, and the same as JSON.

A result's dataclass is its schema: :func:`encode` writes it, :func:`decode` reads it and refuses what does not fit.
Fields may be texts, numbers, truth values, ``Literal``, dataclasses, lists, tuples, mappings with free keys, unions of
these, and ``object`` for JSON of another program.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from latent_medi.core.kinds import alternatives, hints, plain, shown

R = TypeVar("R")

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
_WORDS |= {list: "a list", tuple: "a list", dict: "an object"}


class Mismatch(ValueError):
    """A JSON value that does not fit its field; the message names the field, the value and what it takes."""


def encode(value: Any) -> Any:
    """A dataclass, or a structure of dataclasses, as JSON.

    A field that is ``None`` and has that default is left out. NumPy's arrays and numbers become Python's. NaN and
    infinity become null, since JSON has neither.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {f.name: encode(v) for f, v in fields if v is not None or f.default is not None}
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return encode(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def decode(record: type[R], value: Any, at: str = "") -> R:
    """The dataclass that JSON describes. Fields with a default may be absent.

    Args:
        record: The dataclass.
        value: As JSON gives it.
        at: Where the value is in the file, for messages.

    Raises:
        Mismatch: A field is missing, unknown or of another type.
    """
    return typing.cast(R, _decode(record, value, at))


def _decode(annotation: Any, value: Any, at: str) -> Any:
    kinds = alternatives(annotation)
    if len(kinds) > 1:
        problems = []
        for kind in kinds:
            try:
                return _decode(kind, value, at)
            except Mismatch as problem:
                problems.append((_depth(problem), problem))
        raise max(problems, key=lambda found: found[0])[1]
    kind = plain(annotation)
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (object, Any):
        return value
    if dataclasses.is_dataclass(origin):
        return _decode_fields(origin, value, at)
    if origin is Literal:
        if value in inner:
            return value
        raise _mismatch(at, value, "one of " + ", ".join(map(repr, inner)))
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return float(value)
        raise _mismatch(at, value, "a finite number")
    kinds = (list, tuple) if origin in (list, tuple) else (origin,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and origin is not bool):
        raise _mismatch(at, value, _WORDS[origin])
    if isinstance(value, dict):
        return {str(key): _decode(inner[1], entry, f"{at}.{key}" if at else str(key)) for key, entry in value.items()}
    if origin is list:
        return [_decode(inner[0], entry, f"{at}[{i}]") for i, entry in enumerate(value)]
    if origin is tuple:
        if inner[1:] == (...,):
            inner = inner[:1] * len(value)
        if len(value) != len(inner):
            raise _mismatch(at, value, f"a list of {len(inner)}")
        return tuple(
            _decode(each, entry, f"{at}[{i}]") for i, (each, entry) in enumerate(zip(inner, value, strict=True))
        )
    return value


def _decode_fields(record: Any, value: Any, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(at, value, "an object")
    known, prefix = hints(record), f"{at}." if at else ""
    if unknown := [name for name in value if name not in known]:
        raise Mismatch(f"{prefix}{unknown[0]} is unknown")
    for field in dataclasses.fields(record):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in value and not has_default:
            raise Mismatch(f"{prefix}{field.name} is missing")
    return record(**{name: _decode(known[name], entry, prefix + name) for name, entry in value.items()})


def _mismatch(at: str, value: Any, wanted: str) -> Mismatch:
    return Mismatch(f"{at or 'its content'} is {shown(value)}, not {wanted}")


def _depth(problem: Mismatch) -> int:
    """How deep in the file a problem is: of a union's, the deepest says most."""
    path = str(problem).split(" ", 1)[0]
    return path.count(".") + path.count("[")
