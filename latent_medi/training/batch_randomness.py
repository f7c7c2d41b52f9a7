"""Everything random about a batch, drawn for all processes at once from one generator per (seed, batch number)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_STREAM = 2  # different from the streams of sample_order.py


def batch_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th global batch of a run, 0 to 2**64 - 1."""
    return int(np.random.SeedSequence([_STREAM, seed, number]).generate_state(1, np.uint64)[0])


def batch_generator(seed: int, number: int) -> torch.Generator:
    """The CPU generator of the ``number``-th global batch, the same for any number of processes and any resume."""
    return torch.Generator().manual_seed(batch_seed(seed, number))


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep from each of ``count`` equal parts of ``range(timesteps)``, in ascending order.

    Every timestep is as likely as in independent draws. A batch always covers the whole range, which lowers the
    variance of the loss.

    Returns:
        int64 [count].
    """
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    position = (torch.arange(count, dtype=torch.float64) + jitter) / count
    return (position * timesteps).long().clamp_(max=timesteps - 1)


@dataclass(frozen=True)
class Draws:
    """The draws of one global batch of B images, on the CPU.

    Args:
        timesteps: int64 [B].
        noise: fp32 [B, C, h, w]; added to the latents.
        posterior: fp32 [B, C, h, w]; chooses a sample of the autoencoder's posterior; ``None`` for a deterministic
            autoencoder.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    posterior: torch.Tensor | None

    def share(self, positions: slice) -> Draws:
        """The draws of some positions of the batch."""
        posterior = None if self.posterior is None else self.posterior[positions]
        return Draws(self.timesteps[positions], self.noise[positions], posterior)


def draw_batch(generator: torch.Generator, shape: tuple[int, int, int, int], timesteps: int, posterior: bool) -> Draws:
    """Draw what a global batch needs.

    Args:
        generator: The batch's generator, fresh.
        shape: (B, C, h, w).
        timesteps: Length of the noise schedule.
        posterior: Whether the autoencoder has a posterior to sample.
    """
    steps = stratified_timesteps(shape[0], timesteps, generator)
    noise = torch.randn(shape, generator=generator)
    return Draws(steps, noise, torch.randn(shape, generator=generator) if posterior else None)
