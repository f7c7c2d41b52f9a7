from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.shards.format import codec
from latent_medi.shards.format.codec import decode_image, encode_image

IMAGE = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def origin_of(data: bytes) -> str:
    """The origin in a PNG's text, a JPEG's comment or a WebP's Exif description."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return image.text["origin"]
        text = image.info["comment"].decode() if image.format == "JPEG" else image.getexif()[0x010E]
    return text.removeprefix("origin=")


def test_png_is_lossless_deterministic_and_carries_its_origin() -> None:
    data = encode_image(IMAGE, "png", "synthetic")
    assert np.array_equal(decode_image(data), IMAGE)
    assert data == encode_image(IMAGE.copy(), "png", "synthetic")
    assert Image.open(io.BytesIO(data)).text == {"origin": "synthetic"}
    assert origin_of(data) == "synthetic"
    assert origin_of(encode_image(IMAGE)) == "real"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_png_of_any_size_is_read_back_and_every_checksum_holds(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for array in (image, np.asfortranarray(image), image[::-1, ::-1], np.zeros_like(image)):
        data = encode_image(array)
        with Image.open(io.BytesIO(data)) as opened:
            opened.verify()  # compares the CRC of every chunk
        assert np.array_equal(decode_image(data), array)


def test_png_is_about_as_small_with_isal_as_with_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("isal", reason="the extra `slides` is not installed")
    ramp = np.add.outer(np.arange(128), np.arange(128))[..., None] // 2 + [20, 40, 60]
    image = np.clip(ramp + np.random.default_rng(0).normal(0, 8, ramp.shape), 0, 255).astype(np.uint8)
    fast = encode_image(image)
    monkeypatch.setattr(codec, "ISAL", False)
    slow = encode_image(image)
    assert fast != slow
    assert np.array_equal(decode_image(fast), image)
    assert np.array_equal(decode_image(slow), image)
    assert len(fast) < 1.05 * len(slow)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_lossy_codecs_are_close_deterministic_and_carry_their_origin(kind: str) -> None:
    smooth = np.broadcast_to(np.linspace(40, 200, 20, dtype=np.uint8)[:, None, None], (20, 20, 3)).copy()
    data = encode_image(smooth, kind, "synthetic")
    assert np.abs(decode_image(data).astype(int) - smooth).max() <= (3 if kind == "jpg" else 6)
    assert data == encode_image(smooth.copy(), kind, "synthetic")
    assert origin_of(data) == "synthetic"
    assert origin_of(encode_image(smooth, kind)) == "real"


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
    with pytest.raises(UserError, match="png, jpg or webp, not 'avif'"):
        encode_image(IMAGE, "avif")
    with pytest.raises(UserError, match="'fake'"):
        encode_image(IMAGE, "png", "fake")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "GIF", "PPM", "TGA", "JPEG2000", "PCX", "SGI"])
def test_formats_that_are_not_promised_are_not_opened(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    with pytest.raises(UserError, match="Not a readable image"):
        decode_image(buffer.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_formats_that_are_promised_are(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(buffer, kind)
    assert np.abs(decode_image(buffer.getvalue())[0, 0].astype(int) - (200, 100, 50)).max() < 12


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_a_mode_that_is_refused_is_named_with_a_conversion(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    with pytest.raises(UserError) as caught:
        decode_image(buffer.getvalue())
    assert "not RGB" in caught.value.message
    assert ("magick" if mode == "I;16" else '.convert("RGB")') in caught.value.hint


_SAMPLES = {}
for _kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP"):
    _buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(_buffer, _kind)
    _SAMPLES[_kind] = _buffer.getvalue()


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(sorted(_SAMPLES)),
    changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.integers(20, 2000),
)
def test_damaged_bytes_are_an_image_or_one_message(kind: str, changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(_SAMPLES[kind])
    for place, byte in changes:
        data[place % len(data)] = byte
    with suppress(UserError):
        image = decode_image(bytes(data[:end]))
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
