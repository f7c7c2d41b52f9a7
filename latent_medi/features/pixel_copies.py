"""Whether one patch is another one's copy, as far as pixels tell: turned, mirrored, shifted or encoded again.

A patch is made small, its slow changes are taken out, and what is left is correlated with the other one's at every
small shift and in all eight symmetries of the square. The score is the largest normalised correlation, 1 for the same
patch. Brightness, contrast and stain do not count. Two patches that are alike in kind score far below a copy, because
nuclei do not fall on the same places twice. Which pairs are worth comparing, amplitudes of the spectrum tell, which no
shift and none of the symmetries changes.
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
"""Largest shift that is looked at, in pixels of the small patch: an eighth of the side."""
VIEWS = ("as it is", "turned by 90°", "turned by 180°", "turned by 270°", "mirrored", "mirrored, turned by 90°",
         "mirrored, turned by 180°", "mirrored, turned by 270°")  # fmt: skip
"""Names of the eight symmetries, by the code that :func:`copy_scores` returns."""

_OCTANT = [(i, j) for i in range(1, 3 * SIDE // 8 + 1) for j in range(i + 1)]
_DARKEST = 1.0 / 256.0
_PAIRS = 2048  # pairs of patches per block: 8 views × 32² × 2048 in float32 is 64 MiB


def small_patches(images: np.ndarray) -> np.ndarray:
    """What :func:`copy_scores` compares: optical density at 32 px, without slow changes, mean 0 and length 1.

    Args:
        images: uint8 [N, H, W, 3].

    Returns:
        float32 [N, 32, 32]; a patch of one colour is all 0.
    """
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255.0
    density = -torch.log10(x.clamp_min(_DARKEST)).mean(1, keepdim=True)
    small = F.interpolate(density, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    # Tissue edges and folds are alike in many patches; cells are not.
    slow = F.avg_pool2d(F.pad(small, (SIDE // 8,) * 4, mode="replicate"), SIDE // 4 + 1, stride=1)
    fine = (small - slow)[:, 0]
    fine = fine - fine.mean(dim=(1, 2), keepdim=True)
    length = fine.flatten(1).norm(dim=1)[:, None, None]
    # An empty patch has nothing but the codec's noise: it is like no other one.
    return torch.where(length > 0.01 * SIDE, fine / length.clamp_min(1e-12), torch.zeros(())).numpy()


def invariants(small: np.ndarray) -> np.ndarray:
    """What is the same for a patch and for its copies, to find candidates by nearest neighbours.

    Amplitudes of the Fourier transform, which a shift does not change, averaged over the eight symmetries, up to three
    quarters of the highest frequency, which another codec changes little.

    Args:
        small: Patches from :func:`small_patches`, [N, S, S].

    Returns:
        float32 [N, 90].
    """
    result = np.empty((len(small), len(_OCTANT)), np.float32)
    for start in range(0, len(small), _PAIRS):
        part = slice(start, start + _PAIRS)
        amplitude = torch.fft.fft2(torch.from_numpy(small[part])).abs()
        # A real patch's spectrum is the same turned by 180°: four of the eight symmetries are left.
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

    A tenth of the shifts is looked at, and two small products are several times faster than the whole transform.
    """
    shifts = torch.arange(-SHIFT, SHIFT + 1, dtype=torch.float64)
    turn = 2j * torch.pi / SIDE
    rows = torch.exp(turn * shifts[:, None] * torch.arange(SIDE, dtype=torch.float64)) / SIDE
    half = torch.arange(SIDE // 2 + 1, dtype=torch.float64)
    # The other half of a real patch's spectrum is the conjugate of this one.
    twice = torch.full_like(half, 2.0)
    twice[0] = twice[-1] = 1.0
    columns = twice[:, None] * torch.exp(turn * half[:, None] * shifts) / SIDE
    return rows.to(torch.complex64), columns.to(torch.complex64)


def copy_scores(
    small: np.ndarray, bank: np.ndarray, candidates: np.ndarray, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much each patch is like the most similar of its candidates.

    Args:
        small: Patches from :func:`small_patches`, [N, S, S].
        bank: Others, [M, S, S].
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
    for start in progress(starts, desc="comparing pixels", unit="block") if len(starts) > 16 else starts:
        part = slice(start, min(start + size, n))
        mine = torch.fft.rfft2(_views(torch.from_numpy(small[part]).to(where)))
        other = torch.fft.rfft2(torch.from_numpy(bank[candidates[part]]).to(where))
        product = mine[:, :, None] * other[:, None].conj()
        near = (rows @ (product @ columns)).real
        best, code = near.amax(dim=(-2, -1)).flatten(1).max(dim=1)
        views, which = (x.cpu().numpy() for x in (code // k, code % k))
        score[part], view[part] = best.cpu().numpy(), views
        position[part] = candidates[part][np.arange(len(which)), which]
    return score, position, view
