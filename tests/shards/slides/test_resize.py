from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from latent_medi.shards.slides import resize


@pytest.mark.parametrize(
    ("edge", "box"),
    [(64, (0.0, 0.0, 96.0, 96.0)), (64, (0.0, 0.0, 95.4, 95.7)), (64, (0.0, 0.0, 48.0, 90.2)), (96, (0, 0, 50, 50))],
)
def test_the_fast_resize_gives_pillows_pixels_but_for_rounding(
    edge: int, box: resize.Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cykooz_resizer", reason="the extra `slides` is not installed")
    draw = np.random.default_rng(0)
    differ, places = np.zeros(3), 0
    for _ in range(20):
        # Black and white next to each other: rounding between the passes would show if their order were another.
        noise = ndimage.gaussian_filter(draw.normal(size=(96, 96, 3)), (1, 1, 0))
        image = Image.fromarray(np.clip(128 + 400 * noise, 0, 255).astype(np.uint8))
        fast = resize.lanczos(image, edge, box).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(resize, "FAST", False)
            slow = resize.lanczos(image, edge, box)
        assert fast.shape == slow.shape == (edge, edge, 3)
        differ += [(np.abs(fast - slow) > much).sum() for much in range(3)]
        places += fast.size
    assert differ[0] < places / 100
    assert differ[1] < places / 5_000
    assert differ[2] == 0
