"""AdamW, in fp32 or with 8-bit moments, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from latent_medi.core.errors import UserError
from latent_medi.training.settings import TrainSettings


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], settings: TrainSettings, undecayed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of the settings: AdamW as one fused kernel, or with its two moments in 8 bits.

    8-bit moments take a quarter of the memory.

    Args:
        parameters: What it trains.
        settings: The run.
        undecayed: The last so many of the parameters have no weight decay.

    Raises:
        UserError: The 8-bit one is not installed.
    """
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    trained = list(parameters)
    decayed = len(trained) - undecayed
    groups: list[dict[str, Any]] = [{"params": trained[:decayed]}]
    if undecayed:
        groups.append({"params": trained[decayed:], "weight_decay": 0.0})
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer=adamw8bit needs bitsandbytes.", "pip install 'latent-medi[lowmem]'") from None
    return AdamW8bit(groups, **common)


def learning_rate(images: int, settings: TrainSettings) -> float:
    """Learning rate of the update that starts at ``images`` images seen.

    A linear rise from 0 over the warm-up, then half a cosine that reaches 0 at the end of the run; or a constant; or
    lr/√max(images/decay_images, 1) (Karras et al. 2024, arXiv 2312.02696, equation 67).
    """
    lr, total, warmup = settings.lr, settings.total_images, settings.total_warmup_images
    if images < warmup:
        return lr * images / warmup
    if settings.schedule == "constant":
        return lr
    if settings.schedule == "inverse_sqrt":
        return lr / math.sqrt(max(images / settings.decay_images, 1.0))
    share = min(1.0, (images - warmup) / max(total - warmup, 1))
    return lr * 0.5 * (1.0 + math.cos(math.pi * share))
