"""File names for any texts: distinct, and valid on Linux, macOS and Windows."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

FORBIDDEN = r'[<>:"|?*\\/\x00-\x1f\x7f]'
"""Characters that some file system refuses."""
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?")  # devices of Windows, with any ending
_MOST_BYTES = 180  # of a name: file systems allow 255, minus an ending, a hash and a temporary prefix


def file_names(texts: Iterable[str], slash: str = "_", forbidden: str = FORBIDDEN) -> dict[str, str]:
    """A file name without an ending for each text: the text itself wherever every system accepts it as a name.

    Otherwise characters that are not allowed become ``_``. Where the names of two texts would be one file on some
    system (some ignore case or the Unicode form), a hash of the text is added to each name that is not its own text.

    Args:
        texts: The texts, in any order; the names do not depend on it.
        slash: What replaces ``/``.
        forbidden: Regular expression of a character that becomes ``_``.

    Returns:
        Name by text. No two names are equal, even without regard to case.
    """
    plain = {text: _plain(text, slash, forbidden) for text in sorted(set(texts))}
    sharing: dict[str, list[str]] = defaultdict(list)
    for text, name in plain.items():
        sharing[_folded(name)].append(text)
    names = {}
    for text, name in plain.items():
        alone = len(sharing[_folded(name)]) == 1
        first = next((t for t in sharing[_folded(name)] if plain[t] == t), "")
        names[text] = name if alone or text == first else f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return names


def _plain(text: str, slash: str, forbidden: str) -> str:
    name = re.sub(forbidden, "_", text.replace("/", slash))
    name = re.sub(r"[. ]+$", lambda end: "_" * len(end[0]), name)  # Windows drops them
    if name.startswith((".", "~")):  # hidden, or somebody's home
        name = f"_{name[1:]}"
    if not name or _RESERVED.fullmatch(name):
        name = f"_{name}"
    if len(name.encode()) > _MOST_BYTES:
        short = name.encode()[:_MOST_BYTES].decode(errors="ignore").rstrip(". ")
        name = f"{short}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
