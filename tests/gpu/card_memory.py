"""A limit on a device's memory: the allocator's own on a GPU; on the CPU one on every tensor, which raises alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made, and refuses those above a limit."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        size = max(made, default=0)
        self.largest = max(self.largest, size)
        if size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nMore is told.")
        return result


def needed(device: str, work: Callable[[], Any]) -> int:
    """Bytes that some work takes: what the allocator reserves for it on a GPU, its largest tensor on the CPU."""
    if device == "cpu":
        with _Largest() as noted:
            work()
        return noted.largest
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_reserved() - before


@contextmanager
def at_most(device: str, size: int) -> Iterator[None]:
    """Let work take so many bytes, beyond what is taken already."""
    if device == "cpu":
        with _Largest(size):
            yield
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
