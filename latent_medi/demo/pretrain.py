"""Training of the demo's two frozen networks on procedural tissue of no class and no hospital.

``python -m latent_medi.demo.pretrain encoder|autoencoder --out FOLDER`` makes the weights in
``latent_medi/demo/weights`` again.

Encoder: a small convolutional network that learns to predict the renderer's parameters, of shape and of stain, from a
patch. It sees none of the demo's classes and hospitals. Its features are the layer before the prediction.

Autoencoder: diffusers' ``AutoencoderKL`` with 4× downsampling; L1 and edge loss, an L1 loss of 8 × 8 means (without it
the code drops the tint of a rare stain, and with it the hospital), and a small Kullback–Leibler term. It is then
fine-tuned with a perceptual loss, as Stable Diffusion's is: the distance between the encoder's feature maps, in the end
also between its features.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from joblib import Parallel, delayed
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from latent_medi.core.checksums import write_checksums
from latent_medi.core.processes import safe_helpers
from latent_medi.core.progress import get_logger, set_up_logging
from latent_medi.demo.tissue import Shape, Stain, parameters, random_shape, random_stain, render
from latent_medi.features.tiny_encoder import TinyEncoder

log = get_logger(__name__)

POLISH: tuple[dict[str, Any], ...] = (
    {"steps": 800, "perceptual": 0.1},
    {"steps": 1200, "perceptual": 0.4, "decoder_only": True},
    {"steps": 800, "perceptual": 0.3, "features": 3.0},
    {"steps": 800, "perceptual": 0.3, "features": 10.0},
)
"""Stages of the autoencoder's fine-tuning; the third halved the Fréchet distance of reconstructions to patches."""

SHAPE_PARAMETERS = ("nucleus_aspect", "alignment", "gland_radius")
"""The parameters that must be linear in the encoder's features."""


def _targets(shape: Shape, stain: Stain) -> dict[str, float]:
    """What the encoder learns to predict, as numbers; orientation as a double angle, since fibres have no direction."""
    numbers = parameters(shape)
    angle = numbers.pop("orientation")
    numbers["along"] = shape.alignment * np.cos(2 * angle)
    numbers["across"] = shape.alignment * np.sin(2 * angle)
    for field in fields(Stain):
        value = np.atleast_1d(getattr(stain, field.name))
        numbers |= {f"{field.name}_{i}": float(v) for i, v in enumerate(value)}
    return numbers


def _random_patch(seed: int) -> tuple[np.ndarray, dict[str, float]]:
    rng = np.random.default_rng(seed)
    shape, stain = random_shape(rng), random_stain(rng)
    return render(shape, stain, rng), _targets(shape, stain)


def tissue_bank(n: int, seed: int = 0, jobs: int = 2) -> tuple[np.ndarray, pd.DataFrame]:
    """Render tissue of no class and no hospital: images [n, 64, 64, 3] uint8 and the parameters of each."""
    with safe_helpers():
        drawn = Parallel(n_jobs=jobs, batch_size=64)(delayed(_random_patch)(seed * 10_000_019 + i) for i in range(n))
    return np.stack([image for image, _ in drawn]), pd.DataFrame([numbers for _, numbers in drawn])


