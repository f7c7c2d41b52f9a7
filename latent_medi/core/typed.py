"""Values of settings dataclasses, from what people write.

A *partial* is a mapping of the settings that were given, nested like the dataclasses, with values of the right types.
Partials of several files and of the command line are merged, and :func:`make` makes the settings of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.kinds import (
    hints,
    is_text,
    kinds_of,
    known_keys,
    marks,
    may_be_text,
    one_of,
    plain,
    settings_in,
    shown,
    takes_nothing,
    wanted,
)
from latent_medi.core.paths import PATH, escaped, expand
from latent_medi.core.yaml_text import one_quoted, read_yaml

S = TypeVar("S")

_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class _Place:
    """Where a value was given.

    Args:
        where: The file or command.
        name: The setting, dotted.
    """

    where: str
    name: str

    def inside(self, key: str) -> _Place:
        return _Place(self.where, f"{self.name}.{key}")

    def at(self, position: int) -> _Place:
        return _Place(self.where, f"{self.name}[{position}]")

    def refusal(self, value: Any, annotation: Any, hint: str = "") -> UserError:
        if not hint and value is None and may_be_text(annotation):
            hint = f'If the word null is meant, quote it: {self.name.rpartition(".")[2]}: "null".'
        return UserError(f"{self.where}: {self.name} is {shown(value)}; it takes {wanted(annotation)}.", hint)


def unknown(settings_class: type, dotted: str, where: str, prefix: str = "", hint: str = "") -> UserError:
    """The refusal of a key that the settings do not have."""
    name, known = prefix + dotted, known_keys(settings_class, prefix)
    return UserError(f"{where}: unknown setting {name!r}; {nearest(name, known)}.", hint)


def partial(settings_class: type, values: Mapping[Any, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Given values as a partial, paths expanded.

    Args:
        settings_class: The dataclass.
        values: As :func:`~latent_medi.core.yaml_text.read_yaml` or a program gives them.
        where: How messages call what gave them.
        prefix: What stands before the names in messages.

    Raises:
        UserError: An unknown key or a value of the wrong type.
    """
    known, found = hints(settings_class), {}
    empty = {f.name for f in dataclasses.fields(settings_class) if f.default == "" or f.default_factory in (list, dict)}
    for key, value in values.items():
        if key not in known:
            raise unknown(settings_class, str(key), where, prefix)
        if value is None and key in empty and not takes_nothing(known[key]):
            continue  # `key:` or `key: null` for a setting that is empty unless it is given
        found[str(key)] = convert(known[key], value, where, f"{prefix}{key}")
    return found


def convert(annotation: Any, value: Any, where: str, name: str) -> Any:
    """One value as its setting takes it; settings within settings stay mappings.

    Raises:
        UserError: A value of the wrong type, which says what the setting takes.
    """
    return _convert(annotation, value, _Place(where, name))


def convert_word(annotation: Any, text: str, where: str, name: str) -> Any:
    """The same from a word of the command line. A text is taken as it stands, unless it is quoted as a whole.

    Raises:
        UserError: As :func:`convert`, or YAML that cannot be read.
    """
    kinds = kinds_of(annotation)
    if annotation is not Any and may_be_text(annotation):
        if takes_nothing(annotation) and text in ("null", "~"):
            return None
        if text == "null" and PATH in marks(annotation):  # a folder of that name is ./null
            return ""
        if all(map(is_text, kinds)):
            return convert(annotation, _unquoted(text), where, name)
        value = _guessed(text)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return convert(annotation, value if numeric or isinstance(value, list) else _unquoted(text), where, name)
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
        inner = json.loads(text) if text.startswith('"') else None  # JSON has characters that YAML refuses
    except (ValueError, RecursionError):
        inner = None
    inner = inner if isinstance(inner, str) else one_quoted(text)
    return text if inner is None else inner


