"""Help for DistributedDataParallel (DDP), so that memory and numbers are those of one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def settle(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[], None], resumed: bool, parts: int
) -> None:
    """Bring DDP into the state that it has after its first updates, by passes that change no weight and no buffer.

    Nothing happens without DDP. There are two reasons for such passes:

    - After its first pass DDP sums gradients in another order, which more than two processes see in the last bit. An
      unbroken run did that pass at its beginning, so a resumed run does it too.
    - Gradients become views of DDP's buckets only in a pass that is synchronised, and the first parts of an update are
      not. Their gradients would take a copy as large as the weights. So an update of several parts starts with
      gradients that are already views, zeroed (:func:`clear`), of the buckets that DDP rebuilds for its second pass.

    Args:
        model: The model, wrapped or not.
        optimizer: Of its parameters.
        backward: A pass over any images; every process must call it equally often.
        resumed: Whether the run continues from a checkpoint.
        parts: Parts of an update.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    passes = 2 if parts > 1 else int(resumed)
    kept = [buffer.clone() for buffer in model.buffers()]  # such as batch normalisation's statistics
    for number in range(passes):
        backward()
        clear(model, optimizer, parts if number + 1 == passes else 1)
    for buffer, before in zip(model.buffers(), kept, strict=True):
        buffer.copy_(before)


def clear(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int) -> None:
    """Delete the gradients of an update; with DDP and several parts, zero them in DDP's buckets instead."""
    stay = parts > 1 and isinstance(model, DistributedDataParallel)
    optimizer.zero_grad(set_to_none=not stay)


def compile_whole(checkpointing: bool, processes: int) -> None:
    """Compile a network as one graph where older versions of torch cannot split it along DDP's buckets.

    A split graph synchronises buckets during the backward pass. Before 2.15, torch cannot split a network with
    recomputed blocks.
    """
    if checkpointing and processes > 1 and torch.__version__ < "2.15":
        torch._dynamo.config.optimize_ddp = False
