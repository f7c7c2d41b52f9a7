"""Reading settings from YAML files and the command line, and saving them.

Each verb has one settings dataclass. ``--config demo/medi`` reads ``configs/demo/medi.yaml`` of the package, or the
file at a path. It may be repeated: later files override earlier ones, and ``key=value`` or ``--key value`` overrides
files. A file starts from another one if it says ``base: demo/medi``.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import write_text
from latent_medi.core.help import setting_help, verb_help
from latent_medi.core.kinds import find, hints, is_mapping, known_keys, settings_in, takes_nothing, takes_words
from latent_medi.core.paths import expand
from latent_medi.core.typed import (
    Partial,
    convert,
    convert_word,
    make,
    partial,
    refuse_renamed_words,
    unknown,
    written,
)
from latent_medi.core.yaml_text import read_yaml

S = TypeVar("S")


def packaged(kind: str) -> Path:
    """The path of a packaged folder (``configs``, ``docs``), in an installed wheel or in a source tree."""
    inside = Path(__file__).parents[1] / kind
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / kind


def packaged_names() -> list[str]:
    """Names of the packaged configurations, such as ``demo/medi``."""
    folder = packaged("configs")
    return [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]


def find_config(name: str | Path) -> Path:
    """The file of a configuration, which is given by its packaged name (``demo/medi``) or path.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    folder = packaged("configs")
    given = str(name) if isinstance(name, Path) else expand(name, "The configuration")
    for candidate in (folder / f"{given}.yaml", folder / given, Path(given)):
        try:
            if candidate.is_file():
                return candidate
            if candidate == Path(given) and candidate.exists():
                what = "a folder" if candidate.is_dir() else "not a regular file"
                raise UserError(f"The configuration {given} is {what}.", "Give the path to a YAML file.")
        except OSError as error:  # a name that is too long, a folder without permission
            raise UserError(f"The configuration {given} cannot be read: {error.strerror}.") from None
    raise UserError(
        f"There is no configuration {given!r}.",
        f"Give a path to a YAML file or a packaged name; {nearest(given, packaged_names())}.",
    )


def _read(path: Path) -> Partial:
    """The mapping in a configuration file, not converted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start + 1} is {error.object[error.start]:#04x}).",
            "Save it as UTF-8.",
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    values = read_yaml(text, str(path))
    if values is not None and not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single word"
        raise UserError(f"{path} holds a {kind}; it must hold a mapping of settings.", "Write NAME: VALUE.")
    return values or {}


def _chain(name: str | Path) -> list[tuple[Path, Partial]]:
    """A configuration file and the files it is based on, the last base first.

    Raises:
        UserError: A file is absent, holds no mapping, or is based on itself.
    """
    found: list[tuple[Path, Partial]] = []
    while True:
        try:
            path = find_config(name)
        except UserError as error:
            if not found:
                raise
            raise UserError(f"{found[0][0]} is based on {str(name)!r}: {error.message}", error.hint) from None
        if any(path.samefile(earlier) for earlier, _ in found):
            names = [str(earlier) for earlier, _ in reversed(found)]
            raise UserError(f"{' → '.join([*names, str(path)])}: a configuration is based on itself.", "Remove a base.")
        values = _read(path)
        found.insert(0, (path, values))
        base = values.pop("base", None)
        if base is None:
            return found
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}; it takes the name or path of one configuration.")
        name = base


def load_yaml(name: str | Path) -> Partial:
    """The mapping in a configuration file merged into its ``base``, values not converted.

    Raises:
        UserError: The file is absent, is no YAML, holds no mapping or is based on itself.
    """
    values: Partial = {}
    for _, layer in _chain(name):
        values = merge(values, layer)
    return values


def load(settings_class: type, name: str | Path) -> Partial:
    """The settings in a configuration file merged into its ``base``, converted to their types.

    Raises:
        UserError: As :func:`load_yaml`; or a key is unknown, or a setting does not accept its value.
    """
    values: Partial = {}
    for path, layer in _chain(name):
        values = merge(values, partial(settings_class, layer, str(path)))
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Partial:
    """``base`` updated with ``over``: mappings are merged key by key, other values are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def nested(keys: Sequence[str], value: Any) -> Partial:
    """A value in nested mappings with the given keys."""
    *outer, last = keys
    result = {last: value}
    for key in reversed(outer):
        result = {key: result}
    return result


def under(setting: str, settings_class: type, arguments: Sequence[str]) -> list[str]:
    """Command-line words with ``--NAME VALUE`` changed to ``setting.NAME=VALUE`` if ``NAME`` is no setting: the fields
    of a dataset, such as ``--class gleason4`` or ``--demographic.race white``.
    """
    words, result = list(arguments), []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or _names_setting(settings_class, name):
            result.append(word)
            if word.startswith("--") and not equals and words and not words[0].startswith("--"):
                result.append(words.pop(0))
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        # Quoted, because 3 would be a number and no a truth value.
        result.append(f"{setting}.{name}={json.dumps(value, ensure_ascii=False)}")
    return result


def _names_setting(settings_class: type, name: str) -> bool:
    """Whether a name is a setting, or an entry of a setting that holds others."""
    head, dot, _ = name.replace("-", "_").partition(".")
    annotation = hints(settings_class).get(head)
    if head in ("config", "help"):
        return True
    holds = annotation is not None and (is_mapping(annotation) or settings_in(annotation) is not None)
    return annotation is not None and (not dot or holds)


