"""The denoising network: diffusers' UNet2DModel; conditions are added to its timestep embedding."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.settings import ModelSettings


def build_unet(settings: ModelSettings, latent_channels: int, latent_size: int, conditional: bool) -> UNet2DModel:
    """The network of the settings.

    Args:
        settings: Channels, attention and so on.
        latent_channels: Channels of a latent.
        latent_size: Edge of a latent, a multiple of 2^(resolutions − 1).
        conditional: Whether it takes a condition vector. That adds no parameter, so weights fit either kind.

    Raises:
        UserError: It cannot be built, such as attention with a width that the head width does not divide.
    """
    settings.check(latent_size)
    full = settings.resolved()
    attention = full.attention or []
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(full.block_out_channels),
        layers_per_block=full.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        add_attention=full.mid_attention,
        attention_head_dim=full.attention_head_dim,
        resnet_time_scale_shift=full.resnet_time_scale_shift,
        norm_num_groups=full.norm_num_groups,
        dropout=full.dropout,
        class_embed_type="identity" if conditional else None,
    )


def lay_out(unet: nn.Module, half: bool) -> None:
    """Convert a network's weights, in place, to the memory layout in which its convolutions sample fastest.

    That is channels last on CPUs (measured in benchmarks/sampling.py) and in half precision on GPUs, otherwise channels
    first. The layout is always set, so that results do not depend on the previous one. Values agree to rounding; saved
    files and hashes agree exactly.

    Args:
        unet: The network, on its device.
        half: Whether it will run in bf16 or fp16.
    """
    device = next(unet.parameters()).device
    last = device.type == "cpu" or half
    nn.Module.to(unet, memory_format=torch.channels_last if last else torch.contiguous_format)


class Denoiser(nn.Module):
    """Network and conditioner as one module: z_final = z_t + z_cond.

    Args:
        unet: Built for conditions if there is a conditioner.
        conditioner: ``None`` for an unconditional model.
    """

    def __init__(self, unet: UNet2DModel, conditioner: MetadataConditioner | None) -> None:
        super().__init__()
        if (conditioner is not None) != (unet.config["class_embed_type"] == "identity"):
            raise UserError(
                "A network with a condition input needs a conditioner, and one without it must not have one.",
                "Take both from one model.",
            )
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions | None = None) -> torch.Tensor:
        """The prediction (v or ε) for noisy latents.

        Args:
            x_t: fp32 [N, C, h, w].
            t: int64 [N] or scalar timestep.
            conditions: Of N samples; required with a conditioner, refused without.

        Returns:
            fp32 [N, C, h, w].
        """
        embedding = None
        if self.conditioner is not None:
            if conditions is None:
                raise ValueError("This denoiser is conditional: give conditions (null conditions for none).")
            embedding = self.conditioner(conditions)
        elif conditions is not None:
            raise ValueError("This denoiser is unconditional and was given conditions.")
        x = x_t.to(self.unet.dtype)
        prediction = self.unet(x, t, class_labels=embedding, return_dict=False)[0]
        return prediction.float().contiguous()
