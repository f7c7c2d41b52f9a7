"""The drawing of the rooms is what the imports say, and no room or file imports one that imports it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_circle_between_rooms_or_files(architecture: ModuleType) -> None:
    files = architecture.file_imports()
    assert architecture.circle(files) == []
    assert architecture.circle(architecture.room_imports(files)) == []
    assert architecture.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_drawing_and_the_page_are_of_today(architecture: ModuleType) -> None:
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == architecture.drawing(), (
        "run `python docs/architecture.py`"
    )
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for room in architecture.room_imports(architecture.file_imports()):
        assert f"**{room}**" in page or room == "command line", room


def test_base_names_of_test_files_are_unique() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
