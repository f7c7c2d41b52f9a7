"""``latents.json``: what a latent folder holds, read with its checksum and types compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_medi.core.checksums import compare, inside, warn_unsealed
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.json_types import check_types

INFO_FILE = "latents.json"
SCHEMA_VERSION = 2
"""Version 1 had one view per patch and did not say so; it is read as before."""

REMEDY = "Restore the folder from a copy, or remove it and encode again."


_SHARD = {"file": str, "sha256": str, "source": str, "source_sha256": str, "count": int}
_AUTOENCODER = {"source": str, "hash": str, "deterministic": bool, "precision?": str}
_PSNR = {"mean": float, "worst": float, "worst_key": str}
_ENCODER = {"name": str, "dim": int}
_FLOOR = {"patches": int, "of": int, "psnr": _PSNR, "encoder": _ENCODER, "fd": (float, None), "kid": (float, None)}
_INFO = {"dataset?": str, "autoencoder": _AUTOENCODER, "shape": [int], "views?": int, "count?": int}
_INFO |= {"shards": [_SHARD], "floor?": _FLOOR}


def read_info(folder: Path) -> dict[str, Any]:
    """The content of a finished latent folder's ``latents.json``.

    Raises:
        UserError: It is absent, damaged, of a newer version, or names a file outside the folder.
    """
    path = folder / INFO_FILE
    info, sealed = read_sealed(path, REMEDY)
    if info.get("schema_version") not in range(1, SCHEMA_VERSION + 1):
        raise UserError(
            f"{folder} has latent version {info.get('schema_version')!r}; this program reads up to {SCHEMA_VERSION}.",
            "Use the version of the program that wrote it, or encode again.",
        )
    check_types(info, _INFO, path, REMEDY)
    if len(info["shape"]) != 3 or min(info["shape"]) < 1 or info.get("views", 1) not in (1, 8):
        raise UserError(f"{path} is damaged: latents of shape {info['shape']}, {info.get('views', 1)} views.", REMEDY)
    for shard in info["shards"]:
        if not 0 <= shard["count"] < 2**40:
            raise UserError(f"{path} is damaged: {shard['file']} cannot hold {shard['count']:.0e} patches.", REMEDY)
    for shard in info["shards"]:
        inside(folder, shard["file"], path)
    if not sealed:
        warn_unsealed(folder)
    return info


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Write ``latents.json`` with its checksum."""
    write_sealed(folder / INFO_FILE, info)


def seal_latents(folder: str | Path) -> None:
    """Add checksums to a latent folder of an earlier version, once every file has the hash that was noted for it.

    Raises:
        UserError: It is no finished latent folder, or damaged.
    """
    folder = Path(folder)
    info = read_info(folder)
    compare(folder, {shard["file"]: shard["sha256"] for shard in info["shards"]}, folder / INFO_FILE, REMEDY)
    write_info(folder, info)
