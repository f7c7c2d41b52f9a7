"""Preemption: a signal from the cluster makes training save a checkpoint and exit with a code that means "resume"."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from latent_medi.core.progress import get_logger

logger = get_logger("training")

_AGREE_EVERY = 10
"""Updates after which several processes compare whether they got a signal: it reaches them at different times."""


@dataclass
class Notice:
    """Whether the process got SIGTERM or SIGUSR1.

    Args:
        given: The name of the signal; "" for none.
    """

    given: str = ""

    def agreed(self, accelerator: Accelerator, update: int) -> bool:
        """Whether to stop after this update; the answer is the same in all processes.

        Args:
            accelerator: The processes.
            update: Number of the update, the same in all processes.
        """
        if accelerator.num_processes == 1:
            return bool(self.given)
        if update % _AGREE_EVERY:
            return False
        given = torch.tensor([float(bool(self.given))], device=accelerator.device)
        return bool(accelerator.reduce(given, "sum").item() > 0)


@contextmanager
def listening() -> Iterator[Notice]:
    """Record SIGTERM and SIGUSR1 instead of ending at once. Repeated signals change nothing, because a cluster may
    signal a process both directly and through its launcher. SIGINT still ends the process.
    """
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield notice
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def note(number: int, _: object) -> None:
        if not notice.given:
            notice.given = signal.Signals(number).name
            logger.warning("%s: saving a checkpoint, then stopping", notice.given)

    for number in before:
        signal.signal(number, note)
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
