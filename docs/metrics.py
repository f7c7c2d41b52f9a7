"""Write the page of ``metrics.json``'s fields from the dataclasses that are its schema: ``python docs/metrics.py``."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from latent_medi.core.kinds import alternatives, hints, plain
from latent_medi.evaluation.results import METRICS_VERSION, Metrics
from latent_medi.evaluation.settings import EvaluateSettings

PAGE = Path(__file__).with_name("metrics.md")
_INTRODUCTION = f"""# The fields of metrics.json

Version {METRICS_VERSION}. `latent-medi evaluate` writes the file, `latent_medi.evaluation.results.read_metrics` reads
it into the dataclass `Metrics` and refuses a file with other fields. This page is made from the dataclasses:
`python docs/metrics.py`. A field of type "… or null" may be absent. If an earlier version wrote the file, run
`latent-medi evaluate` again; the feature cache makes it quick.
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", object: "any JSON"}
_WORDS |= {types.NoneType: "null", Any: "any JSON"}


def page() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    for record in _records(Metrics, []):
        title = "The file" if record is Metrics else record.__name__
        own = (record.__doc__ or "").partition("Args:")[0]
        texts = described(record)
        rows = [f"| `{n}` | {_type(a)} | {texts.get(n, '')} |" for n, a in hints(record).items()]
        table = "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])
        parts.append(f"## {title}\n\n{textwrap.fill(' '.join(own.split()), 120, break_on_hyphens=False)}\n\n{table}\n")
    return "\n".join(parts)


def _records(record: type, found: list[type]) -> list[type]:
    """A dataclass and those within it, each once."""
    if record in found or record is EvaluateSettings:
        return found
    found.append(record)
    for annotation in hints(record).values():
        for inner in _within(annotation):
            _records(inner, found)
    return found


def _within(annotation: Any) -> list[type]:
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    return [inner for part in typing.get_args(annotation) for inner in _within(part)]


def _type(annotation: Any) -> str:
    kinds = alternatives(annotation)
    if len(kinds) > 1:
        return " or ".join(map(_type, kinds))
    kind = plain(annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is EvaluateSettings:
        return "the settings of `evaluate`"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if origin is typing.Literal:
        return " or ".join(f'"{word}"' for word in inner)
    if origin is list:
        return f"list of: {_type(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type, inner))}]"
    if origin is dict:
        return f"by name: {_type(inner[1])}"
    return _WORDS[kind]


def described(record: type) -> dict[str, str]:
    """What docstrings say of a dataclass's fields, those that it extends included."""
    found: dict[str, str] = {}
    for owner in reversed(record.__mro__):
        text = (owner.__doc__ or "").partition("Args:")[2] if dataclasses.is_dataclass(owner) else ""
        names: list[str] = []
        for line in map(str.strip, text.splitlines()):
            if start := re.match(r"((?:\w+, )*\w+): (.*)", line):
                names = start[1].split(", ")
                found |= dict.fromkeys(names, start[2])
            elif line:
                found |= {name: f"{found[name]} {line}" for name in names}
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
