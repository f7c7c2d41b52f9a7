"""Patches as bytes and back, with their origin inside the file."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from latent_medi.errors import UserError

CODECS = ("png", "jpg")
ORIGINS = ("real", "synthetic")

Origin = Literal["real", "synthetic"]

# zlib's run-length strategy: stained tissue hardly ever repeats itself, so that searching for repeats is lost work.
# The files are as small as at level 6, and are written and read about a third faster than at level 1.
_PNG = {"compress_level": 1, "compress_type": 3}
_JPEG_QUALITY = 95


def check_codec(codec: str) -> None:
    """Refuse a codec other than ``png`` and ``jpg``.

    Raises:
        UserError: It is another.
    """
    if codec not in CODECS:
        raise UserError(f"Images are stored as {' or '.join(CODECS)}, not {codec!r}.")


def check_image(image: np.ndarray) -> None:
    """Refuse an array that is not uint8 [H, W, 3].

    Raises:
        UserError: It has another type or shape.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"A patch is a uint8 array [height, width, 3], not {what}.")


def encode_image(array: np.ndarray, codec: str = "png", origin: str = "real") -> bytes:
    """A patch as the bytes of an image file; the same patch always gives the same bytes.

    Args:
        array: uint8 [H, W, 3], RGB.
        codec: ``png`` (lossless) or ``jpg`` (quality 95, full chroma).
        origin: ``real`` or ``synthetic``; PNG text chunk ``origin``, JPEG comment ``origin=…``.

    Raises:
        UserError: Another codec, origin, type or shape.
    """
    check_codec(codec)
    check_image(array)
    if origin not in ORIGINS:
        raise UserError(f"The origin of a patch is {' or '.join(ORIGINS)}, not {origin!r}.")
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if codec == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("origin", origin)
        image.save(buffer, "PNG", **_PNG, pnginfo=text)
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, comment=f"origin={origin}".encode())
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """The patch in an image file's bytes, uint8 [H, W, 3] RGB.

    Raises:
        UserError: The bytes are no whole image, or the image is not 8-bit RGB.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            image.load()
            array = np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"Not a readable image: {str(error).replace(repr(data), 'data')[:200]}.") from None
    if mode != "RGB":
        raise UserError(
            f"The image is {mode}, not RGB.", "Convert it deliberately: transparency and palettes have no one reading."
        )
    return array


def image_origin(data: bytes) -> str:
    """The origin written in an image file's bytes; ``""`` if there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            comment = image.info.get("comment", b"")
            text = image.info.get("origin") or (
                comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment
            )
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"Not a readable image: {error}.") from None
    return str(text).removeprefix("origin=")