def _symmetry(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of the eight symmetries of the square per image [N, C, H, W], since histology has no up; and its code [N]."""
    code = torch.randint(0, 8, (len(images),), generator=generator)
    images = torch.where((code & 1).bool()[:, None, None, None], images.flip(2), images)
    images = torch.where((code & 2).bool()[:, None, None, None], images.flip(3), images)
    return torch.where((code & 4).bool()[:, None, None, None], images.transpose(2, 3), images), code


def shape_r2(encoder: TinyEncoder, images: np.ndarray, truth: pd.DataFrame) -> dict[str, float]:
    """R² of ridge probes from features to shape parameters, fitted on the first half and scored on the second.

    Args:
        encoder: The encoder.
        images: uint8 [n, 64, 64, 3].
        truth: Their parameters, as :func:`tissue_bank` gives them.
    """
    features = embed(encoder, images)
    half = len(images) // 2
    scores = {}
    for name in SHAPE_PARAMETERS:
        target = truth[name].to_numpy()
        probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 7))).fit(features[:half], target[:half])
        scores[name] = float(probe.score(features[half:], target[half:]))
    return scores


@torch.no_grad()
def embed(encoder: TinyEncoder, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """Features [N, dim] of uint8 images [N, 64, 64, 3]."""
    mean, std = (torch.tensor(encoder.config[k])[:, None, None] for k in ("mean", "std"))
    out = []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float() / 255
        out.append(encoder((x - mean) / std))
    return torch.cat(out).numpy()


def train_encoder(
    images: np.ndarray, truth: pd.DataFrame, steps: int = 2200, seed: int = 0, batch: int = 96
) -> TinyEncoder:
    """An encoder that is trained to predict the renderer's parameters from a patch; see the module's text.

    Args:
        images: uint8 [n, 64, 64, 3]; a twentieth is kept for validation.
        truth: Their parameters.
        steps: Optimiser steps.
        seed: Seed of weights and order.
        batch: Images per step.
    """
    torch.manual_seed(seed)
    kept = len(images) // 20
    pixels = images[::7].reshape(-1, 3) / 255.0
    mean, std = pixels.mean(0).round(4).tolist(), pixels.std(0).round(4).tolist()
    encoder = TinyEncoder(
        {"dim": 48, "channels": [24, 48, 96], "groups": 8, "image_size": 64, "mean": mean, "std": std}
    )
    encoder.to(memory_format=torch.channels_last)
    head = torch.nn.Sequential(
        torch.nn.LayerNorm(48), torch.nn.Linear(48, 128), torch.nn.SiLU(), torch.nn.Linear(128, truth.shape[1])
    )
    # Also a linear prediction, since linear probes and Fréchet distances use no more than linear maps.
    linear = torch.nn.Linear(48, truth.shape[1])
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *head.parameters(), *linear.parameters()], lr=2e-3, weight_decay=1e-2
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    bank = torch.from_numpy(images[kept:])
    standard = torch.from_numpy(((truth - truth.mean()) / truth.std()).to_numpy(np.float32)[kept:])
    # The double angle has zero mean, so a symmetry is a change of sign: flips turn `across`, the transpose turns
    # `along`.
    along, across = truth.columns.get_loc("along"), truth.columns.get_loc("across")
    generator = torch.Generator().manual_seed(seed)
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    start = time.monotonic()
    for step in range(steps):
        rows = torch.randint(0, len(bank), (batch,), generator=generator)
        x, code = _symmetry(bank[rows].permute(0, 3, 1, 2).float() / 255, generator)
        target = standard[rows].clone()
        target[:, across] *= 1.0 - 2.0 * ((code & 1) ^ ((code >> 1) & 1))
        target[:, along] *= 1.0 - 2.0 * ((code >> 2) & 1)
        z = encoder((x - shift) / scale)
        loss = F.smooth_l1_loss(head(z), target) + F.mse_loss(linear(z), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            scores = {k: round(v, 3) for k, v in shape_r2(encoder, images[:kept], truth[:kept]).items()}
            log.info("encoder step %d loss %.3f R2 %s %.0fs", step + 1, loss.item(), scores, time.monotonic() - start)
    return encoder.eval()


def feature_maps(encoder: TinyEncoder, images: Tensor) -> list[Tensor]:
    """The encoder's maps after each halving and at the end, for images [N, 3, 64, 64] in [-1, 1]."""
    mean, std = (torch.tensor(encoder.config[k])[:, None, None] for k in ("mean", "std"))
    x = (images / 2 + 0.5 - mean) / std
    maps = []
    for layer in encoder.body:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            maps.append(x)
    return [*maps, x]


def new_autoencoder(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder of 64 × 64 RGB to 4 × 16 × 16."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_autoencoder(
    autoencoder: AutoencoderKL,
    images: np.ndarray,
    steps: int = 1800,
    encoder: TinyEncoder | None = None,
    perceptual: float = 0.1,
    features: float = 0.0,
    decoder_only: bool = False,
    seed: int = 0,
    batch: int = 16,
) -> AutoencoderKL:
    """The autoencoder after training, or after fine-tuning with an encoder; see the module's text.

    Args:
        autoencoder: What to train, in place.
        images: uint8 [n, 64, 64, 3].
        steps: Optimiser steps.
        encoder: Network of the perceptual loss; with it the autoencoder, trained before, is fine-tuned at a quarter of
            the learning rate.
        perceptual: Weight of the L1 distance of its feature maps.
        features: Weight of the squared distance of its features.
        decoder_only: Leave the latents as they are.
        seed: Seed of the order and of the posterior's noise.
        batch: Images per step.
    """
    torch.manual_seed(seed)
    bank = torch.from_numpy(images)
    torch.nn.Module.to(autoencoder, memory_format=torch.channels_last)
    for name, weight in autoencoder.named_parameters():
        weight.requires_grad_(not (decoder_only and name.startswith(("encoder.", "quant_conv."))))
    rate = 5e-4 if encoder else 2e-3
    optimizer = torch.optim.AdamW([p for p in autoencoder.parameters() if p.requires_grad], lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for step in range(steps):
        rows = torch.randint(0, len(bank), (batch,), generator=generator)
        x, _ = _symmetry(bank[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(x).latent_dist
        y = autoencoder.decode(posterior.sample()).sample
        error = y - x
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        tint = F.avg_pool2d(error, 8).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        # The divergence's weight rises slowly: at full weight from the start it would silence channels for good.
        prior = 3e-4 * (1.0 if encoder else min(1.0, step / (0.3 * steps)))
        loss = error.abs().mean() + 0.5 * edges + tint + prior * divergence
        if encoder:
            ours, theirs = feature_maps(encoder, y), feature_maps(encoder, x)
            loss = loss + perceptual * sum(F.l1_loss(a, b) for a, b in zip(ours, theirs, strict=True))
            loss = loss + features * F.mse_loss(encoder.read_out(ours[-1]), encoder.read_out(theirs[-1]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            psnr = -10 * torch.log10((error.detach() / 2).square().mean()).item()
            spread = posterior.mean.detach().std(dim=(0, 2, 3)).tolist()
            log.info(
                "autoencoder step %d loss %.4f PSNR %.2f std %.3f mean-spread %s %.0fs",
                step + 1,
                loss.item(),
                psnr,
                posterior.std.mean().item(),
                [round(s, 2) for s in spread],
                time.monotonic() - start,
            )
    return autoencoder.eval()


def main() -> None:
    """Train one network and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["encoder", "autoencoder"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--patches", type=int, default=24_000, help="patches to render for training")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render")
    parser.add_argument(
        "--encoder", type=Path, help="for the autoencoder: folder of the encoder of its perceptual loss"
    )
    arguments = parser.parse_args()
    if arguments.network == "autoencoder" and not arguments.encoder:
        parser.error("the autoencoder's loss needs the encoder: train that first and give its folder as --encoder")
    set_up_logging()
    # Subnormal numbers slow a processor down tenfold and carry nothing here.
    torch.set_flush_denormal(True)
    more = {"steps": arguments.steps} if arguments.steps else {}
    images, truth = tissue_bank(arguments.patches, jobs=arguments.jobs)
    if arguments.network == "encoder":
        train_encoder(images, truth, **more).save(arguments.out)
    else:
        autoencoder = train_autoencoder(new_autoencoder(), images, **more)
        encoder = TinyEncoder.load(arguments.encoder).requires_grad_(False)
        for seed, stage in enumerate(POLISH):
            train_autoencoder(autoencoder, images, encoder=encoder, seed=seed, **stage)
        autoencoder.half().save_pretrained(arguments.out)
        write_checksums(arguments.out)


if __name__ == "__main__":
    main()
