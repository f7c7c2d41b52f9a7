"""Being told to stop: a cluster's pre-emption notice becomes a checkpoint and an exit code that means "resume me"."""

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
"""Updates between agreements of several processes; a signal reaches them at different moments."""


@dataclass
class Notice:
    """Whether SIGTERM or SIGUSR1 has come.

    Args:
        given: The signal's name; "" for none.
    """

    given: str = ""

    def agreed(self, accelerator: Accelerator, update: int) -> bool:
        """Whether to stop after this update, the same answer in every process.

        Args:
            accelerator: The processes.
            update: Number of the update, the same in every process.
        """
        if accelerator.num_processes == 1:
            return bool(self.given)
        if update % _AGREE_EVERY:
            return False
        told = torch.tensor([float(bool(self.given))], device=accelerator.device)
        return bool(accelerator.reduce(told, "sum").item() > 0)


@contextmanager
def listening() -> Iterator[Notice]:
    """Take note of SIGTERM or SIGUSR1 instead of ending at once. More of them change nothing, since a cluster may reach
    a process both directly and through its launcher; SIGINT ends at once as ever.
    """
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():  # only there Python lets signals be handled
        yield notice
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def note(number: int, _: object) -> None:
        if not notice.given:
            notice.given = signal.Signals(number).name
            logger.warning("%s: stopping as soon as what is done is saved", notice.given)

    for number in before:
        signal.signal(number, note)
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
