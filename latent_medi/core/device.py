"""A device's limits, the same in every room: batches that its memory holds, fp32 that is fp32, bf16 that it has."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger

T = TypeVar("T")

logger = get_logger("device")


class HalvedBatch:
    """How many samples pass through a device at a time: halved each time that its memory was full, and kept.

    Args:
        task: What is done with them, for the log.
        remedy: What helps where not even one sample fits.
        size: Samples at a time; 0 takes as many as there are.

    Attributes:
        size: The same, as far as it was halved.
    """

    def __init__(self, task: str, remedy: str, size: int = 0) -> None:
        self.task, self.remedy, self.size = task, remedy, size

    def over(self, count: int, work: Callable[[slice, int], T], at_most: int = 0) -> Iterator[tuple[slice, T]]:
        """Do some work for samples 0 … ``count`` − 1, part by part, and again in smaller parts where memory was full.

        Args:
            count: Samples.
            work: Takes the samples of a part, and the size of a whole part, which the last one may fall short of.
            at_most: Samples at a time, beside :attr:`size`; 0 for no further limit.

        Yields:
            Each part, in order, with what the work gave.

        Raises:
            UserError: The memory is too small for a single sample.
        """
        done = 0
        while done < count:
            size = self.size or count  # the whole size, for whoever fills a short part up
            if at_most:
                size = min(size, at_most, count)
            part, full = slice(done, min(done + size, count)), ""
            try:
                result = work(part, size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                full = str(error).splitlines()[0]
            if full:  # outside the handler, which would keep the failed pass's tensors alive
                self._halve(size, full)
                continue
            yield part, result
            done = part.stop

    def _halve(self, size: int, why: str) -> None:
        if size == 1:
            raise UserError(f"The device's memory is too small for one image: {why}", self.remedy)
        self.size = size // 2
        release_memory()
        logger.warning("%s: the device's memory is full: going on with batches of %d", self.task, self.size)


def release_memory() -> None:
    """Give memory back that nothing uses any more, to other processes on the same GPU too."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_precision(precision: str | torch.dtype | None, device: torch.device | str) -> None:
    """Refuse bf16 on a GPU that only emulates it, slower than fp32 and without compilation.

    Args:
        precision: Word of the settings, or type.
        device: Where it would be computed.

    Raises:
        UserError: Names the GPU.
    """
    if precision not in ("bf16", torch.bfloat16) or torch.device(device).type != "cuda":
        return
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"The GPU {torch.cuda.get_device_name()} does not compute in bf16; it only emulates it, slower than fp32.",
            "Set precision to fp16 or fp32.",
        )


_lock = threading.Lock()
_inside = 0
_before: dict[tuple[Any, str], Any] = {}


@contextmanager
def exact_fp32() -> Iterator[None]:
    """While it lasts, fp32 is fp32: no matrix product or convolution rounds its factors to TF32's ten bits.

    That is cuDNN's default, off by 1e-3 where fp32 is off by 1e-7. As a decorator, it lasts while the function does.
    The setting is the process's, for all of its threads: the first to enter turns TF32 off, and the last to leave puts
    back what was set before.
    """
    global _inside
    with _lock:
        if not _inside:
            _before.update(_state())
            turn_tf32_off()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _put_back()
                _before.clear()


def turn_tf32_off() -> None:
    """The same from now on, in this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for part in _newer():  # what says nothing by itself would follow a general setting
        part.fp32_precision = "ieee"


def _newer() -> list[Any]:
    """Where torch keeps the same since 2.9, beside its older names; it reads the two together."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]


def _state() -> dict[tuple[Any, str], Any]:
    """What is set now, by place; the older names cannot be read where somebody mixed both."""
    places: list[tuple[Any, str]] = [(torch.backends.cudnn, "allow_tf32"), (torch, "float32_matmul_precision")]
    places += [(part, "fp32_precision") for part in _newer()]
    found: dict[tuple[Any, str], Any] = {}
    for place, name in places:
        try:
            found[place, name] = torch.get_float32_matmul_precision() if place is torch else getattr(place, name)
        except RuntimeError:
            continue
    return found


def _put_back() -> None:
    for (place, name), value in _before.items():
        if place is torch:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(place, name, value)
