"""Words that a page explains where they stand, with the text of ``docs/glossary.md``."""

from __future__ import annotations

import functools
import re

from markupsafe import Markup, escape

from latent_medi.core.config import packaged

_ROW = re.compile(r"^\| (?P<terms>[^|]+) \| (?P<meaning>.+) \|$")
_CODE = re.compile(r"[`*]")


@functools.cache
def glossary() -> dict[str, str]:
    """The meaning of each term of the glossary, as plain text."""
    found: dict[str, str] = {}
    for line in (packaged("docs") / "glossary.md").read_text(encoding="utf-8").splitlines():
        if row := _ROW.match(line):
            meaning = _CODE.sub("", row["meaning"])
            found |= {term: meaning for term in row["terms"].split(", ") if term != "term"}
    return found


class Words:
    """The explained words of one page.

    Attributes:
        used: The meaning of each word that the page has so far, by its id on the page.
    """

    def __init__(self) -> None:
        self.used: dict[str, tuple[str, str]] = {}

    def name(self, label: str) -> Markup:
        """A name on the page, explained if the glossary has it."""
        return self(label) if label in glossary() else escape(label)

    def __call__(self, term: str, shown: str = "") -> Markup:
        """A word that is explained when it is pointed at, tapped, or reached with the keyboard.

        Args:
            term: The glossary's term.
            shown: The word on the page, if another form of it.

        Raises:
            KeyError: The glossary has no such term.
        """
        name = "w-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")
        self.used[name] = (term, glossary()[term])
        return Markup('<button type="button" class="term" popovertarget="{}">{}</button>').format(
            name, escape(shown or term)
        )