def _convert(annotation: Any, value: Any, place: _Place) -> Any:
    kinds = kinds_of(annotation)
    if takes_nothing(annotation) and (value is None or (value in ("Null", "NULL") and not may_be_text(annotation))):
        return None
    inner = settings_in(annotation)
    if inner is not None:
        if isinstance(value, inner):
            return value
        if not isinstance(value, Mapping):
            raise place.refusal(value, annotation)
        return partial(inner, value, place.where, f"{place.name}.")
    if len(kinds) == 1:
        return _convert_one(kinds[0], value, place)
    if float in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    for kind in kinds:
        if kind is not float and (typing.get_origin(kind) is list) == isinstance(value, list):
            return _convert_one(kind, value, place)
    raise place.refusal(value, annotation)


def _convert_one(annotation: Any, value: Any, place: _Place) -> Any:
    kind, origin = plain(annotation), typing.get_origin(plain(annotation))
    if kind is Any:
        return value
    if kind is str or origin is Literal:
        text = _text(value)
        if text is None or (origin is Literal and text not in typing.get_args(kind)):
            raise place.refusal(value, annotation, _near(text, kind) if origin is Literal else "")
        return expand(text, f"{place.where}: {place.name}") if PATH in marks(annotation) else text
    if kind in (int, float, bool):
        made = {int: _whole, float: _number, bool: _truth}[kind](value)
        if made is None:
            raise place.refusal(value, annotation)
        return made
    if origin is list or origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or (origin is tuple and len(value) != len(inner)):
            raise place.refusal(value, annotation)
        return [_convert(inner[0], item, place.at(i)) for i, item in enumerate(value)]
    if origin is dict:
        inner = typing.get_args(kind)[1]
        if not isinstance(value, Mapping):
            raise place.refusal(value, annotation)
        return {str(key): _convert(inner, item, place.inside(str(key))) for key, item in value.items()}
    raise TypeError(f"{place.name} has a type that no setting may have: {annotation}")


def _text(value: Any) -> str | None:
    """A scalar as it is written: numbers and truth values were only made of texts that say just this."""
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
        if re.fullmatch(r"[+-]?0[0-9]+", text):  # 010 is 8 to some and 10 to others
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


def _near(text: str | None, literal: Any) -> str:
    found = nearest(text or "", typing.get_args(literal))
    return f"{found[0].upper()}{found[1:]}." if found.startswith("closest") else ""


def make(settings_class: type[S], values: Mapping[str, Any], where: str) -> S:
    """The settings of a partial, with defaults for the rest.

    Raises:
        UserError: A setting without a default is missing.
    """
    fields = dataclasses.fields(settings_class)  # type: ignore[arg-type]
    absent = [
        f.name for f in fields
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if absent:
        raise UserError(
            f"{where}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not given.",
            "Write " + " ".join(f"{name}=…" for name in absent) + "; --help says what each is.",
        )
    known = hints(settings_class)
    return settings_class(**{name: _made(known[name], value, where) for name, value in values.items()})


def _made(annotation: Any, value: Any, where: str) -> Any:
    inner = settings_in(annotation)
    if inner is not None and one_of(annotation, dict) is None and isinstance(value, Mapping):
        return make(inner, value, where)
    return tuple(value) if one_of(annotation, tuple) is not None and isinstance(value, Sequence) else value


def written(settings_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A partial such that reading it gives it again: paths with ``~`` and ``$`` escaped."""
    known = hints(settings_class)
    return {name: _written(known[name], value) for name, value in values.items()}


def _written(annotation: Any, value: Any) -> Any:
    inner = settings_in(annotation)
    if inner is not None:
        return written(inner, value) if isinstance(value, Mapping) else value
    for kind in kinds_of(annotation):
        base = plain(kind)
        if isinstance(value, str) and PATH in marks(kind):
            return escaped(value)
        if isinstance(value, list) and typing.get_origin(base) is list:
            return [_written(typing.get_args(base)[0], item) for item in value]
        if isinstance(value, Mapping) and typing.get_origin(base) is dict:
            return {key: _written(typing.get_args(base)[1], item) for key, item in value.items()}
    return value
