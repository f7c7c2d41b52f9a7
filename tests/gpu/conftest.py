"""Where the tests of the marker ``gpu`` run: on a card; on the CPU if LATENT_MEDI_GPU_TESTS_DEVICE=cpu asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tiny_runs import forget_device

DEVICE = os.environ.get("LATENT_MEDI_GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a card that is not there."""
    if DEVICE == "cpu" or torch.cuda.is_available():
        return
    why = "needs a GPU (LATENT_MEDI_GPU_TESTS_DEVICE=cpu runs it on the CPU)"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """The device that tests of a card run on; Accelerate may choose another in each test."""
    forget_device()
    yield DEVICE
    forget_device()
