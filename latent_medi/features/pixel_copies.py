"""Copies found by their pixels, also rotated, mirrored, shifted or encoded again.

A patch is reduced in size and high-pass filtered, and correlated with another one at every small shift and in all eight
symmetries of the square. The score is the largest normalised correlation, 1 for the same patch. Brightness, contrast
and stain do not count. Different patches of similar tissue score far below a copy, because their nuclei are in other
places. Candidate pairs are found by the amplitudes of the spectrum, which neither shifts nor the symmetries change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_medi.core.progress import progress

SIDE = 32
"""Pixels of a small patch."""
SHIFT = 4
"""Largest shift that is compared, in pixels of the small patch: an eighth of the side."""
_TURNS = ("turned by 90°", "turned by 180°", "turned by 270°")
VIEWS = ("as it is", *_TURNS, "mirrored", *(f"mirrored, {turn}" for turn in _TURNS))
"""Names of the eight symmetries, by the code that :func:`copy_scores` returns."""

_OCTANT = [(i, j) for i in range(1, 3 * SIDE // 8 + 1) for j in range(i + 1)]
_DARKEST = 1.0 / 256.0
_PAIRS = 2048  # pairs of patches per block: 8 views × 32² × 2048 in float32 is 64 MiB


def small_patches(images: np.ndarray) -> np.ndarray:
    """Input of :func:`copy_scores`: optical density at 32 px, high-pass filtered, with mean 0 and length 1.

    Args:
        images: uint8 [N, H, W, 3].

    Returns:
        float32 [N, 32, 32]; a patch of one colour is all 0.
    """
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255.0
    density = -torch.log10(x.clamp_min(_DARKEST)).mean(1, keepdim=True)
    small = F.interpolate(density, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    # Tissue edges and folds are similar in many patches; cells are not.
    slow = F.avg_pool2d(F.pad(small, (SIDE // 8,) * 4, mode="replicate"), SIDE // 4 + 1, stride=1)
    fine = (small - slow)[:, 0]
    fine = fine - fine.mean(dim=(1, 2), keepdim=True)
    length = fine.flatten(1).norm(dim=1)[:, None, None]
    # An empty patch shows only the codec's noise, and resembles no other one.
    return torch.where(length > 0.01 * SIDE, fine / length.clamp_min(1e-12), torch.zeros(())).numpy()


def invariants(small: np.ndarray) -> np.ndarray:
    """Features that a patch shares with its copies, to find candidates by nearest neighbours.

    They are amplitudes of the Fourier transform, which a shift does not change, averaged over the eight symmetries; up
    to three quarters of the highest frequency, since another codec changes higher ones.

    Args:
        small: Patches from :func:`small_patches`, [N, S, S].

    Returns:
        float32 [N, 90].
    """
    result = np.empty((len(small), len(_OCTANT)), np.float32)
    for start in range(0, len(small), _PAIRS):
        part = slice(start, start + _PAIRS)
        amplitude = torch.fft.fft2(torch.from_numpy(small[part])).abs()
        # The spectrum of a real-valued patch is symmetric under rotation by 180°: four symmetries are left.
        quarter = torch.roll(torch.flip(amplitude.transpose(1, 2), (2,)), 1, 2)
        both = amplitude + quarter
        mean = (both + torch.roll(torch.flip(both, (2,)), 1, 2)) / 4
        result[part] = torch.stack([mean[:, i, j] for i, j in _OCTANT], 1).numpy()
    return result


def _views(x: Tensor) -> Tensor:
    """The eight symmetries of [N, S, S], [N, 8, S, S]."""
    turned = [torch.rot90(x, k, (1, 2)) for k in range(4)]
    return torch.stack([*turned, *(view.flip(2) for view in turned)], 1)


def _near_shifts() -> tuple[Tensor, Tensor]:
    """Matrices of the inverse Fourier transform for small shifts alone, [2·SHIFT + 1, S] and [S/2 + 1, 2·SHIFT + 1].

    A tenth of the shifts is needed, and two small products are several times faster than the whole transform.
    """
    shifts = torch.arange(-SHIFT, SHIFT + 1, dtype=torch.float64)
    turn = 2j * torch.pi / SIDE
    rows = torch.exp(turn * shifts[:, None] * torch.arange(SIDE, dtype=torch.float64)) / SIDE
    half = torch.arange(SIDE // 2 + 1, dtype=torch.float64)
    # The other half of the spectrum is the conjugate of this one.
    twice = torch.full_like(half, 2.0)
    twice[0] = twice[-1] = 1.0
    columns = twice[:, None] * torch.exp(turn * half[:, None] * shifts) / SIDE
    return rows.to(torch.complex64), columns.to(torch.complex64)


def copy_scores(
    small: np.ndarray, bank: np.ndarray, candidates: np.ndarray, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlation of each patch with the most similar of its candidates.

    Args:
        small: Patches from :func:`small_patches`, [N, S, S].
        bank: Patches to compare with, [M, S, S].
        candidates: Positions in the bank to compare with, int [N, k].
        device: Torch device.

    Returns:
        The largest normalised correlation over candidates, views and shifts, float32 [N] in [−1, 1]; the candidate's
        position in the bank, int64 [N]; and the view, an index of :data:`VIEWS`, int64 [N].
    """
    where = torch.device(device)
    n, k = candidates.shape
    score, position, view = np.zeros(n, np.float32), np.zeros(n, np.int64), np.zeros(n, np.int64)
    size = max(1, _PAIRS // max(k, 1))
    starts = range(0, n, size)
    rows, columns = (x.to(where) for x in _near_shifts())
    for start in progress(starts, n, "comparing pixels", "patches", size):
        part = slice(start, min(start + size, n))
        own = torch.fft.rfft2(_views(torch.from_numpy(small[part]).to(where)))
        other = torch.fft.rfft2(torch.from_numpy(bank[candidates[part]]).to(where))
        product = own[:, :, None] * other[:, None].conj()
        near = (rows @ (product @ columns)).real
        best, code = near.amax(dim=(-2, -1)).flatten(1).max(dim=1)
        views, which = (x.cpu().numpy() for x in (code // k, code % k))
        score[part], view[part] = best.cpu().numpy(), views
        position[part] = candidates[part][np.arange(len(which)), which]
    return score, position, view
