"""Where the tests of the marker ``gpu`` run: on a card; on the CPU if LATENT_MEDI_GPU_TESTS_DEVICE=cpu asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

DEVICE = os.environ.get("LATENT_MEDI_GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a card that is not there."""
    if DEVICE == "cpu" or torch.cuda.is_available():
        return
    why = "needs a GPU (LATENT_MEDI_GPU_TESTS_DEVICE=cpu runs it on the CPU)"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device() -> Iterator[str]:
    """The device under test; Accelerate, which knows one per process, forgets the one before and after."""
    forget()
    yield DEVICE
    forget()


def forget() -> None:
    """Let Accelerate choose its device again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
