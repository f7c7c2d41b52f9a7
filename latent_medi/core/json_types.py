"""Checking the types in a JSON file: a file of another program, or an edited one, gives one message when it is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError, shortened
from latent_medi.core.files import read_object

_MOST_LAYERS, _MOST_SIZE = 256, 2**20
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "an object", list: "a list"}


def check_types(value: Any, wanted: Any, path: str | Path, remedy: str, at: str = "") -> None:
    """Refuse a value whose types do not match a pattern.

    Args:
        value: As read from JSON.
        wanted: A type; a tuple of alternative patterns; a list of one pattern for all entries of a list; or a mapping
            from key to pattern, where "key?" may be absent and ``...`` is the pattern of further keys, which are not
            checked without it. ``float`` matches every finite number, ``int`` whole numbers of 64 bits, neither
            matches true or false; ``None`` matches null.
        path: The file, for the message.
        remedy: What to do, as a sentence.
        at: Where in the file the value is.

    Raises:
        UserError: Names the place in the file, its value and the type that is wanted.
    """
    if problem := _problem(value, wanted, at):
        raise UserError(f"{path} is damaged or was not written by this program: {problem}.", remedy)


def check_config(config: Path, network: type, remedy: str) -> None:
    """Refuse a configuration of a diffusers network with entries of a wrong type, or with sizes that would fill the
    memory when the network is built.

    Args:
        config: The JSON file.
        network: The network's class.
        remedy: What to do, as a sentence.

    Raises:
        UserError: Names the entry; or the file is no JSON object.
    """
    check_sizes(config, remedy)
    pattern: dict[str, object] = {}
    for name, parameter in inspect.signature(network).parameters.items():
        default, annotation = parameter.default, parameter.annotation
        kind = annotation if annotation in _NAMES else next((k for k in _NAMES if k.__name__ == annotation), None)
        if kind is not None:
            pattern[f"{name}?"] = kind
        elif isinstance(default, (tuple, list)) and default:
            first = default[0]
            pattern[f"{name}?"] = [[int] if isinstance(first, (tuple, list)) else type(first)]
        elif type(default) in _NAMES:
            each: list[list[type]] = [[str]] if isinstance(default, str) and "tuple" in str(annotation).lower() else []
            pattern[f"{name}?"] = (type(default), *each, None)
    check_types(read_object(config), pattern, config, remedy)


def check_sizes(config: Path, remedy: str) -> None:
    """Refuse a network's configuration with an absurd size.

    Raises:
        UserError: Names the entry; or the file is no JSON object.
    """

    def check(value: Any, at: str) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            check(entry, f"{at}.{key}" if at else str(key))
        most = _MOST_LAYERS if "layers" in at else _MOST_SIZE
        if isinstance(value, int) and abs(value) > most:
            number = value if abs(value) < 10**12 else "a huge number"
            raise UserError(f"{config} is damaged or was not written by this program: {at} is {number}.", remedy)

    check(read_object(config), "")


def _problem(value: Any, wanted: Any, at: str) -> str:
    where = at or "its content"
    if isinstance(wanted, tuple):
        problems = [_problem(value, each, at) for each in wanted]
        return "" if "" in problems else problems[0]
    if isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            return f"{where} is {shortened(repr(value))}, not an object"
        named = {key: pattern for key, pattern in wanted.items() if key is not ...}
        if ... in wanted:
            named = dict.fromkeys(value, wanted[...]) | named
        for key, pattern in named.items():
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
            return f"{where} is {shortened(repr(value))}, not a list"
        return next((p for i, entry in enumerate(value) if (p := _problem(entry, wanted[0], f"{at}[{i}]"))), "")
    if wanted is None:
        return "" if value is None else f"{where} is {shortened(repr(value))}, not null"
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if isinstance(value, bool):  # a subclass of int
        fits = wanted is bool
    if fits and wanted in (int, float):
        fits = math.isfinite(value) if wanted is float else abs(value) < 2**63
    return "" if fits else f"{where} is {shortened(repr(value))}, not {_NAMES[wanted]}"
