"""Values that look like one value spelled twice, or like a word for missing: questions to a person, never a rule."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

# Not among the words that are read as missing, since each is somebody's real value: NA is a code of TCGA, None a grade.
_WORDS_FOR_MISSING = frozenset(
    {
        "na", "n/a", "n.a", "n.a.", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "none", "null", "nil", "missing",
        "unk", "unspecified", "undefined", "undetermined", "not applicable", "not specified", "not recorded",
        "not known", "not allowed to collect", "not done", "no data", "discrepancy", "tbd",
        "-", "---", "–", "—", "?", "??", "???", ".", "..", "...",
    }
)  # fmt: skip


def plain_spelling(value: str) -> str:
    """``value`` without what people and programs vary: case, composed and decomposed Unicode, kinds of blanks, how many
    of them, and characters that have no width."""
    text = unicodedata.normalize("NFKC", value)
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf").casefold()
    return unicodedata.normalize("NFKC", re.sub(r"\s+", " ", text)).strip()


def spelled_alike(values: Iterable[str]) -> list[list[str]]:
    """Groups of two or more values that differ in spelling only, each sorted, in order of their first value."""
    groups: dict[str, set[str]] = defaultdict(set)
    for value in values:
        groups[plain_spelling(value)].add(value)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def looks_missing(value: str) -> bool:
    """Whether a value looks like a word for missing that is not read as such, such as ``nan``, ``N/A`` or
    ``[Not Applicable]``."""
    word = plain_spelling(value)
    return word in _WORDS_FOR_MISSING or word.strip("[]()<>{}'\" ") in _WORDS_FOR_MISSING | {""}
