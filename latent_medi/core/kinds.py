"""The annotations of settings dataclasses: which values a setting accepts, and how messages say it."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from latent_medi.core.errors import shortened
from latent_medi.core.paths import PATH


@dataclass(frozen=True)
class PartOf:
    """Mark of a mapping with some of the settings of another dataclass.

    Args:
        settings: The other dataclass.
    """

    settings: type


@dataclass(frozen=True)
class Range:
    """Mark of a number that a setting limits: ``Annotated[float, Range(0, 1)]``. Infinity and NaN are always refused.

    Args:
        low: Smallest value.
        high: Largest value.
        above: Whether ``low`` itself is refused.
        below: Whether ``high`` itself is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high) and math.isfinite(value)

    def __str__(self) -> str:
        if -math.inf < self.low and self.high < math.inf and not (self.above or self.below):
            return f"from {self.low:g} to {self.high:g}"
        low = f"{'above' if self.above else 'of at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.below else 'of at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "that is finite"


def hints(settings_class: type) -> Mapping[str, Any]:
    """Annotation of each setting, with its marks."""
    return _hints(settings_class)


@cache
def _hints(settings_class: Any) -> Mapping[str, Any]:
    annotations = typing.get_type_hints(settings_class, include_extras=True)
    return {field.name: annotations[field.name] for field in dataclasses.fields(settings_class)}


def path_settings(settings_class: type) -> list[str]:
    """The settings that are a path, or a list of paths or a mapping to paths."""

    def is_path(annotation: Any) -> bool:
        return PATH in marks(annotation) or (origin(annotation) in (list, dict) and is_path(arguments(annotation)[-1]))

    return [name for name, annotation in hints(settings_class).items() if is_path(annotation)]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other annotation by itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def is_union(annotation: Any) -> bool:
    """Whether a setting accepts values of several types, besides ``None``."""
    return len(alternatives(_without_none(annotation))) > 1


def _without_none(annotation: Any) -> Any:
    """The annotation of the values that are not ``None``."""
    members = [member for member in alternatives(annotation) if member is not types.NoneType]
    return members[0] if len(members) == 1 else annotation


def plain(annotation: Any) -> Any:
    """An annotation without ``None`` and without its marks."""
    kind = _without_none(annotation)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def marks(annotation: Any) -> tuple[Any, ...]:
    """The marks of an annotation."""
    kind = _without_none(annotation)
    return typing.get_args(kind)[1:] if typing.get_origin(kind) is Annotated else ()


def origin(annotation: Any) -> Any:
    """``list``, ``dict``, ``tuple``, ``Literal`` or ``None``: the kind of a generic annotation."""
    return typing.get_origin(plain(annotation))


def arguments(annotation: Any) -> tuple[Any, ...]:
    """The annotations of the items of a list or tuple, or of keys and values of a mapping; the words of a choice."""
    return typing.get_args(plain(annotation))


def settings_in(annotation: Any) -> type | None:
    """The dataclass whose settings a value holds, all or some; ``None`` if it holds no settings."""
    kind = plain(annotation)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return next((mark.settings for mark in marks(annotation) if isinstance(mark, PartOf)), None)


def is_mapping(annotation: Any) -> bool:
    """Whether a setting is a mapping with arbitrary keys."""
    return origin(annotation) is dict and settings_in(annotation) is None


def takes_words(annotation: Any) -> bool:
    """Whether a setting is a list of words."""
    return origin(annotation) is list and is_text(arguments(annotation)[0])


def takes_nothing(annotation: Any) -> bool:
    """Whether a setting accepts ``None``."""
    return _without_none(annotation) is not annotation  # no setting is of several types or None


def is_text(annotation: Any) -> bool:
    """Whether a setting is a text or a choice of words, or may be one."""
    if is_union(annotation):
        return any(map(is_text, arguments(annotation)))
    return plain(annotation) is str or origin(annotation) is Literal


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
    """The path of keys to a setting, and its annotation; ``None`` for an unknown one.

    Settings may be spelled with ``-`` for ``_``. All that follows the name of a mapping is one key of it, and is not
    changed: ``weights.phikon-v2``, ``only.demographic.race``.
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
    value = arguments(annotation)[1]
    if (inner := settings_in(value)) is not None:  # models.NAME.train.max_steps
        name, dot, rest = rest.partition(".")
        found = find(inner, rest) if dot else ([], value)
        return None if found is None else ([head, name, *found[0]], found[1])
    return ([head, *rest.replace("-", "_").split(".")], Any) if value is Any else ([head, rest], value)


def shown(value: Any) -> str:
    """A value as messages show it, cut to about 60 characters."""
    if value is None:
        return "empty (null)"
    if isinstance(value, str):
        return repr(shortened(value))
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    return shortened(text)


def wanted(annotation: Any) -> str:
    """What a setting accepts, in words."""
    return _in_words(annotation) + (", or null" if takes_nothing(annotation) else "")


def _in_words(annotation: Any) -> str:
    kind, inner = plain(annotation), arguments(annotation)
    if is_union(annotation):
        return " or ".join(map(_in_words, inner))
    if (settings := settings_in(annotation)) is not None:
        names = list(hints(settings))
        return f"a mapping of settings: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
    if origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin(annotation) is list:
        return _list_in_words(inner[0])
    if origin(annotation) is tuple:
        return f"a list of {len(inner)} numbers such as [{', '.join(['1'] * len(inner))}]"
    if origin(annotation) is dict:
        value = {int: "1", float: "0.5"}.get(plain(inner[1]), "[b, c]" if origin(inner[1]) is list else "b")
        return f"a mapping such as {{a: {value}}}"
    if PATH in marks(annotation):
        return "a path or name"
    word = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a value")
    return " ".join([word, *(str(mark) for mark in marks(annotation) if isinstance(mark, Range))])


def _list_in_words(item: Any) -> str:
    if origin(item) is Literal:
        words = arguments(item)
        return f"a list of {', '.join(map(repr, words))}, such as [{words[0]}]"
    if origin(item) in (dict, list):
        return "a list such as " + ("[{class: a, site: b}]" if origin(item) is dict else "[[a, b]]")
    return f"a list such as {({int: '[1, 2]', float: '[0.5, 1.0]', bool: '[true, false]'}).get(plain(item), '[a, b]')}"
