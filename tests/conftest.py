"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real patches, slides and weights that are not part of the repository."""
    folder = Path(os.environ.get("LATENT_MEDI_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the folder of real inputs at {folder} (set LATENT_MEDI_SHARED)")
    return folder
