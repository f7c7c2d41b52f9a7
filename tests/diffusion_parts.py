"""A tiny network, and a count of what is done with tensors."""

from __future__ import annotations

import torch
from parts import small_model
from torch.utils._python_dispatch import TorchDispatchMode

from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.metadata.schema import Schema

PATTERNS = {"keep_all": 0.7, "all_null": 0.1, "metadata_null": 0.1, "independent": 0.1, "independent_rate": 0.5}


def make_denoiser(schema: Schema | None, seed: int = 0, patterns: dict[str, float] | None = None) -> Denoiser:
    """A random denoiser of 4×8×8 latents, in eval mode."""
    torch.manual_seed(seed)
    settings = small_model()
    conditioner = None
    if schema is not None:
        conditioner = MetadataConditioner(schema.to_dict(), settings.embed_dim, dropout_patterns=patterns or PATTERNS)
    return Denoiser(build_unet(settings, 4, 8, conditional=schema is not None), conditioner).eval()


class Counted(TorchDispatchMode):
    """How often a condition was masked, and the tensors brought from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.masks, self.brought = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.masks += function.overloadpacket is torch.ops.aten.where
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.brought += args[0].device.type == "cpu" != result.device.type
        return result
