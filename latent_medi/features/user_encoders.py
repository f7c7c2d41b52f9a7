"""A user's own encoders: a function that returns a network, named as ``module:callable``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from latent_medi.core.errors import UserError, nearest
from latent_medi.features.networks import Network
from latent_medi.features.registry import Preprocessing

CONTRACT = (
    "A callable returns a torch module with an integer attribute `dim` that maps images [n, 3, H, W] in [0, 1] to "
    "features [n, dim]; or (module, Preprocessing), which says how images are resized and normalised before; or a "
    "latent_medi.features.networks.Network."
)
_PLAIN = Preprocessing(0, (0.0,) * 3, (1.0,) * 3)


def own_network(name: str, weights: str | Path | None) -> Network:
    """The network that a user's function returns.

    Args:
        name: ``module:callable``; the module is installed, or in a folder that PYTHONPATH names.
        weights: Handed to the callable as ``weights=PATH`` if given; otherwise it is called without arguments.

    Returns:
        The network; the source file of the callable and that of the module's class are part of its fingerprint.

    Raises:
        UserError: No such module or callable, or it returns something else than the contract says.
    """
    function = _find(name)
    result: Any = function(weights=weights) if weights else function()
    license, dim = "not stated", None
    if isinstance(result, Network):
        module, dim, preprocessing, license = result.module, result.dim, result.preprocessing, result.license
    else:
        pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Preprocessing)
        module, preprocessing = result if pair else (result, _PLAIN)
        dim = getattr(module, "dim", None)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} returned {_kind(result)}, which is no encoder.", CONTRACT)
    if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool) or dim < 1:
        raise UserError(f"The module that {name} returned has no integer `dim` above zero, but {dim!r}.", CONTRACT)
    network = Network(name, module, int(dim), preprocessing, license)
    return replace(network, readout=_sources(function, type(module)))


def _find(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"The encoder {name!r} is not module:callable.", CONTRACT)
    importlib.invalidate_caches()  # the file may be newer than the cached listing
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module itself fails to import something
        top = Path(module_name.partition(".")[0])
        if top.is_dir() or top.with_suffix(".py").is_file():
            raise UserError(
                f"The encoder {name!r}: the module {module_name!r} is in the working folder, whose code is not run.",
                "If it is yours, start the command with PYTHONPATH=. before it.",
            ) from None
        raise UserError(
            f"The encoder {name!r}: the module {module_name!r} is not installed.",
            "Install it, or add its folder to PYTHONPATH.",
        ) from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise UserError(f"The encoder {name!r}: {module_name} has no {attribute!r}; {nearest(part, public)}.")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"The encoder {name!r}: {attribute} is {_kind(found)}, not callable.", CONTRACT)
    return found


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def _sources(*things: Any) -> str:
    """Hash of the source files, so that an edited encoder has another fingerprint."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(_source(thing) or _source(type(thing)))
    return f"source {digest.hexdigest()}"


def _source(thing: Any) -> bytes:
    try:
        file = inspect.getsourcefile(thing)
    except (TypeError, OSError):  # an object that has no file of its own, or one made in C
        return b""
    return Path(file).read_bytes() if file else b""
