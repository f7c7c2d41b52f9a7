"""Settings from YAML files and the command line: found by name or path, merged, checked, typed, and saved beside every
output.

A verb has one settings dataclass. ``--config demo/medi`` reads ``configs/demo/medi.yaml`` of the package or any path,
several times if wanted; later files and then ``key=value`` or ``--key value`` words win. A file may name another to
start from with ``base: demo/medi``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from latent_medi.core.errors import UserError, nearest, needs
from latent_medi.core.files import write_text
from latent_medi.core.kinds import find, hints, is_mapping, known_keys, settings_in, takes_nothing, takes_words
from latent_medi.core.paths import expand
from latent_medi.core.typed import convert, convert_word, make, partial, unknown, written
from latent_medi.core.yaml_text import read_yaml

S = TypeVar("S")


def packaged(kind: str) -> Path:
    """The folder ``configs``, in an installed wheel or in a source tree."""
    inside = Path(__file__).parents[1] / kind
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / kind


def find_config(name: str | Path) -> Path:
    """The file of a configuration given by packaged name (``demo/medi``) or path.

    Raises:
        UserError: There is no such file.
    """
    folder = packaged("configs")
    given = str(name) if isinstance(name, Path) else expand(name, "The configuration")
    for candidate in (folder / f"{given}.yaml", folder / given, Path(given)):
        try:
            if candidate.is_file():
                return candidate
            if candidate == Path(given) and candidate.exists():
                what = "a folder" if candidate.is_dir() else "no regular file"
                raise UserError(f"The configuration {given} is {what}.", "Give the path to a YAML file.")
        except OSError as error:  # a name that is too long, a folder that must not be looked into
            raise UserError(f"The configuration {given} cannot be read: {error.strerror}.") from None
    known = [str(p.relative_to(folder).with_suffix("")) for p in sorted(folder.rglob("*.yaml"))]
    raise UserError(
        f"There is no configuration {given!r}.",
        f"Give a path to a YAML file or a packaged name; {nearest(given, known)}.",
    )


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte {error.start + 1} is {error.object[error.start]:#04x}).",
            "Save it as UTF-8.",
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    values = read_yaml(text, str(path))
    if values is not None and not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single word"
        raise UserError(f"{path} holds a {kind}; it must hold a mapping of settings.", "Write NAME: VALUE.")
    return values or {}


def _chain(name: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """A configuration and all that it is based on, the last base first.

    Raises:
        UserError: A file that is absent or no mapping, or a file that is based on itself.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
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


def load_yaml(name: str | Path) -> dict[str, Any]:
    """The mapping in a configuration file, its ``base`` merged in; values as :mod:`latent_medi.core.yaml_text` reads
    them.

    Raises:
        UserError: The file is absent, is not YAML or holds no mapping; or its bases go round in a circle.
    """
    values: dict[str, Any] = {}
    for _, layer in _chain(name):
        values = merge(values, layer)
    return values


def load(settings_class: type, name: str | Path) -> dict[str, Any]:
    """The settings that a configuration file gives, its ``base`` merged in: a partial (:mod:`latent_medi.core.typed`).

    Raises:
        UserError: As :func:`load_yaml`; or an unknown key or a value of the wrong type, by file.
    """
    values: dict[str, Any] = {}
    for path, layer in _chain(name):
        values = merge(values, partial(settings_class, layer, str(path)))
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over``; mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A mapping that holds a value under keys within keys."""
    for key in reversed(keys):
        value = {key: value}
    return value


def under(setting: str, settings_class: type, arguments: Sequence[str]) -> list[str]:
    """Command-line words in which ``--NAME VALUE``, where ``NAME`` is no setting, gives ``setting.NAME`` as text: a
    dataset's own fields, such as ``--class gleason4`` or ``--demographic.race white``.
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
        # Quoted, or 3 would be a number and no a boolean.
        result.append(f"{setting}.{name}={json.dumps(value, ensure_ascii=False)}")
    return result


def _names_setting(settings_class: type, name: str) -> bool:
    """Whether a word names a setting, or something within one that holds others."""
    head, dot, _ = name.replace("-", "_").partition(".")
    annotation = hints(settings_class).get(head)
    if head in ("config", "help"):
        return True
    holds = annotation is not None and (is_mapping(annotation) or settings_in(annotation) is not None)
    return annotation is not None and (not dot or holds)


