"""Settings from YAML files and the command line: found by name or path, merged, checked, typed, and saved beside every
output.

A verb has one settings dataclass. ``--config demo/medi`` reads ``configs/demo/medi.yaml`` of the package or any path,
several times if wanted; later files and then ``key=value`` or ``--key value`` words win. A file may name another to
start from with ``base: demo/medi``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from latent_medi.errors import UserError, nearest
from latent_medi.files import write_text

S = TypeVar("S")


def packaged(kind: str) -> Path:
    """The folder ``configs`` or ``shards`` (recipes), in an installed wheel or in a source tree."""
    inside = Path(__file__).parent / {"configs": "configs", "shards": "recipes"}[kind]
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / kind


def find_config(name: str | Path) -> Path:
    """The file of a configuration given by packaged name (``demo/medi``) or path.

    Raises:
        UserError: There is no such file.
    """
    folder = packaged("configs")
    for candidate in (folder / f"{name}.yaml", folder / str(name), Path(name)):
        if candidate.is_file():
            return candidate
    known = [str(p.relative_to(folder).with_suffix("")) for p in sorted(folder.rglob("*.yaml"))]
    raise UserError(
        f"There is no configuration {str(name)!r}.",
        f"Give a path to a YAML file or a packaged name; {nearest(str(name), known)}.",
    )


def load_yaml(name: str | Path) -> dict[str, Any]:
    """The mapping in a configuration file, its ``base`` merged in.

    Raises:
        UserError: The file is absent, is not YAML or holds no mapping.
    """
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings, not a {type(values).__name__}.")
    base = values.pop("base", None)
    return merge(load_yaml(base), values) if base else values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over``; mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that an annotation names, alone or as ``X | None``."""
    for candidate in _alternatives(annotation):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _types(settings_class: type, dotted: str) -> tuple[Any, ...]:
    """What the setting of that key may be; nothing for an unknown key."""
    head, _, rest = dotted.partition(".")
    annotation = typing.get_type_hints(settings_class).get(head)
    if rest:
        inner = _dataclass_in(annotation)
        return _types(inner, rest) if inner is not None else ()
    return _alternatives(annotation)


def _spelled(settings_class: type, dotted: str) -> str:
    """A key with ``_`` for ``-``, as settings are named. The free keys of a mapping to one type, such as phikon-v2 in
    ``weights``, stay; those of a mapping to anything are settings again, such as ``train.max-steps``.
    """
    head, dot, rest = dotted.partition(".")
    head = head.replace("-", "_")
    annotation = typing.get_type_hints(settings_class).get(head)
    inner = _dataclass_in(annotation)
    if inner is not None:
        rest = _spelled(inner, rest)
    elif typing.get_args(annotation)[1:] == (Any,):
        rest = rest.replace("-", "_")
    return f"{head}{dot}{rest}"


def _is_mapping(settings_class: type, dotted: str) -> bool:
    """Whether the setting of that key is a mapping with free keys."""
    return any(typing.get_origin(candidate) is dict for candidate in _types(settings_class, dotted))


def _takes_words(settings_class: type, dotted: str) -> bool:
    """Whether the setting of that key is a list of words."""
    return list[str] in _types(settings_class, dotted)


def known_keys(settings_class: type, prefix: str = "") -> list[str]:
    """All dotted keys of a settings dataclass, nested ones included."""
    hints = typing.get_type_hints(settings_class)
    keys = []
    for field in dataclasses.fields(settings_class):
        keys.append(prefix + field.name)
        inner = _dataclass_in(hints[field.name])
        if inner is not None:
            keys += known_keys(inner, f"{prefix}{field.name}.")
    return keys


