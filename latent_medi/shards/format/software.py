"""What writes the pixels of a shard: other libraries, or other versions, give the same patches in other bytes."""

from __future__ import annotations

import zlib
from importlib.metadata import version
from importlib.util import find_spec

import PIL

from latent_medi.shards.format.codec import ISAL

WRITTEN_WITH = "written_with"
"""Name of the text in a shard's notes and in its entry in ``dataset.json``."""
FAST_RESIZER = find_spec("cykooz_resizer") is not None
"""Whether cykooz.resizer is installed, which resizes patches of slides; otherwise Pillow does."""
_RESIZED = "resized by "


def resizer_software() -> str:
    """The library that resizes patches of slides, with its version."""
    return f"cykooz.resizer {version('cykooz.resizer')}" if FAST_RESIZER else f"pillow {PIL.__version__}"


def codec_software(codec: str) -> str:
    """The library that compresses images, with its version, such as "isal 1.7.1"."""
    if codec != "png":
        return f"pillow {PIL.__version__}"
    return f"isal {version('isal')}" if ISAL else f"zlib {zlib.ZLIB_RUNTIME_VERSION}"


def written_with(codec: str, resizer: str = "") -> str:
    """What a shard is written with, such as "isal 1.7.1, resized by cykooz.resizer 4.0.1".

    Args:
        codec: ``png``, ``jpg`` or ``webp``.
        resizer: The library that made its patches from larger ones, with its version; empty if there was none.
    """
    return codec_software(codec) + (f", {_RESIZED}{resizer}" if resizer else "")


def other_software(before: str, codec: str) -> str:
    """What to know before a shard is written again, as sentences; empty if its bytes will be the same.

    Args:
        before: What it was written with; empty in a folder of an earlier version.
        codec: ``png``, ``jpg`` or ``webp``.
    """
    resizer = before.partition(_RESIZED)[2]
    here = resizer_software() if resizer else ""
    now = written_with(codec, here)
    if not before or before == now:
        return ""
    pixels = " and its pixels can differ by 1 or 2 of 255" if resizer != here else ""
    return (
        f"It was written with {before}, and here is {now}: its checksum will be another one{pixels}, and latents and "
        "features of it are made again. To keep them, install what it was written with, or restore the file from a "
        "copy."
    )
