"""The documentation as a site: it builds without a warning, has a page for each verb and quotes the program rightly."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import browser, needs_chromium
from commands import REPOSITORY

from latent_medi.verbs import VERBS

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = ("metrics.md", "architecture.md", "glossary.md")
"""Pages to look things up in."""


@pytest.mark.slow
@needs_chromium
def test_the_site_builds_without_a_warning_and_is_searched_without_a_connection(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert len(sorted(site.rglob("*.html"))) >= len(PAGES)
    with browser(tmp_path / "profile") as page:
        for name, width in (("index", 390), ("verbs/select", 1280)):
            page.open(site / f"{name}.html", width)
            assert (page.problems, page.requests) == ([], [])
        assert page.value("document.querySelector('article').innerText.includes('farthest')")  # a setting, in its table
        page.value("document.querySelector('.md-search__input').focus()")
        for key in "macenko":
            page.press(key)
        end = time.monotonic() + 60
        while not page.value("document.querySelectorAll('.md-search-result__item').length"):
            assert time.monotonic() < end, "the search finds nothing"
            time.sleep(0.1)
        assert (page.problems, page.requests) == ([], [])


def test_every_verb_has_a_page_in_the_contents() -> None:
    contents = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for verb in [name for name in VERBS if " " not in name]:
        assert (DOCS / "verbs" / f"{verb}.md").is_file(), verb
        assert f"verbs/{verb}.md" in contents, verb
    for page in PAGES:
        assert f" {page.relative_to(DOCS)}\n" in contents, page.name


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in REFERENCE], ids=lambda p: str(p.relative_to(DOCS)))
def test_no_page_is_too_long_to_read(page: Path) -> None:
    prose = re.sub(
        r"```.*?```|^\|.*$|^<!--.*?-->$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert len(prose.split()) < 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_lines_are_short(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not [line for line in text.split("\n") if len(line) > 120 and not line.startswith(("|", "!"))]


def test_errors_on_the_page_about_errors_are_those_of_the_program() -> None:
    said = [text for file in (REPOSITORY / "latent_medi").rglob("*.py") for text in _texts(file)]
    said.append((REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for message in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE):
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in said), message


def _texts(file: Path) -> list[str]:
    """Every text of a module; what is filled in is "…"."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found
