"""The recipes by name: the public modules of this folder, each with ``build`` and ``main``."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.paths import expand


def recipes() -> dict[str, Path]:
    """The files of the recipes by name."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {p.stem.replace("_", "-"): p for p in files if p.name != Path(__file__).name}


def load_recipe(name: str, others: Sequence[str] = ()) -> ModuleType:
    """The module of a recipe.

    Args:
        name: Its name.
        others: Further names that may be meant, for the message.

    Raises:
        UserError: There is no recipe of that name.
    """
    known = recipes()
    path = known.get(name.replace("_", "-"))
    if path is None:
        raise UserError(
            f"There is no recipe {name!r}; {nearest(name, [*known, *others])}.",
            "`latent-medi shards images` takes any table of images.",
        )
    return importlib.import_module(f"latent_medi.recipes.{path.stem}")


def recipe_arguments(name: str, options: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    """Arguments for a recipe's ``build`` from options that are written as text.

    Args:
        name: The recipe's name.
        options: Text, or a list of texts, by the name of the argument. The folders, the patch size, the seed and the
            number of processes are no options: every recipe takes them.

    Returns:
        The same as paths, numbers, texts and lists.

    Raises:
        UserError: The recipe does not take an option, its value is of another kind, or a file is not there.
    """
    from latent_medi.recipes._common import Options  # which imports the libraries of tables and images

    build = load_recipe(name).build
    annotations = typing.get_type_hints(build)
    taken = [p for p in inspect.signature(build).parameters if p not in ("source", "out", "patch_size", "options")]
    kinds = {option: annotations[option] for option in taken}
    kinds |= {option: kind for option, kind in typing.get_type_hints(Options).items() if option not in ("seed", "jobs")}
    found = {}
    for option, value in options.items():
        if option not in kinds:
            raise UserError(
                f"The recipe {name!r} takes no {option}; {nearest(option, kinds)}.",
                f"`latent-medi shards {name} --help` lists its options.",
            )
        found[option] = _argument(value, kinds[option], f"{option} of the recipe {name!r}")
    return found


def _argument(value: str | Sequence[str], annotation: Any, what: str) -> Any:
    """A text as a value of an annotation: ``Path | None``, ``int``, ``float``, ``str``, a choice, or a list."""
    members = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kind = next(member for member in members if member is not type(None))
    if typing.get_origin(kind) is Sequence:
        return [value] if isinstance(value, str) else list(value)
    if not isinstance(value, str):
        raise UserError(f"{what} is a list.", "Give one value.")
    if kind is Path:
        path = Path(expand(value, what))
        if not path.exists():
            raise UserError(f"{what} is {value}, which does not exist.", "Give the file's path.")
        return path
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            raise UserError(f"{what} is {value!r}, no number.") from None
    if (words := typing.get_args(kind)) and value not in words:
        raise UserError(f"{what} is {value!r}; {nearest(value, words)}.")
    return value
