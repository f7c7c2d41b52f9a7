from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from latent_medi.errors import UserError
from latent_medi.shards.codec import decode_image, encode_image, image_origin

IMAGE = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def test_png_is_lossless_deterministic_and_carries_its_origin() -> None:
    data = encode_image(IMAGE, "png", "synthetic")
    assert np.array_equal(decode_image(data), IMAGE)
    assert data == encode_image(IMAGE.copy(), "png", "synthetic")
    assert Image.open(io.BytesIO(data)).text == {"origin": "synthetic"}
    assert image_origin(data) == "synthetic"
    assert image_origin(encode_image(IMAGE)) == "real"


def test_jpg_is_close_and_carries_its_origin() -> None:
    smooth = np.broadcast_to(np.linspace(40, 200, 20, dtype=np.uint8)[:, None, None], (20, 20, 3)).copy()
    data = encode_image(smooth, "jpg", "synthetic")
    assert np.abs(decode_image(data).astype(int) - smooth).max() <= 3
    assert image_origin(data) == "synthetic"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_other_modes_are_refused(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, "TIFF")
    with pytest.raises(UserError, match="not RGB"):
        decode_image(buffer.getvalue())


def test_damaged_bytes_and_wrong_arrays_are_refused() -> None:
    data = encode_image(IMAGE)
    for bad in (b"", b"no image", data[: len(data) // 2]):
        with pytest.raises(UserError, match="readable"):
            decode_image(bad)
    for array in (IMAGE.astype(np.float32), IMAGE[..., 0], IMAGE[..., :2]):
        with pytest.raises(UserError, match="uint8"):
            encode_image(array)
    with pytest.raises(UserError, match="'webp'"):
        encode_image(IMAGE, "webp")
    with pytest.raises(UserError, match="'fake'"):
        encode_image(IMAGE, "png", "fake")