def _is_yaml_list(text: str, annotation: Any) -> bool:
    """Whether a word is a complete list, such as ``[a, b]``, or null."""
    return text.startswith("[") or (takes_nothing(annotation) and text in ("null", "~", ""))


def _is_setting(settings_class: type, word: str) -> bool:
    """Whether a command-line word begins a setting and ends the list before it.

    A word that nearly matches a setting counts as a misspelled setting, not as an item of the list.
    """
    name, equals, _ = word.partition("=")
    known = {key.partition(".")[0] for key in known_keys(settings_class)}
    meant = get_close_matches(name.replace("-", "_").partition(".")[0], known, 1, 0.75)
    return word.startswith("--") or (bool(equals) and bool(meant))


def show_help(settings_class: type, words: Sequence[str], verb: str) -> None:
    """Print the help of a verb, or of the setting that is named after ``--help``.

    Raises:
        UserError: That setting is unknown.
    """
    command = f"latent-medi {verb}".strip()
    after = next((words[i + 1 : i + 2] for i, word in enumerate(words) if word in ("-h", "--help")), [])
    name = after[0].lstrip("-").partition("=")[0] if after else ""
    if name in ("config", "json", "help", "h") or "/" in name:  # the verb's help has these; a path names no setting
        name = ""
    print(setting_help(settings_class, command, name) if name else verb_help(settings_class, command))


def parse(settings_class: type[S], arguments: Sequence[str], verb: str = "", positional: str = "") -> S:
    """Settings from command-line words.

    Args:
        settings_class: The settings dataclass of the verb.
        arguments: ``--config NAME``, any number of times; ``key=value``, ``--key=value`` or ``--key value`` with
            dotted keys; ``--key a b c`` for a list, which ends at the next setting; ``--key name=value`` for an entry
            of a mapping; ``--help``, or ``--help key`` for all that is documented of a setting.
        verb: Name of the verb, for help and messages.
        positional: The setting that a word without a key gives.

    Raises:
        UserError: A key is unknown, a setting does not accept its value, or a required setting is missing.
    """
    words = list(arguments)
    if "-h" in words or "--help" in words:
        show_help(settings_class, words, verb)
        sys.exit(0)
    where = f"latent-medi {verb}".strip()
    values: Partial = {}
    overrides: Partial = {}
    while words:
        word = words.pop(0)
        key, equals, text = word.lstrip("-").partition("=")
        if not equals and not word.startswith("--"):
            if not positional or positional in overrides:
                raise UserError(f"Cannot read the word {word!r}.", "Settings are given as key=value or --key value.")
            key, text, equals = positional, word, "="
        found = (["config"], str) if key == "config" else find(settings_class, key)
        if found is None:
            own = is_mapping(hints(settings_class).get("fields"))
            hint = f"A field of the data is given as --{shlex.quote(key)} VALUE." if own else ""
            raise unknown(settings_class, key, where, hint=hint)
        keys, annotation = found
        if not equals:
            listed = _following(settings_class, key, annotation, words, where)
            if listed is not None:
                refuse_renamed_words(settings_class, keys, listed, where)
            if listed is not None and (takes_words(annotation) and not _is_yaml_list(listed[0], annotation)):
                overrides = merge(overrides, nested(keys, convert(annotation, listed, where, ".".join(keys))))
                continue
            text = "true" if listed is None else listed[0]
        if key == "config":
            values = merge(values, load(settings_class, text))
            continue
        refuse_renamed_words(settings_class, keys, text, where)
        entry, equals, rest = text.partition("=")
        # --to site=radboud is to.site=radboud
        if equals and entry and is_mapping(annotation) and not entry.lstrip().startswith("{"):
            (keys, annotation), text = find(settings_class, ".".join([*keys, entry.strip()])) or found, rest
        overrides = merge(overrides, nested(keys, convert_word(annotation, text, where, ".".join(keys))))
    return make(settings_class, merge(values, overrides), where)


def _following(settings_class: type, key: str, annotation: Any, words: list[str], where: str) -> list[str] | None:
    """Remove the value of ``--key`` from ``words`` and return it: several words for a list, ``None`` for a switch.

    Raises:
        UserError: The value is missing, and the setting is no switch.
    """
    if not words or words[0].startswith("--"):
        if annotation is not bool:
            raise UserError(f"{where}: --{key} has no value.", f"Write --{key} VALUE or {key}=VALUE.")
        return None
    found = [words.pop(0)]
    if takes_words(annotation) and not _is_yaml_list(found[0], annotation):
        while words and not _is_setting(settings_class, words[0]):
            found.append(words.pop(0))
    return found


def build(settings_class: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Settings from a nested mapping: values are converted to their types, and paths are expanded.

    Args:
        settings_class: The settings dataclass.
        values: Values by setting.
        where: Where they come from, for messages; by default the name of the class.

    Raises:
        UserError: A key is unknown, a setting does not accept its value, or a required setting is missing.
    """
    where = where or settings_class.__name__
    return make(settings_class, partial(settings_class, values, where), where)


def as_dict(settings: Any) -> Partial:
    """Settings as nested mappings of plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    values: Partial = plain(dataclasses.asdict(settings))
    return values


def save_settings(settings: Any, path: str | Path) -> None:
    """Write settings as YAML; ``--config PATH`` reads the same settings."""
    save_partial(type(settings), as_dict(settings), path)


def save_partial(settings_class: type, values: Mapping[str, Any], path: str | Path) -> None:
    """Write some settings of a dataclass as YAML; ``--config PATH`` reads the same settings."""
    write_text(path, yaml.safe_dump(written(settings_class, values), sort_keys=False, allow_unicode=True))
