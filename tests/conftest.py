"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let continuous integration run the slow tests in turns."""
    parser.addoption("--slow-quarter", type=int, default=None, help="0 to 3: only this quarter of the slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one quarter of the slow tests if asked to, chosen by their names."""
    quarter = config.getoption("--slow-quarter")
    if quarter is None:
        return
    kept = [item for item in items if not item.get_closest_marker("slow") or crc32(item.nodeid.encode()) % 4 == quarter]
    config.hook.pytest_deselected([item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real patches, slides and weights that are not part of the repository."""
    folder = Path(os.environ.get("LATENT_MEDI_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the folder of real inputs at {folder} (set LATENT_MEDI_SHARED)")
    return folder
