"""Converting what people write to the types of a settings dataclass, and refusing what a setting does not accept.

A :data:`Partial` holds the settings that a file or command gives, nested like the dataclasses, with converted values.
Partials of several files and of the command line are merged, then :func:`make` creates the settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.kinds import (
    Range,
    arguments,
    hints,
    is_text,
    is_union,
    known_keys,
    marks,
    origin,
    plain,
    settings_in,
    shown,
    takes_nothing,
    wanted,
)
from latent_medi.core.paths import PATH, escaped, expand
from latent_medi.core.yaml_text import one_quoted, read_yaml

S = TypeVar("S")

Partial = dict[str, Any]
"""Some settings of a dataclass by name; settings within settings are mappings."""

_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class _Place:
    """Where a value comes from.

    Args:
        where: The file or command.
        name: The dotted name of the setting.
    """

    where: str
    name: str

    def inside(self, key: str) -> _Place:
        return _Place(self.where, f"{self.name}.{key}")

    def at(self, position: int) -> _Place:
        return _Place(self.where, f"{self.name}[{position}]")

    def refusal(self, value: Any, annotation: Any, hint: str = "") -> UserError:
        if not hint and value is None and is_text(annotation):
            hint = f'If you mean the word null, quote it: {self.name.rpartition(".")[2]}: "null".'
        return UserError(f"{self.where}: {self.name} is {shown(value)}; it takes {wanted(annotation)}.", hint)


def unknown(settings_class: type, dotted: str, where: str, prefix: str = "", hint: str = "") -> UserError:
    """The error for a key that the settings do not have: it names the new key of a renamed one, else the nearest."""
    name, known = prefix + dotted, known_keys(settings_class, prefix)
    if (new := _renamed(settings_class, dotted)) is None:
        return UserError(f"{where}: unknown setting {name!r}; {nearest(name, known)}.", hint)
    hint = new if " " in new else f"Write {prefix}{new}."
    return UserError(f"{where}: the setting {name!r} was {'changed' if ' ' in new else 'renamed'}.", hint)


def _renamed(settings_class: type, dotted: str) -> str | None:
    """What a table of renamed settings says of a key: its new name or a sentence; ``None`` if no table has it."""
    head, dot, rest = dotted.replace("-", "_").partition(".")
    table: Mapping[str, str] = getattr(settings_class, "RENAMED", {})
    if head in table:
        return table[head] if " " in table[head] else f"{table[head]}{dot}{rest}"
    inner = settings_in(hints(settings_class).get(head))
    new = _renamed(inner, rest) if inner is not None else None
    return new if new is None or " " in new else f"{head}.{new}"


def refuse_renamed_words(settings_class: type, keys: Sequence[str], value: Any, where: str, prefix: str = "") -> None:
    """Refuse a word, or a list that has one, which a table of renamed settings lists as ``name=word``.

    Raises:
        UserError: There is one; the error names the new word.
    """
    *parents, name = keys
    owner: type | None = settings_class
    for parent in parents:
        owner = settings_in(hints(owner).get(parent)) if owner is not None else None
    table: Mapping[str, str] = getattr(owner, "RENAMED", {})
    for word in value if isinstance(value, (list, tuple)) else [value]:
        if (new := table.get(f"{name}={word}")) is not None:
            hint = new if " " in new else f"Write {prefix}{'.'.join([*parents, new])}."
            raise UserError(f"{where}: {prefix}{'.'.join(keys)} is {word!r}, which was renamed.", hint)


def check(settings: Any) -> None:
    """Refuse settings with a word that is none of a setting's choices, or a number that is out of its range.

    Raises:
        UserError: There is one; the error names the setting, its value and what it accepts.
    """
    where = type(settings).__name__
    for name, annotation in hints(type(settings)).items():
        value = getattr(settings, name)
        refuse_renamed_words(type(settings), [name], value, where)
        _check(annotation, value, _Place(where, name))


def _check(annotation: Any, value: Any, place: _Place) -> None:
    kind, inner = origin(annotation), arguments(annotation)
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(inner[0], item, place.at(i))
    elif kind is dict and isinstance(value, Mapping):
        for key, item in value.items():
            _check(inner[1], item, place.inside(str(key)))
    elif value is not None or not takes_nothing(annotation):
        _refuse(annotation, value, place)


def _refuse(annotation: Any, value: Any, place: _Place) -> None:
    """Refuse what is none of the choices, or no number within the range.

    Raises:
        UserError: It is.
    """
    if origin(annotation) is Literal and value not in arguments(annotation):
        hint = _near(value, arguments(annotation)) if isinstance(value, str) else ""
        raise place.refusal(value, annotation, hint)
    for mark in marks(annotation):
        if isinstance(mark, Range) and not (isinstance(value, Real) and float(value) in mark):
            raise place.refusal(value, annotation)


def partial(settings_class: type, values: Mapping[Any, Any], where: str, prefix: str = "") -> Partial:
    """Values converted to the types of their settings, paths expanded.

    Args:
        settings_class: The dataclass.
        values: As read by :func:`~latent_medi.core.yaml_text.read_yaml`, or given by a program.
        where: The file or command, for messages.
        prefix: Prefix of the settings' names in messages.

    Raises:
        UserError: An unknown key or a value of the wrong type.
    """
    known, found = hints(settings_class), {}
    empty = {f.name for f in dataclasses.fields(settings_class) if f.default == "" or f.default_factory in (list, dict)}
    for key, value in values.items():
        if key not in known:
            raise unknown(settings_class, str(key), where, prefix)
        if value is None and key in empty and not takes_nothing(known[key]):
            continue  # `key:` or `key: null` of a setting that is empty by default
        refuse_renamed_words(settings_class, [str(key)], value, where, prefix)
        found[str(key)] = convert(known[key], value, where, f"{prefix}{key}")
    return found


def convert(annotation: Any, value: Any, where: str, name: str) -> Any:
    """A value converted to the type of its setting; settings within settings stay mappings.

    Raises:
        UserError: The setting does not accept the value.
    """
    return _convert(annotation, value, _Place(where, name))


def convert_word(annotation: Any, text: str, where: str, name: str) -> Any:
    """As :func:`convert`, for a word of the command line. A text is taken literally, unless all of it is quoted.

    Raises:
        UserError: As :func:`convert`; or the word is no valid YAML.
    """
    if is_union(annotation):
        value = _guessed(text)
        is_text_value = isinstance(value, (str, bool, dict)) or value is None
        return convert(annotation, _unquoted(text) if is_text_value else value, where, name)
    if is_text(annotation):
        if takes_nothing(annotation) and text in ("null", "~"):
            return None
        if text == "null" and PATH in marks(annotation):  # write ./null for a folder of that name
            return ""
        return convert(annotation, _unquoted(text), where, name)
    if text == "" and annotation is not Any:
        raise _Place(where, name).refusal("", annotation)
    value = _guessed(text) if annotation is Any else read_yaml(text, f"{where}: {name}={text[:60]}")
    return convert(annotation, value, where, name)


def _guessed(text: str) -> Any:
    try:
        return read_yaml(text, "") if text else ""
    except UserError:
        return text


def _unquoted(text: str) -> str:
    try:
        inner = json.loads(text) if text.startswith('"') else None  # JSON allows characters that YAML refuses
    except (ValueError, RecursionError):
        inner = None
    inner = inner if isinstance(inner, str) else one_quoted(text)
    return text if inner is None else inner


def _convert(annotation: Any, value: Any, place: _Place) -> Any:
    if takes_nothing(annotation) and (value is None or (value in ("Null", "NULL") and not is_text(annotation))):
        return None
    if (inner := settings_in(annotation)) is not None:
        if isinstance(value, inner):
            return value
        if not isinstance(value, Mapping):
            raise place.refusal(value, annotation, getattr(inner, "RENAMED", {}).get("", ""))
        return partial(inner, value, place.where, f"{place.name}.")
    kind = plain(annotation)
    if kind is Any:
        return value
    if is_union(annotation):
        return _convert_to_member(annotation, value, place)
    if is_text(annotation):
        text = _text(value)
        if text is None:
            raise place.refusal(value, annotation)
        _refuse(annotation, text, place)
        return expand(text, f"{place.where}: {place.name}") if PATH in marks(annotation) else text
    if kind in (int, float, bool):
        made = {int: _whole, float: _number, bool: _truth}[kind](value)
        if made is None:
            raise place.refusal(value, annotation)
        _refuse(annotation, made, place)
        return made
    items = arguments(annotation)
    if origin(annotation) in (list, tuple):
        if not isinstance(value, (list, tuple)) or (origin(annotation) is tuple and len(value) != len(items)):
            raise place.refusal(value, annotation)
        return [_convert(items[0], item, place.at(i)) for i, item in enumerate(value)]
    if origin(annotation) is dict:
        if not isinstance(value, Mapping):
            raise place.refusal(value, annotation)
        return {str(key): _convert(items[1], item, place.inside(str(key))) for key, item in value.items()}
    raise TypeError(f"{place.name} has a type that no setting may have: {annotation}")


def _convert_to_member(annotation: Any, value: Any, place: _Place) -> Any:
    """A value converted to the member of a union that it fits: a number stays a number."""
    members = arguments(annotation)
    if float in members and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    for member in members:
        if member is not float and (origin(member) is list) == isinstance(value, list):
            return _convert(member, value, place)
    raise place.refusal(value, annotation)


def _text(value: Any) -> str | None:
    """A scalar as text, as it was written; ``None`` for another value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return str(value) if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__") else None


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if re.fullmatch(r"[+-]?(0|[1-9][0-9]{0,30})", text):
            return int(text)
        if re.fullmatch(r"[+-]?0[0-9]+", text):  # ambiguous: 010 is 8 in some languages
            return None
        value = _number(text)
    whole = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
    return int(value) if whole else None


