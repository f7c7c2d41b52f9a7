"""Scores of a latent classifier on real, noisy latents of other patients, by noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from latent_medi.core.errors import needs
from latent_medi.core.files import sha256_bytes
from latent_medi.diffusion.objective import Objective
from latent_medi.latents.store import LatentStore, moved
from latent_medi.latents.stream import StreamedLatents
from latent_medi.training.batch_randomness import batch_generator, draw_batch
from latent_medi.training.losses import BUCKETS
from latent_medi.training.sample_order import epoch_order

SCORES = ("f1", "sensitivity", "specificity", "accuracy", "loss", "n")
COLUMNS = ("images", "timesteps", "alpha_bar_low", "alpha_bar_high", *SCORES)
ALL = "all"
"""Name of the row over all noise levels."""

_CHUNK = 256  # latents whose noise is drawn together, independent of the batch


@dataclass(frozen=True)
class Validation:
    """Patches to score a classifier on.

    Args:
        store: The latents of the whole dataset.
        rows: int64 [n]; row numbers of the dataset's index.
        keys: Keys of these rows.
        labels: int64 [n]; position of each row's class.
        patients: Number of different patients.
        classes: Number of classes.

    Raises:
        UserError: There are patches, and torchmetrics, which computes the scores, is not installed.
    """

    store: LatentStore | StreamedLatents
    rows: np.ndarray
    keys: np.ndarray
    labels: torch.Tensor
    patients: int
    classes: int

    def __post_init__(self) -> None:
        if len(self):  # before the training rather than at the first measurement
            _metrics()

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 over the rows and their classes."""
        lines = [f"{key}\t{label}" for key, label in zip(self.keys, self.labels.tolist(), strict=True)]
        return sha256_bytes("\n".join(lines).encode())

    def drawn(self, most: int, seed: int) -> np.ndarray:
        """Positions of at most ``most`` (0: all) patches, in a random order given by the seed."""
        order = epoch_order(len(self), seed, 0)
        return order[:most] if most else order


def _metrics() -> ModuleType:
    """torchmetrics' functions for classes.

    Raises:
        UserError: It is not installed.
    """
    with needs("Scoring a latent classifier on validation patches", "torchmetrics"):
        from torchmetrics.functional import classification
    return classification


def timestep_buckets(timesteps: int) -> list[tuple[int, int]]:
    """Start and end (exclusive) of each tenth of the timesteps."""
    edges = [i * timesteps // BUCKETS for i in range(BUCKETS + 1)]
    return [(low, high) for low, high in pairwise(edges) if high > low]


@torch.no_grad()
def score(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    validation: Validation,
    whitening: tuple[torch.Tensor, torch.Tensor],
    objective: Objective,
    accelerator: Accelerator,
    seed: int,
    most: int,
    device_batch: int,
) -> list[dict[str, Any]]:
    """Scores by tenth of the noise levels and over all; every process must call.

    Each patch is scored once in every tenth. Its timestep, its noise and (for an autoencoder with a posterior) the
    sample of its latent depend on its place in the drawn order, so they are the same at every measurement and for any
    number of processes.

    Args:
        network: (x_t, t) to logits; the bare network, in eval mode.
        validation: The patches.
        whitening: Shift and scale of latents, fp32 [C] each.
        objective: The noise schedule.
        accelerator: The processes, which share the patches.
        seed: Decides order and noise.
        most: Most patches; 0 for all.
        device_batch: Most latents per forward pass.

    Returns:
        A dict per bucket, with the entries of :data:`COLUMNS` but images. F1, sensitivity and specificity are means
        over classes, each against the rest; loss is −log p of the true class (nats); the last is over all buckets.
    """
    device = accelerator.device
    chosen, buckets = validation.drawn(most, seed), timestep_buckets(objective.timesteps)
    # Entries of other processes stay 0, so that the sum over processes has all entries.
    found = torch.zeros(len(buckets), len(chosen), dtype=torch.long, device=device)
    losses = torch.zeros(len(buckets), len(chosen), device=device)
    shift, scale = (v.view(-1, 1, 1).to(device) for v in whitening)
    for number, start in enumerate(range(0, len(chosen), _CHUNK)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        at = chosen[start : start + _CHUNK]
        mean, std = validation.store.moments(validation.rows[at])
        mean, std = moved(mean, device), None if std is None else moved(std, device)
        truth = moved(validation.labels[torch.from_numpy(at.copy())], device)
        shape = (len(at), *validation.store.shape)
        for row, (low, high) in enumerate(buckets):
            generator = batch_generator(seed, number * len(buckets) + row)
            draws = draw_batch(generator, shape, high - low, std is not None)
            raw = mean
            if std is not None and draws.posterior is not None:
                raw = torch.addcmul(mean, std, moved(draws.posterior, device))
            t = moved(draws.timesteps + low, device)
            x_t = objective.add_noise((raw - shift) / scale, moved(draws.noise, device), t)
            parts = zip(x_t.split(device_batch), t.split(device_batch), strict=True)
            logits = torch.cat([network(*part).float() for part in parts])
            found[row, start : start + len(at)] = logits.argmax(1)
            losses[row, start : start + len(at)] = F.cross_entropy(logits, truth, reduction="none")
    found, losses = accelerator.reduce(found, "sum").cpu(), accelerator.reduce(losses, "sum").cpu()
    truth = validation.labels[torch.from_numpy(chosen.copy())]
    rows = [_row(*buckets[i], objective, found[i], truth, losses[i], validation.classes) for i in range(len(buckets))]
    everything = found.flatten(), truth.repeat(len(buckets)), losses.flatten()
    rows.append(_row(0, objective.timesteps, objective, *everything, validation.classes) | {"timesteps": ALL})
    return rows


def _row(
    low: int,
    high: int,
    objective: Objective,
    found: torch.Tensor,
    truth: torch.Tensor,
    losses: torch.Tensor,
    classes: int,
) -> dict[str, Any]:
    metrics, alpha_bar = _metrics(), objective.alphas_cumprod
    return {
        "timesteps": f"{low}-{high - 1}",
        "alpha_bar_low": float(alpha_bar[high - 1]),
        "alpha_bar_high": float(alpha_bar[low]),
        "f1": float(metrics.multiclass_f1_score(found, truth, classes, average="macro")),
        "sensitivity": float(metrics.multiclass_recall(found, truth, classes, average="macro")),
        "specificity": float(metrics.multiclass_specificity(found, truth, classes, average="macro")),
        "accuracy": float(metrics.multiclass_accuracy(found, truth, classes, average="micro")),
        "loss": float(losses.double().mean()),
        "n": len(truth),
    }


def score_text(rows: list[dict[str, Any]], field: str, validation: Validation) -> str:
    """The scores over all noise levels, and F1 at the cleanest and the noisiest tenth, in one line."""
    everything = next(row for row in rows if row["timesteps"] == ALL)
    by_level = [row for row in rows if row["timesteps"] != ALL]
    patches = everything["n"] // len(by_level)
    return (
        f"{field} of {patches:,} noisy latents of {validation.patients:,} other patients, all noise levels: "
        f"F1 {everything['f1']:.3f}, sensitivity {everything['sensitivity']:.3f}, specificity "
        f"{everything['specificity']:.3f}; F1 {by_level[0]['f1']:.3f} at t = {by_level[0]['timesteps']}, "
        f"{by_level[-1]['f1']:.3f} at t = {by_level[-1]['timesteps']}"
    )
