"""AdamW, in fp32 or with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from latent_medi.core.errors import UserError
from latent_medi.training.settings import TrainSettings


def build_optimizer(parameters: Iterable[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings: AdamW as one fused kernel, or with its two moments in 8 bits.

    8-bit moments take a quarter of the memory.

    Raises:
        UserError: The 8-bit one is not installed.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer=adamw8bit needs bitsandbytes.", "pip install 'latent-medi[lowmem]'") from None
    return AdamW8bit(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