def _number(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\.(inf|nan)", value.strip().lower()):
        value = value.strip().lower().replace(".", "")
    try:
        return None if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        return None


def _truth(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    return True if word in _YES else False if word in _NO else None


def _near(text: str, words: Sequence[str]) -> str:
    found = nearest(text, words)
    return f"{found[0].upper()}{found[1:]}." if found.startswith("closest") else ""


def make(settings_class: type[S], values: Mapping[str, Any], where: str) -> S:
    """Settings from a partial, with defaults for all others.

    Raises:
        UserError: A setting that has no default is missing.
    """
    fields = dataclasses.fields(settings_class)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if absent := [name for name in required if name not in values]:
        raise UserError(
            f"{where}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not given.",
            "Write " + " ".join(f"{name}=…" for name in absent) + "; --help explains each.",
        )
    known = hints(settings_class)
    return settings_class(**{name: _made(known[name], value, where) for name, value in values.items()})


def _made(annotation: Any, value: Any, where: str) -> Any:
    inner = settings_in(annotation)
    if inner is not None and origin(annotation) is not dict and isinstance(value, Mapping):
        return make(inner, value, where)
    if origin(annotation) is dict and isinstance(value, Mapping):
        return {key: _made(arguments(annotation)[1], item, where) for key, item in value.items()}
    return tuple(value) if origin(annotation) is tuple and isinstance(value, Sequence) else value


def written(settings_class: type, values: Mapping[str, Any]) -> Partial:
    """A partial to be written to a file: ``~`` and ``$`` in paths are escaped, so that reading gives the same paths."""
    known = hints(settings_class)
    return {name: _written(known[name], value) for name, value in values.items()}


def _written(annotation: Any, value: Any) -> Any:
    if (inner := settings_in(annotation)) is not None:
        return written(inner, value) if isinstance(value, Mapping) else value
    if isinstance(value, str) and PATH in marks(annotation):
        return escaped(value)
    if isinstance(value, list) and origin(annotation) is list:
        return [_written(arguments(annotation)[0], item) for item in value]
    if isinstance(value, Mapping) and origin(annotation) is dict:
        return {key: _written(arguments(annotation)[1], item) for key, item in value.items()}
    return value
