"""Whether what a JSON file holds has the types that its reader expects: a file of another program, or one that somebody
edited, is told about in one message instead of failing somewhere later."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_object

_MOST_LAYERS, _MOST_SIZE = 256, 2**20
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "an object", list: "a list"}


def check_types(value: Any, wanted: Any, path: str | Path, remedy: str, at: str = "") -> None:
    """Refuse a value whose types differ from a pattern.

    Args:
        value: As read from JSON.
        wanted: A type; a tuple of patterns of which one fits; a list of one pattern, for every entry of a list; or a
            mapping from key to pattern, where "key?" may be absent and keys not named hold anything. ``float`` takes
            every finite number, ``int`` whole ones, neither takes true or false; ``None`` is null.
        path: The file, for the message.
        remedy: What to do, in a sentence.
        at: Where in the file the value is.

    Raises:
        UserError: Says where, and what should be there.
    """
    if problem := _problem(value, wanted, at):
        raise UserError(f"{path} is damaged or was not written by this program: {problem}.", remedy)


def check_config(config: Path, network: type, remedy: str) -> None:
    """Refuse a configuration of one of diffusers' networks that cannot be one: entries of other types than its class
    takes, or with a size that no network has, which would fill the memory, for ever, when it is built.

    Args:
        config: The JSON file.
        network: The class.
        remedy: What to do, in a sentence.

    Raises:
        UserError: Names the entry; or the file is no JSON object.
    """
    check_sizes(config, remedy)
    pattern: dict[str, Any] = {}
    for name, parameter in inspect.signature(network).parameters.items():
        default, told = parameter.default, parameter.annotation
        kind = told if told in _NAMES else next((k for k in _NAMES if k.__name__ == told), None)
        if kind is not None:
            pattern[f"{name}?"] = kind
        elif isinstance(default, (tuple, list)) and default:
            pattern[f"{name}?"] = [type(default[0])]
        elif type(default) in _NAMES:
            pattern[f"{name}?"] = (type(default), None)
    check_types(read_object(config), pattern, config, remedy)


def check_sizes(config: Path, remedy: str) -> None:
    """Refuse a network's configuration with a size that no network has.

    Raises:
        UserError: Names the entry; or the file is no JSON object.
    """

    def look(value: Any, at: str) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            look(entry, f"{at}.{key}" if at else str(key))
        most = _MOST_LAYERS if "layers" in at else _MOST_SIZE
        if isinstance(value, int) and abs(value) > most:
            told = value if abs(value) < 10**12 else "a huge number"
            raise UserError(f"{config} is damaged or was not written by this program: {at} is {told}.", remedy)

    look(read_object(config), "")


def _problem(value: Any, wanted: Any, at: str) -> str:
    where = at or "its content"
    if isinstance(wanted, tuple):
        problems = [_problem(value, each, at) for each in wanted]
        return "" if "" in problems else problems[0]
    if isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not an object"
        for key, pattern in wanted.items():
            name = key.removesuffix("?")
            place = f"{at}.{name}" if at else name
            if name not in value:
                if key == name:
                    return f"{place} is missing"
            elif problem := _problem(value[name], pattern, place):
                return problem
        return ""
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} is {_shown(value)}, not a list"
        return next((p for i, entry in enumerate(value) if (p := _problem(entry, wanted[0], f"{at}[{i}]"))), "")
    if wanted is None:
        return "" if value is None else f"{where} is {_shown(value)}, not null"
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if isinstance(value, bool):  # which is an int to Python
        fits = wanted is bool
    if fits and wanted is float:
        fits = math.isfinite(value)
    return "" if fits else f"{where} is {_shown(value)}, not {_NAMES[wanted]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
