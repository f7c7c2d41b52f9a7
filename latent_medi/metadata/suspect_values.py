"""Finding values that differ in spelling only or look like a word for missing. A person decides; nothing is changed."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

# These words are not read as missing, because each is a real value somewhere: NA is a TCGA code, None a grade.
_WORDS_FOR_MISSING = frozenset(
    {"na", "n/a", "n.a", "n.a.", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "none", "null", "nil", "missing", "unk"}
    | {"unspecified", "undefined", "undetermined", "not applicable", "not specified", "not recorded", "not known"}
    | {"not allowed to collect", "not done", "no data", "discrepancy", "tbd"}
    | {"-", "---", "–", "—", "?", "??", "???", ".", "..", "..."}
)


_TCGA_CODE = re.compile("[A-Z0-9]{2}")


def are_tcga_codes(values: Iterable[str]) -> bool:
    """Whether values look like TCGA's codes of tissue source sites, of which NA is one: two signs each, some digits."""
    found = list(values)
    return all(_TCGA_CODE.fullmatch(value) for value in found) and any(re.search("[0-9]", value) for value in found)


def plain_spelling(value: str) -> str:
    """``value`` with case, Unicode form, and kind and number of blanks normalised, without zero-width characters."""
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
    """Whether a value looks like a word for missing that is not read as missing, such as ``nan`` or ``N/A``."""
    word = plain_spelling(value)
    return word in _WORDS_FOR_MISSING or word.strip("[]()<>{}'\" ") in _WORDS_FOR_MISSING | {""}
