"""A few tags of a TIFF that OpenSlide does not report: it silently turns 16 bits into 8, for example."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from pathlib import Path

_BITS, _PHOTOMETRIC, _TILE_WIDTH, _SAMPLE_FORMAT = 258, 262, 322, 339
_TYPES = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG and LONG8; the tags above have no other
_MOST_ENTRIES = 4096
_FLOAT = 3


@dataclass(frozen=True)
class TiffTags:
    """How the first image of a TIFF is stored.

    Args:
        bits: Largest number of bits of a sample (a channel of a pixel).
        tiled: Whether in tiles; else in strips.
        floating: Whether samples are floating-point numbers.
        white_is_zero: Whether 0 is white (MINISWHITE).
    """

    bits: int
    tiled: bool
    floating: bool
    white_is_zero: bool


def tiff_tags(path: str | Path) -> TiffTags | None:
    """The tags of a TIFF's or BigTIFF's first image, or ``None`` if the file is no valid TIFF.

    Args:
        path: A regular file. Not one of Hamamatsu's, which has other offsets beyond 4 GiB.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return _read(Path(path))
    except (struct.error, ValueError, OverflowError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset that no file has
            return None
        raise


def _read(path: Path) -> TiffTags | None:
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None:
            return None
        version = struct.unpack(order + "H", head[2:4])[0]
        if version not in (42, 43):
            return None
        big = version == 43
        file.seek(struct.unpack(order + "Q", head[8:16])[0] if big else struct.unpack(order + "I", head[4:8])[0])
        count = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))[0]
        if not 0 < count <= _MOST_ENTRIES:
            return None
        form, room = (order + "HHQ8s", 8) if big else (order + "HHI4s", 4)
        size = struct.calcsize(form)
        entries = file.read(count * size)
        found: dict[int, tuple[int, ...]] = {}
        for tag, kind, number, value in struct.iter_unpack(form, entries[: len(entries) // size * size]):
            if tag not in (_BITS, _PHOTOMETRIC, _TILE_WIDTH, _SAMPLE_FORMAT) or kind not in _TYPES or number > 64:
                continue
            needed = struct.calcsize(_TYPES[kind]) * number
            if needed > room:
                file.seek(struct.unpack(order + ("Q" if big else "I"), value)[0])
                value = file.read(needed)
            found[tag] = struct.unpack(f"{order}{number}{_TYPES[kind]}", value[:needed])
    if not found:
        return None
    floating = _FLOAT in found.get(_SAMPLE_FORMAT, ())
    bits = max(found.get(_BITS, (1,)), default=1)
    return TiffTags(bits, _TILE_WIDTH in found, floating, white_is_zero=found.get(_PHOTOMETRIC) == (0,))
