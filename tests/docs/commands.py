"""The commands that the documentation shows: those in code blocks, in the headers of configurations, in docstrings of
modules, and whole ones within a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "latent-medi",
    "accelerate",
    "python",
    "python3",
    "sbatch",
    "make",
    "sh",
    "pytest",
    "hf",
    "gdc-client",
    "pip",
    "source",
    "cd",
    "wandb",
)
_COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(PROGRAMS)})(?: |$)")
_NOTE = re.compile(r"\s+#\s.*$|\s{3,}\(.*\)$")


@dataclass(frozen=True)
class Command:
    """A command as a page shows it.

    Args:
        text: On one line, without comments.
        where: File and line.
        inline: Whether it stands within a sentence.
    """

    text: str
    where: str
    inline: bool = False


def documented_commands() -> list[Command]:
    """Every command of the documentation, file by file."""
    pages = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "shards/README.md")]
    pages += sorted((REPOSITORY / "docs").rglob("*.md"))
    found = [command for page in pages for command in _of_page(page)]
    configs = REPOSITORY / "configs"
    for file in sorted([*configs.rglob("*.yaml"), *configs.rglob("*.sh")]):
        lines = file.read_text(encoding="utf-8").split("\n")
        comments = [(i, line[1:]) for i, line in enumerate(lines, 1) if line.startswith("#")]
        found += [*_of_block(comments, file), *_of_sentences(comments, file)]
    folders = [REPOSITORY / name for name in ("latent_medi", "benchmarks", "shards")]
    for file in sorted([*REPOSITORY.glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py"))]):
        document = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
        numbered = list(enumerate(document.split("\n"), 1))
        found += [*_of_block(numbered, file), *_of_sentences(numbered, file)]
    return found


def _of_page(page: Path) -> Iterator[Command]:
    """Of a page in Markdown: blocks without a language or of a shell, and indented ones outside lists."""
    block: list[tuple[int, str]] = []
    text: list[tuple[int, str]] = []
    language: str | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip().startswith("```"):
            language = line.strip()[3:] if language is None else None
            continue
        if language is None and not line.startswith("    "):
            text.append((number, line))
        elif language in (None, "", "sh", "bash"):
            block.append((number, line))
    yield from _of_block(block, page)
    yield from _of_sentences(text, page)


def _of_block(lines: list[tuple[int, str]], file: Path) -> Iterator[Command]:
    """Lines that are commands, with those that a backslash joins to them."""
    at = 0
    while at < len(lines):
        number, line = lines[at]
        at += 1
        if not _COMMAND.match(line.strip()):
            continue
        text = _NOTE.sub("", line.strip())
        while text.endswith("\\") and at < len(lines):
            text = text[:-1] + _NOTE.sub("", lines[at][1].strip())
            at += 1
        yield Command(" ".join(text.split()), f"{file.relative_to(REPOSITORY)}:{number}")


def _of_sentences(lines: list[tuple[int, str]], file: Path) -> Iterator[Command]:
    """Commands between backticks, also over the end of a line."""
    text = "\n".join(line for _, line in lines)
    for match in re.finditer(r"(`{1,2})([^`]+)\1", text):
        words = " ".join(match[2].split())
        if _COMMAND.match(words):
            number = lines[text.count("\n", 0, match.start())][0]
            yield Command(words, f"{file.relative_to(REPOSITORY)}:{number}", inline=True)
