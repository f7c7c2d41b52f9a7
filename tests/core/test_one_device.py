"""One process has one device, however many verbs run in it."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import Accelerator

from latent_medi import launch


def test_a_later_step_of_a_process_does_not_ask_for_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate refuses that with a traceback, where a step on a GPU was followed by one told to use the CPU."""
    launch.make_accelerator()
    asked: list[bool] = []

    def noted(cpu: bool, **options: Any) -> Accelerator:
        asked.append(cpu)
        return Accelerator(cpu=cpu, **options)

    monkeypatch.setattr(launch, "Accelerator", noted)
    launch.make_accelerator(cpu=True)
    assert asked == [False]
