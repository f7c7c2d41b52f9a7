"""Code, messages, help texts and configurations use the words of docs/glossary.md.

``python tests/test_vocabulary.py`` prints where each banned word still stands.
"""

from __future__ import annotations

import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BANNED = {
    "told": "reports, says, or conditioned on",
    "tells": "reports, says, or conditioned on",
    "untold": "not conditioned on",
    "deals": "real splits",
    "dealt": "split, divided",
    "rival": "baseline",
    "rivals": "baselines",
    "lesson": "training set",
    "lessons": "training sets",
    "learner": "classifier",
    "learners": "classifiers",
    "arm": "synthetic set, training set or model",
    "arms": "synthetic sets, training sets or models",
    "judge": "evaluate, score or classify",
    "judges": "evaluates, scores or classifies",
    "judged": "evaluated, scored or classified",
    "beside": "next to, or besides",
    "look ahead": "preflight",
    "look_ahead": "preflight",
    "what is more": "also",
    "the short of it": "in short",
    "side by side": "in parallel, or in one table",
    "way out of the noise": "denoising trajectory",
    "ceilings of probes": "accuracy on real patches",
    "convinced": "classified as",
}
"""Words and phrases whose use is never right, and what to write instead."""

NOT_YET: set[str] = set()
"""Banned words that are still in use. This set only shrinks."""

ALLOWED: set[tuple[str, str]] = {
    ("benchmarks/evaluation.py", "judged"),  # a key of its JSON output
    ("benchmarks/translation.py", "convinced"),  # a key of its JSON output
    ("latent_medi/experiment/shift_result.py", "arms"),  # a key of shift.json
    ("latent_medi/experiment/shift_result.py", "arm"),  # a column of shift.csv
    ("latent_medi/experiment/shift_benchmark.py", "arms"),  # a key of shift.json
    ("latent_medi/evaluation/real_baseline.py", "deals"),  # a key of floors.json
    ("latent_medi/evaluation/settings.py", "deals"),  # the name of a setting before it was renamed
    ("latent_medi/evaluation/settings.py", "arms"),  # likewise
    ("latent_medi/evaluation/summary.py", "arms"),  # a key of headline.json
    ("latent_medi/experiment/shift_benchmark.py", "arms"),  # a key of shift.json
    ("latent_medi/experiment/shift_result.py", "arms"),  # likewise
    ("latent_medi/experiment/shift_result.py", "arm"),  # a column of shift.csv
}
"""(File, word) where the word must stay, such as a key of a file that earlier versions wrote."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TEXTS = {
    tokenize.COMMENT,
    tokenize.STRING,
    getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
}


def files() -> list[Path]:
    """Source files, templates and configurations of the product."""
    found = [ROOT / "train.py", ROOT / "sample.py"]
    for folder in ("latent_medi", "shards", "benchmarks", "configs"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".html", ".js", ".md")]
    return sorted(found)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every name, comment and string of a Python file; of every line of another file."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return
    with open(path, encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in _TEXTS or token.type == tokenize.NAME:
                yield token.start[0], token.string


def words(text: str) -> str:
    """A text's words in lower case with a blank around each: snake_case and CamelCase are several words."""
    return f" {' '.join(word.lower() for word in _WORD.findall(text))} "


def occurrences() -> dict[str, list[str]]:
    """By banned word, where it stands: ``FILE:LINE``."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for line, text in [(0, path.stem), *texts(path)]:
            spaced = words(text)
            for banned in BANNED:
                if f" {banned.replace('_', ' ')} " in spaced and (name, banned) not in ALLOWED:
                    found[banned].append(f"{name}:{line}")
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return occurrences()


@pytest.mark.parametrize("word", [word for word in BANNED if word not in NOT_YET])
def test_a_banned_word_is_not_used(word: str, found: dict[str, list[str]]) -> None:
    assert not found[word], f"{word!r}: write {BANNED[word]}; it is in {', '.join(found[word][:20])}"


if __name__ == "__main__":
    for word, places in sorted(occurrences().items(), key=lambda item: -len(item[1])):
        print(f"{word}: {len(places)}")
        print("  " + "\n  ".join(places))
