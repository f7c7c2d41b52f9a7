"""Tar members: written so that the same patches give the same bytes, and found again by their offset."""

from __future__ import annotations

import mmap
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.shards.format.layout import SUM_COLUMNS

BLOCK = 512
"""Bytes of a header; contents are padded to a multiple of it."""
_ARCHIVE_BLOCK = 10240  # tar's customary blocking: an archive is padded to a multiple of it


class Sliced(Protocol):
    """Bytes that are read by slices: ``bytes``, a memory map or :class:`StreamSlices`."""

    def __getitem__(self, part: slice, /) -> bytes:
        """The bytes from ``part.start`` to ``part.stop``, fewer at the end."""


class StreamSlices:
    """A seekable stream as :class:`Sliced`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __getitem__(self, part: slice, /) -> bytes:
        self._stream.seek(max(part.start, 0))
        return self._stream.read(part.stop - part.start)


def tar_member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """Header and padded content of one member; owner, mode and time are fixed.

    Raises:
        UserError: The key in the name is too long for a header.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname = len(data), 0, 0o644, 0, 0, "", ""
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError:
        key = name.rpartition(".")[0]
        raise UserError(
            f"The key {key!r} does not fit a tar: it is too long, {len(key.encode('utf-8', 'replace'))} bytes.",
            "Shorten it: at most 95 bytes in UTF-8 after the last slash, and 155 before it.",
        ) from None
    return header, data + bytes(-len(data) % BLOCK)


def tar_end(size: int) -> bytes:
    """The end of a tar with ``size`` bytes of members: two empty blocks, padded to tar's customary blocking."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _ARCHIVE_BLOCK)


def member_at(data: Sliced, header: int) -> tuple[str, int, int]:
    """Name of the USTAR member whose header is at an offset, and offset and size in bytes of its content.

    Raises:
        ValueError: There is no undamaged header at the offset.
    """
    try:
        info = tarfile.TarInfo.frombuf(data[header : header + BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"no tar header at {header}: {error}") from None
    return info.name, header + BLOCK, info.size


def json_member(data: Sliced, offset: int, size: int) -> tuple[str, int, int]:
    """Name, offset and size in bytes of the JSON member that follows an image member.

    Args:
        data: The tar.
        offset: Of the image's content.
        size: Of the image, in bytes.

    Raises:
        ValueError: No tar header follows.
    """
    return member_at(data, offset + size + -size % BLOCK)


def sample_at(data: Sliced, key: str, codec: str, offset: int, size: int) -> tuple[bytes, bytes]:
    """The image file and the JSON text of a patch.

    Args:
        data: The tar.
        key: The patch's key.
        codec: Ending of the image member.
        offset: Of the image's content.
        size: Of the image, in bytes.

    Raises:
        ValueError: The members at that offset are not those of the patch.
    """
    found = member_at(data, offset - BLOCK)
    name, start, length = json_member(data, offset, size)
    if found != (f"{key}.{codec}", offset, size) or name != f"{key}.json":
        raise ValueError(f"{key!r} is not where the index says")
    return data[offset : offset + size], data[start : start + length]


def with_sums(tar: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """The index rows of one shard with the CRC-32 of their image and JSON members, computed from the shard.

    Args:
        tar: A shard that is known to be undamaged.
        rows: In any order, with ``offset`` and ``size``; checksums in them are replaced.
    """
    sums = np.zeros((len(rows), 2), np.uint32)
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for i, (offset, size) in enumerate(zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True)):
            _, start, length = json_member(data, offset, size)
            sums[i] = zlib.crc32(data[offset : offset + size]), zlib.crc32(data[start : start + length])
    rows = rows.drop(columns=[c for c in SUM_COLUMNS if c in rows])
    place = list(rows.columns).index("size") + 1
    for column in (1, 0):
        rows.insert(place, SUM_COLUMNS[column], sums[:, column])
    return rows
