"""What a device can do: batches that fit into its memory, full-precision fp32, and support for bf16."""

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
    """A batch size that is halved each time the device's memory is full, and stays halved.

    Args:
        task: What is done with the samples, for the log.
        remedy: What to do if not even one sample fits.
        size: Samples per batch; 0 for all at once.

    Attributes:
        size: The current batch size.
    """

    def __init__(self, task: str, remedy: str, size: int = 0) -> None:
        self.task, self.remedy, self.size = task, remedy, size

    def over(self, count: int, work: Callable[[slice, int], T], at_most: int = 0) -> Iterator[tuple[slice, T]]:
        """Call ``work`` for samples 0 … ``count`` − 1, batch by batch; retry with smaller batches if memory is full.

        Args:
            count: Number of samples.
            work: Takes the samples of a batch as a slice, and the batch size; the last batch may be smaller.
            at_most: Largest batch size, besides :attr:`size`; 0 for no further limit.

        Yields:
            The slice of each batch, in order, and the result of ``work``.

        Raises:
            UserError: The memory is too small for one sample.
        """
        done = 0
        while done < count:
            size = self.size or count
            if at_most:
                size = min(size, at_most, count)
            part, full = slice(done, min(done + size, count)), ""
            try:
                result = work(part, size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                full = str(error).splitlines()[0]
            if full:  # outside the handler, which keeps the tensors of the failed call alive
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
    """Free unused memory, also for other processes on the same GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if this process does not use CUDA


def check_precision(precision: str | torch.dtype | None, device: torch.device | str) -> None:
    """Refuse bf16 on a GPU that only emulates it: that is slower than fp32, and cannot be compiled.

    Args:
        precision: A setting's value, or a dtype.
        device: The device.

    Raises:
        UserError: The GPU does not support bf16; names the GPU.
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
    """Context or decorator that computes matrix products and convolutions in fp32, not in TF32.

    TF32, cuDNN's default for convolutions, rounds factors to ten bits: a relative error of 1e-3 instead of 1e-7. The
    setting belongs to the process: the first thread that enters turns TF32 off, the last one that leaves restores the
    earlier setting.
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
    """Compute in fp32, not in TF32, from now on in this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for part in _newer():  # an unset part would follow the general setting
        part.fp32_precision = "ieee"


def _newer() -> list[Any]:
    """Where torch has the same settings since 2.9, in addition to the older names."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]


def _state() -> dict[tuple[Any, str], Any]:
    """The current settings, by place; older names that cannot be read because both kinds were set are left out."""
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