def check_keys(settings_class: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse a key that the settings do not have, naming the nearest that they have.

    Raises:
        UserError: An unknown key.
    """
    keys = set(known_keys(settings_class))

    def check(mapping: Mapping[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            dotted = f"{prefix}{key}"
            if dotted not in keys:
                raise UserError(f"{where}: unknown setting {dotted!r}; {nearest(dotted, keys)}.")
            if isinstance(value, Mapping) and any(k.startswith(f"{dotted}.") for k in keys):
                check(value, f"{dotted}.")

    check(values, "")


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def under(setting: str, settings_class: type, arguments: Sequence[str]) -> list[str]:
    """Command-line words in which ``--NAME VALUE``, where ``NAME`` is no setting, gives ``setting.NAME`` as text: a
    dataset's own fields, such as ``--class gleason4`` or ``--grade 3``.
    """
    known = {key.partition(".")[0] for key in known_keys(settings_class)} | {"config", "help"}
    words, result = list(arguments), []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_").partition(".")[0] in known:
            result.append(word)
            if word.startswith("--") and not equals and words and not words[0].startswith("--"):
                result.append(words.pop(0))
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        result.append(f"{setting}.{name}={json.dumps(value)}")  # quoted, or 3 would be a number and no a boolean
    return result


def _is_yaml_list(text: str) -> bool:
    """Whether a word is a whole list (or none) by itself, such as ``[a, b]``."""
    return text.lstrip().startswith("[") or text in ("null", "~", "")


def _is_setting(settings_class: type, word: str) -> bool:
    """Whether a command-line word begins a setting, so that it cannot belong to the list before it.

    One that is nearly the name of a setting is taken for that, mistyped: better refused than read as one more item.
    """
    name, equals, _ = word.partition("=")
    known = {key.partition(".")[0] for key in known_keys(settings_class)}
    meant = get_close_matches(name.replace("-", "_").partition(".")[0], known, 1, 0.75)
    return word.startswith("--") or (bool(equals) and bool(meant))


def parse(
    settings_class: type[S], arguments: Sequence[str], verb: str = "", description: str = "", positional: str = ""
) -> S:
    """Settings from command-line words.

    Args:
        settings_class: The verb's settings dataclass.
        arguments: ``--config NAME`` any number of times; ``key=value``, ``--key=value`` or ``--key value`` with
            dotted keys, ``--key a b c`` for a list, up to the next setting, and ``--key name=value`` for an entry of a
            mapping; ``--help``.
        verb: Name shown in help.
        description: What the verb does, shown in help.
        positional: A setting that a bare first word gives.

    Raises:
        UserError: An unknown key, a value of the wrong type or a missing required setting.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"latent-medi {verb}".strip(), description=description or settings_class.__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action="append",
        help="packaged configuration (demo/medi) or path to a YAML file; may be repeated, later ones win",
    )
    parser.add_class_arguments(settings_class, None)
    words = list(arguments)
    if "-h" in words or "--help" in words:
        parser.print_help()
        sys.exit(0)
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        key, equals, text = word.lstrip("-").partition("=")
        if not equals:
            if not word.startswith("--"):
                if positional and positional not in overrides:
                    overrides[positional] = word
                    continue
                raise UserError(f"Cannot read the word {word!r}.", "Settings are given as key=value or --key value.")
            if index == len(words) or (words[index].startswith("--") and words[index] != "--"):
                text = "true"
            else:
                text = words[index]
                index += 1
                if _takes_words(settings_class, _spelled(settings_class, key)) and not _is_yaml_list(text):
                    items = [text]
                    while index < len(words) and not _is_setting(settings_class, words[index]):
                        items.append(words[index])
                        index += 1
                    text = json.dumps(items, ensure_ascii=False)
        if key == "config":
            loaded = load_yaml(text)
            check_keys(settings_class, loaded, str(find_config(text)))
            values = merge(values, loaded)
            continue
        key = _spelled(settings_class, key)
        check_keys(settings_class, _nested(key, None), f"latent-medi {verb}".strip())
        inner, equals, rest = text.partition("=")
        # --to site=radboud is to.site=radboud
        if equals and inner and not inner.lstrip().startswith("{") and _is_mapping(settings_class, key):
            key, text = f"{key}.{inner.strip()}", rest
        try:
            value = yaml.safe_load(text) if text != "" else ""
        except yaml.YAMLError:
            value = text
        overrides = merge(overrides, _nested(key, value))
    return build(settings_class, merge(values, overrides), parser=parser)


def build(settings_class: type[S], values: Mapping[str, Any], parser: Any = None) -> S:
    """Typed settings from a nested mapping.

    Raises:
        UserError: An unknown key, a value of the wrong type or a missing required setting.
    """
    from jsonargparse import ArgumentParser

    check_keys(settings_class, values, settings_class.__name__)
    if parser is None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(settings_class, None)
    try:
        parsed = parser.parse_object(dict(values))
        init = parser.instantiate_classes(parsed)
    except Exception as error:  # jsonargparse wraps every failed check in its own kinds of error
        if isinstance(error, (KeyboardInterrupt, UserError)):
            raise
        raise UserError(f"{settings_class.__name__}: {' '.join(str(error).split())}") from None
    return settings_class(**{f.name: init[f.name] for f in dataclasses.fields(settings_class)})  # type: ignore[arg-type]


def as_dict(settings: Any) -> dict[str, Any]:
    """Settings as a nested mapping of plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(settings))


def save_settings(settings: Any, path: str | Path) -> None:
    """Write resolved settings as YAML, such that ``--config PATH`` gives them again."""
    write_text(path, yaml.safe_dump(as_dict(settings), sort_keys=False, allow_unicode=True))
