"""The eight symmetries of a square: histology has no up, so each of them shows tissue as likely as it was cut.

They act on pixels. An autoencoder's latents do not turn with its images: turning latents instead gives others than
encoding turned patches, far beyond rounding, so that views are encoded, never made from stored latents.
"""

from __future__ import annotations

import numpy as np

VIEWS = 8
"""Number of symmetries; view 0 is the patch as it was cut."""


def view_of(images: np.ndarray, views: int | np.ndarray) -> np.ndarray:
    """Patches under symmetries of the square.

    View v is a mirror image (left to right) if v ≥ 4, then turned v mod 4 times by 90° against the clock.

    Args:
        images: [n, H, W, …] of any type, H = W.
        views: One view for all, or int [n]: one for each; 0 to 7.

    Returns:
        Of the same type and shape; the patches themselves, not a copy, for the single view 0.
    """
    if isinstance(views, (int, np.integer)):
        mirrored = images[:, :, ::-1] if views >= 4 else images
        return np.ascontiguousarray(np.rot90(mirrored, int(views) % 4, axes=(1, 2)))
    out = np.empty_like(images)
    for view in np.unique(views):
        where = np.flatnonzero(views == view)
        out[where] = view_of(images[where], int(view))
    return out
