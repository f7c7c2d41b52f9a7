"""What each setting of a dataclass takes, read from its annotation, and how to say it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from latent_medi.core.paths import PATH


@dataclass(frozen=True)
class PartOf:
    """Mark of a mapping that holds some settings of another dataclass.

    Args:
        settings: That dataclass.
    """

    settings: type


def hints(settings_class: type) -> dict[str, Any]:
    """Annotation by setting, marks included."""
    return _hints(settings_class)


@cache
def _hints(settings_class: Any) -> dict[str, Any]:
    return typing.get_type_hints(settings_class, include_extras=True)


def plain(annotation: Any) -> Any:
    """An annotation without its marks."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The annotations of a union, or the only one."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def kinds_of(annotation: Any) -> list[Any]:
    """What a setting may be besides ``None``."""
    return [candidate for candidate in alternatives(annotation) if candidate is not types.NoneType]


def marks(annotation: Any) -> tuple[Any, ...]:
    """The marks of an annotation."""
    return typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()


def settings_in(annotation: Any) -> type | None:
    """The dataclass whose settings a value holds, all or some of them."""
    for candidate in alternatives(annotation):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
        for mark in marks(candidate):
            if isinstance(mark, PartOf):
                return mark.settings
    return None


def one_of(annotation: Any, kind: Any) -> Any:
    """The alternative of that origin, such as list; ``None`` if there is none."""
    return next((k for k in map(plain, kinds_of(annotation)) if typing.get_origin(k) is kind), None)


def is_mapping(annotation: Any) -> bool:
    """Whether a value is a mapping with free keys."""
    return one_of(annotation, dict) is not None and settings_in(annotation) is None


def takes_words(annotation: Any) -> bool:
    """Whether a value is a list of words."""
    listed = one_of(annotation, list)
    return listed is not None and plain(typing.get_args(listed)[0]) is str


def takes_nothing(annotation: Any) -> bool:
    """Whether a value may be ``None``."""
    return types.NoneType in alternatives(annotation)


def is_text(annotation: Any) -> bool:
    """Whether a value is a text or one of several words."""
    return plain(annotation) is str or typing.get_origin(annotation) is Literal


def may_be_text(annotation: Any) -> bool:
    """Whether a text is among what a value may be."""
    return any(map(is_text, kinds_of(annotation)))


def known_keys(settings_class: type, prefix: str = "") -> list[str]:
    """All dotted keys of a settings dataclass, nested ones included."""
    keys = []
    for name, annotation in hints(settings_class).items():
        keys.append(prefix + name)
        inner = settings_in(annotation)
        if inner is not None:
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def find(settings_class: type, dotted: str) -> tuple[list[str], Any] | None:
    """The keys that lead to a setting, and its annotation; ``None`` for an unknown one.

    Settings may be spelled with ``-`` for ``_``. The free key of a mapping is all that follows the mapping's name, as
    it is: ``weights.phikon-v2``, ``only.demographic.race``.
    """
    head, dot, rest = dotted.partition(".")
    head = head.replace("-", "_")
    annotation = hints(settings_class).get(head)
    if annotation is None or (dot and not rest):
        return None
    if not rest:
        return [head], annotation
    if (inner := settings_in(annotation)) is not None:
        found = find(inner, rest)
        return None if found is None else ([head, *found[0]], found[1])
    if not is_mapping(annotation):
        return None
    value = typing.get_args(one_of(annotation, dict))[1]
    return ([head, *rest.replace("-", "_").split(".")], Any) if value is Any else ([head, rest], value)


def shown(value: Any) -> str:
    """A given value as a message shows it, cut to some 60 characters."""
    if value is None:
        return "empty (null)"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:59]}…")
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def wanted(annotation: Any) -> str:
    """What a setting takes, in words."""
    told = " or ".join(map(_in_words, kinds_of(annotation)))
    return f"{told}, or null" if takes_nothing(annotation) else told


def _in_words(annotation: Any) -> str:
    kind = plain(annotation)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if (settings := settings_in(annotation)) is not None:
        names = list(hints(settings))
        return f"a mapping of settings: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
    if origin is Literal:
        return "one of " + ", ".join(f"{word!r}" for word in inner)
    if origin is list:
        item = plain(inner[0])
        if typing.get_origin(item) in (dict, list):
            return "a list such as " + ("[{class: a, site: b}]" if typing.get_origin(item) is dict else "[[a, b]]")
        if typing.get_origin(item) is Literal:
            return f"a list of {', '.join(map(repr, typing.get_args(item)))}, such as [{typing.get_args(item)[0]}]"
        return f"a list such as {({int: '[1, 2]', float: '[0.5, 1.0]', bool: '[true, false]'}).get(item, '[a, b]')}"
    if origin is tuple:
        return f"a list of {len(inner)} numbers such as [{', '.join(['1'] * len(inner))}]"
    if origin is dict:
        item = plain(kinds_of(inner[1])[0])
        value = {int: "1", float: "0.5"}.get(item, "[b, c]" if typing.get_origin(item) is list else "b")
        return f"a mapping such as {{a: {value}}}"
    if PATH in marks(annotation):
        return "a path or name"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a value")
