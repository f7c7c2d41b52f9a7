"""How well a latent classifier tells real, noisy latents of other patients apart, by noise level."""

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

COLUMNS = (
    "images", "timesteps", "alpha_bar_low", "alpha_bar_high", "f1", "sensitivity", "specificity", "accuracy", "loss",
    "n",
)  # fmt: skip
ALL = "all"
"""The row over all noise levels."""

_CHUNK = 256  # latents whose noise is drawn together, whatever the batch


@dataclass(frozen=True)
class Validation:
    """Patches to measure on.

    Args:
        store: The latents of the whole dataset.
        rows: int64 [n]; row numbers of the dataset's index.
        keys: Keys of these rows.
        labels: int64 [n]; position of each row's class.
        patients: Number of different patients.

    Raises:
        UserError: There are patches, and torchmetrics, which measures on them, is not installed.
    """

    store: LatentStore | StreamedLatents
    rows: np.ndarray
    keys: np.ndarray
    labels: torch.Tensor
    patients: int

    def __post_init__(self) -> None:
        if len(self):  # before anything is trained, rather than at the first measurement
            _metrics()

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 over the rows and their classes."""
        told = [f"{key}\t{label}" for key, label in zip(self.keys, self.labels.tolist(), strict=True)]
        return sha256_bytes("\n".join(told).encode())

    def drawn(self, most: int, seed: int) -> np.ndarray:
        """Positions of at most ``most`` (0: all) patches in a random order that the seed decides."""
        order = epoch_order(len(self), seed, 0)
        return order[:most] if most else order


def _metrics() -> ModuleType:
    """torchmetrics' functions for classes.

    Raises:
        UserError: It is not installed.
    """
    with needs("Measuring a latent classifier on validation patches", "torchmetrics"):
        from torchmetrics.functional import classification
    return classification


def timestep_buckets(timesteps: int) -> list[tuple[int, int]]:
    """First timestep and the one after the last of each tenth of the noise levels."""
    edges = [i * timesteps // BUCKETS for i in range(BUCKETS + 1)]
    return [(low, high) for low, high in pairwise(edges) if high > low]


@torch.no_grad()
def score(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    classes: int,
    validation: Validation,
    whitening: tuple[torch.Tensor, torch.Tensor],
    objective: Objective,
    accelerator: Accelerator,
    seed: int,
    most: int,
    device_batch: int,
) -> list[dict[str, Any]]:
    """Scores by tenth of the noise levels and over all; every process must call.

    Each patch is seen once in every tenth, at a timestep, with noise and (of an autoencoder with a posterior) a sample
    of its latent that its place in the drawn order decides: the same patches are noised alike at every measurement,
    by any number of processes.

    Args:
        network: (x_t, t) to logits; the bare network, in eval mode.
        classes: Number of classes.
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
    device, total = accelerator.device, objective.timesteps
    chosen, buckets = validation.drawn(most, seed), timestep_buckets(objective.timesteps)
    # What is not this process's own stays 0, so that a sum over processes is everything.
    found = torch.zeros(len(buckets), len(chosen), dtype=torch.long, device=device)
    losses = torch.zeros(len(buckets), len(chosen), device=device)
    shift, scale = (v.view(-1, 1, 1).to(device) for v in whitening)
    starts = range(0, len(chosen), _CHUNK)
    for number, start in enumerate(starts):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        at = chosen[start : start + _CHUNK]
        mean, std = validation.store.moments(validation.rows[at])
        mean, std = moved(mean, device), None if std is None else moved(std, device)
        truth = moved(validation.labels[torch.from_numpy(at.copy())], device)
        for row, (low, high) in enumerate(buckets):
            draws = draw_batch(
                batch_generator(seed, number * len(buckets) + row),
                (len(at), *validation.store.shape),
                high - low,
                std is not None,
            )
            raw = mean
            if std is not None and draws.posterior is not None:
                raw = torch.addcmul(mean, std, moved(draws.posterior, device))
            t = moved(draws.timesteps + low, device)
            x_t = objective.add_noise((raw - shift) / scale, moved(draws.noise, device), t)
            logits = torch.cat(
                [
                    network(x_t[i : i + device_batch], t[i : i + device_batch]).float()
                    for i in range(0, len(at), device_batch)
                ]
            )
            found[row, start : start + len(at)] = logits.argmax(1)
            losses[row, start : start + len(at)] = F.cross_entropy(logits, truth, reduction="none")
    found, losses = accelerator.reduce(found, "sum").cpu(), accelerator.reduce(losses, "sum").cpu()
    truth = validation.labels[torch.from_numpy(chosen.copy())]
    alpha_bar = objective.alphas_cumprod
    rows = [
        _row(f"{low}-{high - 1}", alpha_bar[high - 1], alpha_bar[low], found[i], truth, losses[i], classes)
        for i, (low, high) in enumerate(buckets)
    ]
    everything = _row(
        ALL, alpha_bar[total - 1], alpha_bar[0], found.flatten(), truth.repeat(len(buckets)), losses.flatten(), classes
    )
    return [*rows, everything]


def _row(
    name: str, low: torch.Tensor, high: torch.Tensor, found: torch.Tensor, truth: torch.Tensor, losses: torch.Tensor,
    classes: int,
) -> dict[str, Any]:  # fmt: skip
    metrics = _metrics()
    return {
        "timesteps": name,
        "alpha_bar_low": float(low),
        "alpha_bar_high": float(high),
        "f1": float(metrics.multiclass_f1_score(found, truth, classes, average="macro")),
        "sensitivity": float(metrics.multiclass_recall(found, truth, classes, average="macro")),
        "specificity": float(metrics.multiclass_specificity(found, truth, classes, average="macro")),
        "accuracy": float(metrics.multiclass_accuracy(found, truth, classes, average="micro")),
        "loss": float(losses.double().mean()),
        "n": len(truth),
    }


def score_text(rows: list[dict[str, Any]], field: str, validation: Validation) -> str:
    """One line: scores over all noise levels, and F1 at the cleanest and the noisiest tenth."""
    everything = next(row for row in rows if row["timesteps"] == ALL)
    by_level = [row for row in rows if row["timesteps"] != ALL]
    patches = everything["n"] // len(by_level)
    return (
        f"{field} of {patches:,} noisy latents of {validation.patients:,} other patients, all noise levels: "
        f"F1 {everything['f1']:.3f}, sensitivity {everything['sensitivity']:.3f}, specificity "
        f"{everything['specificity']:.3f}; F1 {by_level[0]['f1']:.3f} at t = {by_level[0]['timesteps']}, "
        f"{by_level[-1]['f1']:.3f} at t = {by_level[-1]['timesteps']}"
    )
