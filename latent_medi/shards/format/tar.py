"""Tar members: written so that the same patches give the same bytes, and found again by their offset."""

from __future__ import annotations

import mmap
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.shards.format.layout import SUM_COLUMNS

BLOCK = 512
"""Bytes of a header; contents are padded to a multiple of it."""
_ARCHIVE_BLOCK = 10240  # tar's customary blocking: an archive is padded to a multiple of it


def tar_member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """Header and padded content of one member; owner, mode and time are fixed.

    Raises:
        UserError: The name is too long for a header.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname = len(data), 0, 0o644, 0, 0, "", ""
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise UserError(f"{name!r} does not fit a tar header: {error}.", "Keep keys below 100 bytes.") from None
    return header, data + bytes(-len(data) % BLOCK)


def tar_end(size: int) -> bytes:
    """The end of a tar with ``size`` bytes of members: two empty blocks, padded to tar's customary blocking."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _ARCHIVE_BLOCK)


def member_at(data: mmap.mmap, header: int) -> tuple[str, int, int]:
    """Name of the USTAR member whose header is at an offset, and offset and size in bytes of its content.

    Raises:
        ValueError: There is no header at the offset.
    """
    block = data[header : header + BLOCK]
    if len(block) < BLOCK or block[257:262] != b"ustar":
        raise ValueError(f"no tar header at {header}")
    name, prefix = (part.partition(b"\0")[0] for part in (block[:100], block[345:500]))
    return ((prefix + b"/" if prefix else b"") + name).decode(), header + BLOCK, int(block[124:135], 8)


def json_member(data: mmap.mmap, offset: int, size: int) -> tuple[str, int, int]:
    """Name, offset and size in bytes of the JSON member that follows an image member.

    Args:
        data: The tar.
        offset: Of the image's content.
        size: Of the image, in bytes.

    Raises:
        ValueError: No tar header follows.
    """
    return member_at(data, offset + size + -size % BLOCK)


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
