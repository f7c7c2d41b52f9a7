"""Every command that the documentation shows is run at a size for tests, or says on its page what it needs."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PROGRAMS, REPOSITORY, Command, documented_commands
from listed import ELSEWHERE, NEEDS
from long_scenes import LONG
from running import run_here, run_launched, words_of
from scenes import SCENES, Row

from latent_medi.verbs import VERBS

COMMANDS = documented_commands()
LISTED: dict[str, object] = {
    **{row.command: row for _, rows in (*SCENES.values(), *LONG.values()) for row in rows if not row.prepares},
    **ELSEWHERE,
    **NEEDS,
}


def entry_of(text: str) -> str:
    """The longest listed beginning of a command; "" if there is none."""
    return max((known for known in LISTED if text.startswith(known)), key=len, default="")


def is_a_name(command: Command) -> bool:
    """Whether a sentence names a program, a verb or a target of make, and shows no command."""
    words = command.text.split()
    if not command.inline or len(words) == 1:
        return command.inline
    if words[0] == "make":
        return len(words) == 2 or "=" in words[-1]
    if words[0] == "latent-medi":
        named = words[1:-1] if words[-1] in ("…", "--help", "--config") else words[1:]
        return words[1] == "VERB" or (len(named) <= 2 and all(re.fullmatch(r"[a-zA-Z-]+", word) for word in named))
    if words[0] == "accelerate":
        return not any("=" in word or word in ("--config", "…") for word in words)
    return words[0] in ("sbatch", "python") and not any("/" in word or "=" in word for word in words)


def test_every_command_is_listed() -> None:
    unlisted = [
        f"{c.where}: {c.text}"
        for c in COMMANDS
        if not is_a_name(c) and not entry_of(c.text) and c.text.split()[0] != "make" and "benchmarks/" not in c.text
    ]
    assert not unlisted, "list them in tests/docs:\n" + "\n".join(unlisted)


def test_nothing_is_listed_that_no_page_shows() -> None:
    used = {entry_of(command.text) for command in COMMANDS}
    assert set(LISTED) <= used, sorted(set(LISTED) - used)


def test_names_within_sentences_are_those_of_programs_verbs_and_targets() -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for command in COMMANDS:
        words = command.text.split()
        if words[0] == "latent-medi" and words[1:] and words[1] not in ("VERB", "…"):
            assert words[1] in VERBS, f"{command.where}: {command.text}"
        if words[0] == "make" and words[1:]:
            assert words[1] in targets, f"{command.where}: {command.text}"
    assert set(PROGRAMS) >= {command.text.split()[0] for command in COMMANDS if is_a_name(command)}


def test_what_a_command_needs_stands_on_its_page() -> None:
    for command in COMMANDS:
        needed = NEEDS.get(entry_of(command.text), "")
        page = (REPOSITORY / command.where.rpartition(":")[0]).read_text(encoding="utf-8")
        assert needed in page, f"{command.where}: {command.text} needs words on the page: {needed}"


def test_what_another_test_runs_is_run_there() -> None:
    for command, (place, words) in ELSEWHERE.items():
        path = REPOSITORY / "tests" / place
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        assert any(words in _said(file) for file in files), command


def _said(file: Path) -> set[str]:
    """The texts in a file's code, but for documentation, and the functions that it calls."""
    tree, found, documentation = ast.parse(file.read_text(encoding="utf-8")), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            documentation.add(id(node.value))
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found.add(node.value)
    return found


def test_benchmarks_know_the_options_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [c for c in COMMANDS if c.text.startswith("python benchmarks/")]
    helps: dict[str, str] = {}
    for command in shown:
        file = command.text.split()[1]
        if file not in helps:
            assert run_here(["python", file, "--help"]) == 0, command.where
            helps[file] = capsys.readouterr().out.split("\noptions:")[-1]
        for option in re.findall(r"--[\w-]+", command.text):
            assert option in helps[file], f"{command.where}: {file} has no option {option}"


@pytest.mark.parametrize("name", ["own", *(pytest.param(n, marks=pytest.mark.slow) for n in SCENES if n != "own")])
def test_commands_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "tcga":
        shared = request.getfixturevalue("shared") / "data" / "tcga_metadata"
        if not shared.is_dir():
            pytest.skip(f"{shared} is absent")
        monkeypatch.setenv("TABLES", str(shared))
    _run_scene(*SCENES[name], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_commands_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "prostate":
        monkeypatch.setenv("MODELS", str(request.getfixturevalue("shared") / "models"))
    _run_scene(*LONG[name], tmp_path, monkeypatch)


def _run_scene(prepare: Callable[[], object], rows: list[Row], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare the folder, and run each row's commands there, each text once."""
    monkeypatch.chdir(folder)
    prepare()
    where: dict[str, str] = {}
    for command in COMMANDS:
        where.setdefault(command.text, command.where)
    for row in rows:
        if row.before:
            row.before()
        if row.prepares:
            assert run_here(words_of(row.command, row.extra)) == row.code, row.command
        for text, place in where.items():
            if row.prepares or entry_of(text) != row.command:
                continue
            placed = text
            for given, path in row.places.items():
                placed = placed.replace(given, path)
            words = words_of(placed, row.extra)
            code = run_launched(words) if row.launched else run_here(words)
            assert code == row.code, f"{place}: {text}\nrun as: {' '.join(words)}"
