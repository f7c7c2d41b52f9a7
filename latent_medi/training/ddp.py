"""What DistributedDataParallel needs to be told, so that memory and numbers are those of one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def settle(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[], None], resumed: bool, parts: int
) -> None:
    """Bring DDP to where it is after its first updates, by passes that change nothing; nothing without DDP.

    After its first pass DDP sums gradients in another order, which more than two processes see in the last bit. The
    unbroken run has that behind it, so a resumed one takes such a pass first. And gradients become views of DDP's
    buckets in a pass that is shared. Those of an update's first parts, which are not shared, would lie outside, a copy
    as large as the weights: so an update of several parts begins with gradients that are views, zeroed
    (:func:`clear`), of the buckets that DDP forms anew for its second pass.

    Args:
        model: The model, wrapped or not.
        optimizer: Of its parameters.
        backward: A pass over any images; every process calls it as often.
        resumed: Whether the run goes on from a checkpoint.
        parts: Parts of an update.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    passes = 2 if parts > 1 else int(resumed)
    for number in range(passes):
        backward()
        clear(model, optimizer, parts if number + 1 == passes else 1)


def clear(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int) -> None:
    """Forget the gradients of an update; with DDP and several parts, zero them where they are, in DDP's buckets."""
    stay = parts > 1 and isinstance(model, DistributedDataParallel)
    optimizer.zero_grad(set_to_none=not stay)


def compile_whole(checkpointing: bool, processes: int) -> None:
    """Have a network compiled in one piece where older versions of torch cannot cut it along DDP's buckets.

    Cut, the buckets are shared while the backward pass goes on; but before 2.15 torch refuses to cut a network with
    recomputed blocks.
    """
    if checkpointing and processes > 1 and torch.__version__ < "2.15":
        torch._dynamo.config.optimize_ddp = False
