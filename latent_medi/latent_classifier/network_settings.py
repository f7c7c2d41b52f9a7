"""Settings of the latent classifier's network; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from latent_medi.core.settings import PositiveInt, Range, Settings
from latent_medi.diffusion.settings import ModelSettings


@dataclass
class EncoderSettings(Settings):
    """The network that classifies noisy latents: the downward half of a denoiser, and a pooling.

    Args:
        block_out_channels: Channels per resolution, each half the one before.
        layers_per_block: Residual blocks per resolution.
        attention: Whether a resolution has self-attention, one entry per resolution; unset: all but the first two (of
            two or fewer, the last).
        attention_head_dim: Channels per attention head; must divide every attention width and the last one.
        pooling: How the last feature map becomes one vector: "attention" (a learned query) or "mean".
        norm_num_groups: Groups of the group normalisation; must divide every width.
        dropout: Share of activations dropped inside residual blocks while training, 0 to 1.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 256, 512])
    layers_per_block: PositiveInt = 2
    attention: list[bool] | None = None
    attention_head_dim: PositiveInt = 64
    pooling: Literal["attention", "mean"] = "attention"
    norm_num_groups: PositiveInt = 32
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0

    def with_attention(self) -> list[bool]:
        """Whether each resolution has self-attention."""
        count = len(self.block_out_channels)
        return [i >= min(2, count - 1) for i in range(count)] if self.attention is None else list(self.attention)

    def check(self, latent_size: int) -> None:
        """Refuse a network that cannot be built for latents of ``latent_size`` × ``latent_size``.

        Raises:
            UserError: Names every problem.
        """
        # The same rules as for the denoiser, whose middle block has attention too.
        ModelSettings(
            block_out_channels=list(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            attention=self.with_attention(),
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            dropout=self.dropout,
        ).check(latent_size)
