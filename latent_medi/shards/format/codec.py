"""Encoding patches as image files with their origin inside, and decoding them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from latent_medi.core.errors import UserError
from latent_medi.shards.settings import Codec

Origin = Literal["real", "synthetic"]
CODECS: tuple[str, ...] = get_args(Codec)
ORIGINS: tuple[str, ...] = get_args(Origin)

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
"""Pillow's formats that are read. It opens dozens more, some with the help of other programs."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ISAL = find_spec("isal") is not None
"""Whether isal is installed. It compresses four times as fast as zlib: the same pixels in other bytes."""
_PNG_UP = 2  # the filter of a row that stores differences from the row above
_JPEG_QUALITY = 95
_WEBP = {"quality": 80, "method": 5}  # method 6 is 1% smaller, and takes three times as long
_EXIF_DESCRIPTION = 0x010E
_PNG_DEPTH = 24  # offset of the bit depth: signature, length and name of the header, width and height come first
_BITS_PER_SAMPLE = 258  # TIFF tag
_PLAIN = 'Convert it deliberately: from PIL import Image; Image.open("old.png").convert("RGB").save("new.png")'
_CONVERSIONS = {
    "RGBA": 'Say what shows through, here white: from PIL import Image; i = Image.open("old.png"); '
    'Image.alpha_composite(Image.new("RGBA", i.size, "white"), i).convert("RGB").save("new.png")',
}
"""Python that converts an image, by Pillow's mode; :data:`_PLAIN` for others."""


def check_codec(codec: str) -> None:
    """Refuse a codec other than those of :data:`CODECS`.

    Raises:
        UserError: It is another.
    """
    if codec not in CODECS:
        raise UserError(f"Images are stored as {', '.join(CODECS[:-1])} or {CODECS[-1]}, not {codec!r}.")


def check_image(image: np.ndarray) -> None:
    """Refuse an array that is not uint8 [H, W, 3].

    Raises:
        UserError: It has another type or shape.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"A patch is a uint8 array [height, width, 3], not {what}.")


def encode_image(array: np.ndarray, codec: str = "png", origin: str = "real") -> bytes:
    """The bytes of an image file with a patch; the same patch gives the same bytes (a PNG, with :data:`ISAL` alike).

    Args:
        array: uint8 [H, W, 3], RGB.
        codec: ``png`` (lossless), ``jpg`` (quality 95, full chroma) or ``webp`` (quality 80: about a seventh of a PNG's
            bytes, for datasets that are shipped).
        origin: ``real`` or ``synthetic``; stored as PNG text chunk ``origin``, as JPEG comment ``origin=…`` and in the
            description of WebP's Exif.

    Raises:
        UserError: Another codec, origin, type or shape.
    """
    check_codec(codec)
    check_image(array)
    if origin not in ORIGINS:
        raise UserError(f"The origin of a patch is {' or '.join(ORIGINS)}, not {origin!r}.")
    if codec == "png":
        return _png(array, origin)
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if codec == "webp":
        image.save(buffer, "WEBP", **_WEBP, exif=_exif(origin))
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, comment=_comment(origin))
    return buffer.getvalue()


def _comment(origin: str) -> bytes:
    return f"origin={origin}".encode()


def _exif(origin: str) -> Image.Exif:
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = f"origin={origin}"
    return exif


class SyntheticImage(Image.Image):
    """An image of Pillow that marks its files as synthetic where :func:`encode_image` does.

    ``save`` as PNG, JPEG, WebP, TIFF or GIF writes the mark; BMP and PPM have no place for it. What Pillow makes
    of the image (``copy``, ``resize``, ``convert``) is an image of its own class, which has the mark in ``info``: JPEG,
    JPEG 2000 and GIF files still carry it then, PNG and WebP files do not.
    """

    @staticmethod
    def of(array: np.ndarray) -> Image.Image:
        """The image of uint8 [H, W, 3]."""
        image = Image.fromarray(array)
        image.__class__ = SyntheticImage  # Pillow has no way to make an image of a subclass
        image.info |= {"origin": "synthetic", "comment": _comment("synthetic")}
        return image

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As Pillow's, with the mark in the file; ``pnginfo``, ``comment`` and ``exif`` of the caller are kept."""
        text = params.get("pnginfo") or PngInfo()
        text.add_text("origin", "synthetic")
        mark = {"comment": _comment("synthetic"), "exif": _exif("synthetic")}
        super().save(fp, format, **{**mark, **params, "pnginfo": text})


