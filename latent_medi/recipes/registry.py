"""The recipes by name: the public modules of this folder, each with ``build`` and ``main``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from latent_medi.core.errors import UserError, nearest


def recipes() -> dict[str, Path]:
    """The files of the recipes by name."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {p.stem.replace("_", "-"): p for p in files if p.name != Path(__file__).name}


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
    return importlib.import_module(f"latent_medi.recipes.{path.stem}")
