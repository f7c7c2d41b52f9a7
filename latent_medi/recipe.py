"""Recipes: one file per public dataset, in ``shards/`` of a source tree and inside the package when installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from latent_medi.config import packaged
from latent_medi.errors import UserError, nearest


def recipes() -> dict[str, Path]:
    """The files of the recipes by name."""
    return {p.stem.replace("_", "-"): p for p in sorted(packaged("shards").glob("[!_]*.py"))}


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe.

    Raises:
        UserError: There is no recipe of that name.
    """
    known = recipes()
    path = known.get(name.replace("_", "-"))
    if path is None:
        raise UserError(
            f"There is no recipe {name!r}; {nearest(name, known)}.",
            "`latent-medi shards images` takes any table of images.",
        )
    spec = importlib.util.spec_from_file_location(f"latent_medi_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
