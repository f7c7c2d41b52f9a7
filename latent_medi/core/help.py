"""The help of a verb: its settings with what they take and their defaults, as their dataclass documents them.

A settings class may name its most used settings in ``COMMON``, with blanks between them, which then come first, and
give whole commands in the tuple ``EXAMPLES``, which come last.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.kinds import (
    Range,
    arguments,
    find,
    hints,
    is_union,
    known_keys,
    marks,
    origin,
    plain,
    settings_in,
    wanted,
)
from latent_medi.core.paths import PATH

_COLUMN = 30  # where the texts of settings begin
_EVERY_VERB = {
    "--config NAME": "Packaged configuration, such as demo/medi, or YAML file. May be repeated; later ones win.",
    "--json FILE": "Also write the result as JSON.",
    "--help SETTING": "All that there is to say of a setting, or of a group of settings.",
}


def setting_texts(settings_class: type) -> dict[str, str]:
    """What the docstrings of a settings class and of the classes it inherits from say of each setting."""
    found: dict[str, str] = {}
    for owner in reversed(settings_class.__mro__):
        _, _, entries = inspect.cleandoc(owner.__dict__.get("__doc__") or "").partition("Args:\n")
        entries = re.split(r"^\S", entries, maxsplit=1, flags=re.MULTILINE)[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", entries, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("``", "`")
    return found


def verb_help(settings_class: type, command: str) -> str:
    """The help of a verb: a line or two for each setting, the common ones first, then two examples.

    Args:
        settings_class: Its settings.
        command: The words that begin the command, such as ``latent-medi train``.
    """
    groups = [name for name, annotation in hints(settings_class).items() if settings_in(annotation) is not None]
    common = [name for name in getattr(settings_class, "COMMON", "").split() if name not in groups]
    others = [name for name in hints(settings_class) if name not in (*common, *groups)]
    if not common:
        common, others = others, []
    texts = setting_texts(settings_class)
    parts = [
        f"usage: {command} [--config NAME] [key=value …] [--json FILE]",
        _wrapped(_about(settings_class)),
        _section("Common settings" if others else "Settings", (_entry(settings_class, name) for name in common)),
        _section("Other settings", (_entry(settings_class, name, lines=1) for name in others)),
        _section("Groups of settings", ((f"--{name}.…", _cut(texts.get(name, ""), 2)) for name in groups)),
        _section("Of every verb", _EVERY_VERB.items()),
        "\n".join(["Examples:", *(f"  {example}" for example in getattr(settings_class, "EXAMPLES", ()))]),
    ]
    return "\n\n".join(part for part in parts if part and part != "Examples:")


def setting_help(settings_class: type, command: str, dotted: str) -> str:
    """All that is documented of one setting, or of every setting of a group.

    Raises:
        UserError: There is no such setting.
    """
    found = find(settings_class, dotted)
    if found is None:
        raise UserError(
            f"{command}: unknown setting {dotted!r}; {nearest(dotted, known_keys(settings_class))}.",
            f"`{command} --help` lists them.",
        )
    keys, annotation = found
    owner, at = _documented(settings_class, keys)
    name = ".".join(keys)
    text = _wrapped(setting_texts(owner).get(keys[at], ""))
    group = settings_in(annotation)
    if group is None and origin(annotation) is dict and (group := settings_in(arguments(annotation)[1])) is not None:
        name += ".NAME"
    if group is not None:
        entries = (_entry(group, inner, f"{name}.", lines=0) for inner in hints(group))
        return "\n\n".join([f"--{name}.…", text, _section("Settings", entries)])
    default = "" if keys[at + 1 :] else _default(owner, keys[at])  # an entry of a mapping has none
    takes = f"Takes {wanted(annotation)}." + (f" Default: {default}." if default else "")
    return "\n\n".join([f"--{name} {_takes(annotation)}", text, _wrapped(takes)])


def _documented(settings_class: type, keys: Sequence[str]) -> tuple[type, int]:
    """The class whose docstring has a setting, and which of its keys is the name there: the keys after it, if any, are
    an entry of a mapping.
    """
    owner, at = settings_class, 0
    while True:
        annotation, after = hints(owner)[keys[at]], at + 1
        group = settings_in(annotation)
        if group is None and origin(annotation) is dict:
            group, after = settings_in(arguments(annotation)[1]), at + 2
        if group is None or after >= len(keys):
            return owner, at
        owner, at = group, after


def _about(settings_class: type) -> str:
    return " ".join(inspect.cleandoc(settings_class.__doc__ or "").partition("\n\n")[0].split())


def _section(title: str, entries: Any) -> str:
    lines = [line for name, text in entries for line in _lines(name, text)]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _lines(name: str, text: str) -> Iterator[str]:
    first, *rest = textwrap.wrap(text, max(30, _width() - _COLUMN), break_long_words=False) or [""]
    yield (
        f"  {name:<{_COLUMN - 3}} {first}".rstrip() if len(name) < _COLUMN - 2 else f"  {name}\n{' ' * _COLUMN}{first}"
    )
    yield from (" " * _COLUMN + line for line in rest)


def _entry(settings_class: type, name: str, prefix: str = "", lines: int = 2) -> tuple[str, str]:
    """A setting's name with what it takes, and its text cut to a number of lines (0: whole), with its default."""
    annotation = hints(settings_class)[name]
    text = setting_texts(settings_class).get(name, "")
    required = name in _required(settings_class)
    default = "" if required else _default(settings_class, name)
    end = " Required." if required else f" [{default}]" if default else ""
    if lines:
        text = _cut(text, lines, len(end))
    return f"--{prefix}{name} {_takes(annotation)}", text + end


def _cut(text: str, lines: int, less: int = 0) -> str:
    """The first sentence of a text, cut to a number of lines that are ``less`` characters shorter in all."""
    sentence = re.split(r'(?<=[.])\s+(?=[A-Z0-9"{`])', text, maxsplit=1)[0]
    room = lines * (_width() - _COLUMN - 4) - less
    return textwrap.shorten(sentence, max(room, 30), placeholder=" …")


def _required(settings_class: type) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(settings_class) if f.default is f.default_factory is missing}


def _default(settings_class: type, name: str) -> str:
    """The default as it is written on the command line; ``""`` for none and for what is empty."""
    field = next(f for f in dataclasses.fields(settings_class) if f.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value in (None, "", [], {}) or value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return ", ".join(value)
    if isinstance(value, (bool, str)):
        return str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return json.dumps(value).replace('"', "") if isinstance(value, dict) else str(value)


def _takes(annotation: Any) -> str:
    """A word or two for what a setting takes."""
    kind, inner = plain(annotation), arguments(annotation)
    if is_union(annotation):
        return "VALUE"
    if origin(annotation) is list:
        item = _takes(inner[0])
        return "[…]" if item.startswith(("[", "NAME=")) else f"{item} …"
    if origin(annotation) is tuple:
        return "[" + ", ".join(map(_takes, inner)) + "]"
    if origin(annotation) is dict:
        return "NAME=" + ("[…]" if origin(inner[1]) is list else _takes(inner[1]).partition(" ")[0])
    if inner:
        words = "|".join(filter(None, map(str, inner)))
        return words if len(words) < 16 else "WORD"
    if PATH in marks(annotation):
        return "PATH"
    limits = [mark for mark in marks(annotation) if isinstance(mark, Range)]
    share = bool(limits) and limits[0].low == 0 and limits[0].high == 1
    return {int: "N", float: "0…1" if share else "X", bool: "true|false", str: "TEXT"}.get(kind, "VALUE")


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size((100, 24)).columns))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _width(), break_long_words=False, break_on_hyphens=False)