def _is_yaml_list(text: str, annotation: Any) -> bool:
    """Whether a word is a whole list (or none) by itself, such as ``[a, b]``."""
    return text.startswith("[") or (takes_nothing(annotation) and text in ("null", "~", ""))


def _is_setting(settings_class: type, word: str) -> bool:
    """Whether a command-line word begins a setting, so that it cannot belong to the list before it.

    One that is nearly the name of a setting is taken for that, mistyped: better refused than read as one more item.
    """
    name, equals, _ = word.partition("=")
    known = {key.partition(".")[0] for key in known_keys(settings_class)}
    meant = get_close_matches(name.replace("-", "_").partition(".")[0], known, 1, 0.75)
    return word.startswith("--") or (bool(equals) and bool(meant))


def _show_help(settings_class: type, verb: str, description: str) -> None:
    """Print what a verb's settings are, without the spellings that jsonargparse has and this command line has not."""
    with needs("--help", "'jsonargparse[signatures]'"):
        from jsonargparse import ArgumentParser

    words = f"latent-medi {verb}".strip()
    parser = ArgumentParser(
        prog=words,
        usage=f"{words} [--config NAME] [key=value …] [--json FILE]",
        description=description or (settings_class.__doc__ or "").partition("Args:")[0].strip(),
    )
    parser.add_argument(
        "--config",
        action="append",
        help="packaged configuration (demo/medi) or path to a YAML file; may be repeated, later ones win",
    )
    parser.add_class_arguments(settings_class, None)
    text = re.sub(r"(\[ITEM,\.\.\.\]), --\S+\+ \[ITEM,\.\.\.\]", r"\1", parser.format_help())
    text = re.sub(r"^  --\S+\.help .*\n( {4,}.*\n)*", "", text, flags=re.MULTILINE)
    print(re.sub(r"^  --\S+ CONFIG\s+Path to a configuration file\.\n", "", text, flags=re.MULTILINE), end="")


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
    words = list(arguments)
    if "-h" in words or "--help" in words:
        _show_help(settings_class, verb, description)
        sys.exit(0)
    where = f"latent-medi {verb}".strip()
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
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
            if listed is not None and (takes_words(annotation) and not _is_yaml_list(listed[0], annotation)):
                overrides = merge(overrides, nested(keys, convert(annotation, listed, where, ".".join(keys))))
                continue
            text = "true" if listed is None else listed[0]
        if key == "config":
            values = merge(values, load(settings_class, text))
            continue
        entry, equals, rest = text.partition("=")
        # --to site=radboud is to.site=radboud
        if equals and entry and is_mapping(annotation) and not entry.lstrip().startswith("{"):
            (keys, annotation), text = find(settings_class, ".".join([*keys, entry.strip()])) or found, rest
        overrides = merge(overrides, nested(keys, convert_word(annotation, text, where, ".".join(keys))))
    return make(settings_class, merge(values, overrides), where)


def _following(settings_class: type, key: str, annotation: Any, words: list[str], where: str) -> list[str] | None:
    """The words after ``--key`` that are its value, which are taken out of ``words``: several for a list of words, none
    for a switch.

    Raises:
        UserError: There is none, and the setting is no switch.
    """
    if not words or words[0].startswith("--"):
        if annotation is not bool:
            raise UserError(f"{where}: --{key} has no value.", "Write it after a blank, or after =.")
        return None
    found = [words.pop(0)]
    if takes_words(annotation) and not _is_yaml_list(found[0], annotation):
        while words and not _is_setting(settings_class, words[0]):
            found.append(words.pop(0))
    return found


def build(settings_class: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Typed settings from a nested mapping, as a person wrote it: paths are expanded.

    Args:
        settings_class: The settings dataclass.
        values: Values by setting.
        where: How messages call what gave them.

    Raises:
        UserError: An unknown key, a value of the wrong type or a missing required setting.
    """
    where = where or settings_class.__name__
    return make(settings_class, partial(settings_class, values, where), where)


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
    save_partial(type(settings), as_dict(settings), path)


def save_partial(settings_class: type, values: Mapping[str, Any], path: str | Path) -> None:
    """The same of some settings."""
    write_text(path, yaml.safe_dump(written(settings_class, values), sort_keys=False, allow_unicode=True))
