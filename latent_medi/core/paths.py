"""Paths as people write them in settings: ``~`` is the home folder and ``$NAME`` or ``${NAME}`` a variable of the
environment.
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated

from latent_medi.core.errors import UserError

PATH = "path"
"""Mark of a setting that is a file or folder."""

PathText = Annotated[str, PATH]
"""Type of a setting that is a file or folder, or may be one: a name, a hub id, a URL."""

_DOLLAR = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([^}]*)\})")


def expand(text: str, what: str = "") -> str:
    """A path with ``~`` and variables replaced; ``$$`` becomes a dollar sign. A URL such as ``s3://…`` is not changed.

    Args:
        text: The path as written.
        what: Name of the setting in messages.

    Raises:
        UserError: A variable that is not set, or a user who has no home folder.
    """
    if "://" in text:
        return text
    named = f"{what} is {text!r}" if what else repr(text)

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] or match[3]
        if name not in os.environ:
            raise UserError(
                f"{named}, and the variable ${name} is not set.", f"Set {name}, or write $$ for a dollar sign."
            )
        return os.environ[name]

    home = ""
    if text.startswith("~"):
        user, slash, rest = text.partition("/")
        if (home := os.path.expanduser(user)) == user:
            raise UserError(
                f"{named}, and {user} has no home folder.", f"Write ./{text} for a name that starts with ~."
            )
        text = slash + rest
    return home + _DOLLAR.sub(value, text)


def escaped(path: str) -> str:
    """A path written so that :func:`expand` returns it unchanged."""
    if "://" in path:
        return path
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def path_argument(text: str) -> Path:
    """An argument of the command line as a path, for ``argparse``."""
    try:
        return Path(expand(text))
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
