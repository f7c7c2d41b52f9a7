"""What the site adds to its pages as mkdocs builds them: tables of settings, and links to files of the repository.

A line ``<!-- settings: latent_medi.planning.settings.PlanSettings -->`` becomes the table of that dataclass's settings,
made from its annotations and its docstring, as ``latent-medi VERB --help`` is.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from metrics import described

from latent_medi.core.kinds import Range, alternatives, hints, is_mapping, marks, plain, settings_in

_REPOSITORY = "https://github.com/latent-medi/latent-medi/blob/main/"
_SETTINGS = re.compile(r"^<!-- settings: ([\w.]+)\.(\w+) -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:latent_medi|shards|configs|benchmarks|tests|requirements)/[^)#]*)(#[^)]*)?\)")
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    text = _SETTINGS.sub(lambda found: settings_tables(getattr(importlib.import_module(found[1]), found[2])), markdown)
    return _OUTSIDE.sub(lambda found: f"]({_REPOSITORY}{found[1]}{found[2] or ''})", text)


def settings_tables(settings: type) -> str:
    """Markdown: a table of a dataclass's settings, then one for each group of settings within it."""
    tables, groups = [_table(settings, "")], list(_groups(settings, ""))
    for name, inner in groups:
        own = " ".join((inner.__doc__ or "").partition("Args:")[0].split())
        tables.append(f"**`{name}`**: {own}\n\n{_table(inner, name + '.')}")
    return "\n\n".join(tables)


def _groups(settings: type, prefix: str) -> typing.Iterator[tuple[str, type]]:
    for name, annotation in hints(settings).items():
        inner = settings_in(annotation)
        if inner is not None:
            yield prefix + name, inner
            yield from _groups(inner, f"{prefix}{name}.")


def _table(settings: type, prefix: str) -> str:
    meanings, rows = described(settings), []
    for field in dataclasses.fields(settings):
        annotation = hints(settings)[field.name]
        if settings_in(annotation) is not None:
            continue
        meaning = meanings.get(field.name, "").replace("``", "`").replace("|", r"\|")
        rows.append(f"| `{prefix}{field.name}` | {_type(annotation)} | {_default(field)} | {meaning} |")
    return "\n".join(["| setting | takes | default | meaning |", "|---|---|---|---|", *rows]) if rows else ""


def _type(annotation: Any) -> str:
    kinds = alternatives(annotation)
    if len(kinds) > 1:
        return " or ".join(dict.fromkeys(map(_type, kinds)))
    limits = "".join(f", {mark}" for mark in marks(annotation) if isinstance(mark, Range))
    kind = plain(annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if is_mapping(annotation):
        return f"{_type(inner[1])}, by name"
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    return _WORDS.get(kind, "text") + limits


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "needed"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    if value is None or value in ("", [], {}, ()):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
