"""Averages of the weights over a length that is chosen after training, from averages that were kept during training.

A run with ``ema.also`` and ``ema.snapshot_every_images`` keeps averages of two or more lengths at several moments.
An average of any other length, at any of these moments, is approximated by a weighted sum of them: the sum whose
averaging profile is closest to the wanted one (Karras et al. 2024, arXiv 2312.02696, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_medi.core.checksums import load_tensors, save_tensors, warn_unsealed
from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.training.ema import power_exponent

FOLDER = "averages"
WARNED_ERROR = 0.05
"""Profile error above which a wanted average is warned of: its profile is then another one in a visible degree."""
MOST_ERROR = 0.25
"""Profile error above which it is refused."""
logger = get_logger("training")
_NAME = re.compile(r"images-(\d{12})-width-(\d\.\d{4})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """An average that was kept.

    Args:
        images: Images seen.
        width: Its relative width.
        path: Its file.
    """

    images: int
    width: float
    path: Path


def save_snapshots(out: Path, images: int, averages: Mapping[float, Mapping[str, torch.Tensor]]) -> None:
    """Write ``out/averages/images-N-width-W.safetensors`` for each relative width, in fp32.

    Half precision would not do: averages differ little, and are added with large coefficients of both signs.
    """
    for width, tensors in averages.items():
        path = out / FOLDER / f"images-{images:012d}-width-{width:.4f}.safetensors"
        save_tensors(tensors, path)


def list_snapshots(out: Path) -> list[Snapshot]:
    """The averages that a run kept, ordered by images seen and width."""
    found = [(p, match) for p in (Path(out) / FOLDER).glob("*.safetensors") if (match := _NAME.fullmatch(p.name))]
    return sorted((Snapshot(int(m[1]), float(m[2]), p) for p, m in found), key=lambda s: (s.images, s.width))


def profile_product(gamma_a: np.ndarray, end_a: np.ndarray, gamma_b: np.ndarray, end_b: np.ndarray) -> np.ndarray:
    """∫ p_a·p_b over time, for profiles p(t) = (γ+1)/T · (t/T)^γ on [0, T]; arrays broadcast."""
    shorter = np.minimum(end_a, end_b)
    # Ratios to the ends, because powers of images would overflow.
    ratio = (shorter / end_a) ** gamma_a * (shorter / end_b) ** gamma_b * shorter / (end_a * end_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio


def coefficients(kept: Sequence[tuple[int, float]], images: int, width: float) -> tuple[np.ndarray, float]:
    """Coefficients of the kept averages in the wanted one.

    Args:
        kept: (images seen, relative width) of each.
        images: Moment of the wanted average.
        width: Its relative width.

    Returns:
        The least-squares solution of Σ x_i·p_i = p with Σ x_i = 1, so that a weight that never changed is kept, float64
        [len(kept)]; and its profile error ‖Σ x_i·p_i − p‖ / ‖p‖ (norms over time), 0 where the sum is the wanted
        profile.
    """
    end = np.array([float(moment) for moment, _ in kept])
    gamma = np.array([power_exponent(each) for _, each in kept])
    scale = end.max()
    products = profile_product(gamma[:, None], end[:, None] / scale, gamma[None], end[None] / scale)
    exponent, moment = np.array(power_exponent(width)), np.array(images / scale)
    wanted = profile_product(gamma, end / scale, exponent, moment)
    ones = np.ones((len(end), 1))
    bordered = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    shares = np.linalg.solve(bordered, np.append(wanted, 1.0))[:-1]
    whole = profile_product(exponent, moment, exponent, moment)
    off = (shares @ products @ shares - 2 * shares @ wanted + whole) / whole
    return shares, float(np.sqrt(max(off, 0.0)))


def widths_within(kept: Sequence[tuple[int, float]], images: int, error: float) -> list[tuple[float, float]]:
    """Ranges of relative widths whose profile error is at most ``error``; arguments as above.

    Widths in steps of 0.005 are tried, and those that were kept at this moment.
    """
    tried = sorted({number / 200 for number in range(2, 56)} | {width for moment, width in kept if moment == images})
    ranges: list[tuple[float, float]] = []
    open_ended = False
    for width in tried:
        within = coefficients(kept, images, width)[1] <= error
        if within:
            ranges[-1:] = [(ranges[-1][0], width)] if open_ended else [*ranges[-1:], (width, width)]
        open_ended = within
    return ranges


def _check_profile(run: str | Path, kept: Sequence[tuple[int, float]], images: int, width: float, error: float) -> None:
    """Warn of a profile that the kept averages give badly, and refuse one that they do not give."""
    if error <= WARNED_ERROR:
        return
    ranges = widths_within(kept, images, WARNED_ERROR)
    words = ", ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ranges)
    has = f"Within {WARNED_ERROR:.0%} are the widths {words}."
    if error > MOST_ERROR:
        raise UserError(
            f"The averages that {run} kept do not give the width {width:g} at {images:,} images: their best sum misses "
            f"its profile by {error:.0%}; the most is {MOST_ERROR:.0%}.",
            f"{has} Choose one of them, or train with this width in ema.also or more snapshots.",
        )
    logger.warning("The average of width %g misses its profile by %.0f %%. %s", width, 100 * error, has)


def reconstruct(run: str | Path, width: float, images: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights averaged over another length.

    Args:
        run: Folder of a run that kept averages.
        width: Relative width, above 0 and below 0.28.
        images: Moment, in images seen, of one of the kept averages; 0 for the last.

    Returns:
        fp32 tensors by name, and a record of what they were made from.

    Raises:
        UserError: The run kept fewer than two averages, none at that moment, or none that give this width.
    """
    every = list_snapshots(Path(run))
    moments = sorted({s.images for s in every})
    if len(every) < 2:
        raise UserError(
            f"{run} kept {len(every)} averages; another length needs two or more.",
            "Train with ema.also=[…] and ema.snapshot_every_images=….",
        )
    if images and images not in moments:
        raise UserError(f"{run} kept no average at {images:,} images.", f"There are {', '.join(map(str, moments))}.")
    at = images or moments[-1]
    used = [s for s in every if s.images <= at]
    kept_at = [(s.images, s.width) for s in used]
    shares, error = coefficients(kept_at, at, width)
    _check_profile(run, kept_at, at, width, error)
    total: dict[str, torch.Tensor] = {}
    for snapshot, share in zip(used, shares.tolist(), strict=True):
        kept, sealed = load_tensors(snapshot.path, "Restore it from a copy, or train again.", "pt")
        if not sealed:
            warn_unsealed(snapshot.path.parent, "Averages kept from now on have them.")
        for name, tensor in kept.items():
            part = tensor.double() * share
            total[name] = total[name] + part if name in total else part
    made = {
        "relative_width": width,
        "images": at,
        "kept": [[s.images, s.width] for s in used],
        "profile_error": error,
    }
    return {name: tensor.float() for name, tensor in total.items()}, made
