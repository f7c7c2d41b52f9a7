"""The eight symmetries of a square (views): histology has no orientation, so each is as likely as the patch as cut.

Views are symmetries of pixels. Rotating latents is not the same as encoding rotated patches, far beyond rounding, so
views are always encoded and never computed from stored latents.
"""

from __future__ import annotations

import numpy as np

VIEWS = 8
"""Number of symmetries; view 0 is the patch as it was cut."""


def view_of(images: np.ndarray, views: int | np.ndarray) -> np.ndarray:
    """Patches under symmetries of the square.

    View v is mirrored (left to right) if v ≥ 4, then rotated v mod 4 times by 90° counter-clockwise.

    Args:
        images: [n, H, W, …] of any type, H = W.
        views: One view for all, or int [n], one for each; 0 to 7.

    Returns:
        Of the same type and shape; not a copy for the single view 0.
    """
    if isinstance(views, (int, np.integer)):
        mirrored = images[:, :, ::-1] if views >= 4 else images
        return np.ascontiguousarray(np.rot90(mirrored, int(views) % 4, axes=(1, 2)))
    out = np.empty_like(images)
    for view in np.unique(views):
        where = np.flatnonzero(views == view)
        out[where] = view_of(images[where], int(view))
    return out