def _png(array: np.ndarray, origin: str) -> bytes:
    """A PNG file (W3C Portable Network Graphics, third edition) of uint8 [H, W, 3], with the origin as its text.

    Every row is stored as its difference from the row above. Pillow tries five filters per row, which takes as long as
    all the rest: the file is 4 % smaller, is written in 2.2 times the time and read in 1.3 times.
    """
    height, width, _ = array.shape
    pixels = array.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = _PNG_UP
    rows[:1, 1:] = pixels[:1]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB, not interlaced
        (b"tEXt", b"origin\0" + origin.encode()),
        (b"IDAT", _deflated(rows)),
        (b"IEND", b""),
    )
    return _PNG_SIGNATURE + b"".join(
        part
        for name, data in chunks
        for part in (struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
    )


def _deflated(rows: np.ndarray) -> bytes:
    """A zlib stream of some bytes, uint8 [n, m]."""
    if ISAL:
        from isal import isal_zlib

        return isal_zlib.compress(rows.data, 1)
    # The run-length strategy: stained tissue hardly ever repeats itself, so a search for repeats is wasted work.
    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return deflate.compress(rows.data) + deflate.flush()


def decode_image(data: bytes) -> np.ndarray:
    """The patch in an image file's bytes, uint8 [H, W, 3] RGB.

    Raises:
        UserError: The bytes are no whole image of :data:`FORMATS`, hold several, or the image is not 8-bit RGB; then
            the hint says how to convert it.
    """
    with open_image(io.BytesIO(data)) as image:
        check_header(image)
        image.load()
        return np.asarray(image)


@contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """An image file of one of :data:`FORMATS`, opened; every error inside becomes a :class:`UserError`.

    Raises:
        UserError: It is no whole image.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(f"Not a readable image: none of {', '.join(FORMATS)}, or cut off.") from None
    except Exception as error:  # Pillow lets through whatever a damaged header leads to: KeyError, TypeError, …
        raise UserError(f"Not a readable image: {str(error)[:200] or type(error).__name__}.") from None


def check_header(image: Image.Image) -> None:
    """Refuse an opened image that is not one picture of 8-bit RGB; nothing is decoded.

    Raises:
        UserError: It is not; the text is the same for all images of a kind, the hint says how to convert them.
    """
    bits = _bits(image)
    if bits > 8 or image.mode.startswith("I;16"):
        raise UserError(
            f"The image has {max(bits, 16)} bits per channel, not RGB of 8 bits.",
            "Convert it deliberately: `magick old.png -depth 8 new.png`, or where a camera wrote 12 bits "
            "`magick old.png -evaluate Multiply 16.0037 -depth 8 new.png`.",
        )
    if image.mode != "RGB":
        raise UserError(f"The image is {image.mode}, not RGB.", _CONVERSIONS.get(image.mode, _PLAIN))
    if image.format in ("TIFF", "PNG", "WEBP") and _pictures(image) > 1:
        raise UserError("The image holds several pictures.", "Save the one you need as a file of its own.")


def _bits(image: Image.Image) -> int:
    """Bits per channel in the file, which Pillow silently reduces to 8."""
    if image.format == "TIFF":
        depth = cast(Any, image).tag_v2.get(_BITS_PER_SAMPLE, 8)
        return max(depth) if isinstance(depth, tuple) else int(depth)
    if image.format == "PNG":
        file = cast(Any, image).fp
        place = file.tell()
        file.seek(_PNG_DEPTH)
        depth = file.read(1)[0]
        file.seek(place)
        return depth
    return 8  # JPEG of more is refused by Pillow, WebP has no more, and BMP has at most 8 per channel


def _pictures(image: Image.Image) -> int:
    """Pictures of the first one's size; a smaller one is a thumbnail or a level of a pyramid."""
    count, size = getattr(image, "n_frames", 1), image.size
    if count > 1 and image.format == "TIFF":
        sizes = []
        for number in range(count):
            image.seek(number)
            sizes.append(image.size)
        image.seek(0)
        return sizes.count(size)
    return count
