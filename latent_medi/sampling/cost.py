"""What sampling will take: evaluations of the network, bytes of an image, images per second."""

from __future__ import annotations

import numpy as np
import torch

from latent_medi.core.device import exact_fp32
from latent_medi.core.timing import seconds_per_item
from latent_medi.diffusion.denoiser import Denoiser, lay_out
from latent_medi.diffusion.samplers import low_precision
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import encode_image
from latent_medi.shards.format.tar import BLOCK
from latent_medi.training.estimate.step_cost import AUTOCAST, example

_ENCODED = 64
"""Real patches whose compressed size stands for that of samples."""


def bytes_per_image(real: PatchDataset, codec: str) -> float:
    """Bytes that a sample takes in a shard, if it compresses like real patches: image, JSON, and their headers."""
    rows = np.unique(np.linspace(0, len(real) - 1, min(_ENCODED, len(real))).astype(int))
    sizes = [len(encode_image(image, codec, "synthetic")) for image in real.read(rows)]
    return float(np.mean([size + -size % BLOCK for size in sizes])) + 4 * BLOCK


@torch.no_grad()
@exact_fp32()
def sampling_rate(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    shape: tuple[int, int, int],
    settings: GenerateSettings,
    evaluations: int,
    budget: float = 4.0,
) -> float:
    """Images per second of one process: the evaluations of the network for an image, and its decoding.

    Args:
        denoiser: The network, on its device; its weights do not matter.
        autoencoder: What decodes, on the same device.
        shape: (C, h, w) of a latent.
        settings: Batch and precision.
        evaluations: Of the network for one image, see :func:`~latent_medi.diffusion.samplers.network_evaluations`.
        budget: Seconds that each of the two timings may take.
    """
    device, dtype = next(denoiser.parameters()).device, AUTOCAST[settings.precision]
    denoiser.eval()
    lay_out(denoiser.unet, half=settings.precision != "fp32")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def evaluate(count: int) -> None:
        with torch.device(device):
            noisy, _, timesteps, conditions = example(denoiser, shape, count, 1000)
        with low_precision(device, dtype, [denoiser]):
            denoiser(noisy, timesteps, conditions)
        wait()

    def decode(count: int) -> None:
        autoencoder.decode(torch.randn(count, *shape, device=device))

    most = settings.device_batch
    each = evaluations * seconds_per_item(evaluate, most, budget) + seconds_per_item(decode, most, budget)
    return 1 / each
