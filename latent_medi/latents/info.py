"""``latents.json``: what a latent folder holds, read with its checksum and types compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.core.checksums import compare, inside, warn_unsealed
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.json_types import check_types

INFO_FILE = "latents.json"
SCHEMA_VERSION = 2
"""Version 1 had one view per patch and did not say so; it is read as before."""

REMEDY = "Restore the folder from a copy, or remove it and encode again."


_SHARD = {"file": str, "sha256": str, "source": str, "source_sha256": str, "count": int, "rows?": [int]}
_AUTOENCODER = {"source": str, "hash": str, "deterministic": bool, "precision?": str, "latents_of?": [str]}
_PSNR = {"mean": float, "worst": float, "worst_key": str}
_ENCODER = {"name": str, "dim": int}
_FLOOR = {"patches": int, "of": int, "psnr": _PSNR, "encoder": _ENCODER, "fd": (float, None), "kid": (float, None)}
_INFO = {"dataset?": str, "autoencoder": _AUTOENCODER, "shape": [int], "views?": int, "count?": int}
_INFO |= {"shards": [_SHARD], "floor?": _FLOOR}
_INFO |= {"only?": {...: [str]}, "of?": int, "source_sha256?": str}


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


def as_ranges(rows: np.ndarray) -> list[int]:
    """Ascending row numbers as ranges: first, last + 1, first, last + 1 and so on."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    firsts, lasts = rows[np.concatenate([[0], breaks + 1])], rows[np.concatenate([breaks, [len(rows) - 1]])]
    ranges: list[int] = np.stack([firsts, lasts + 1], axis=1).reshape(-1).tolist()
    return ranges


def held_rows(info: Mapping[str, Any], folder: Path) -> np.ndarray | None:
    """Row numbers of the dataset that a latent folder has latents of, ascending int64 [n]; ``None`` for every row.

    Raises:
        UserError: ``latents.json`` does not say which.
    """
    if "only" not in info:
        return None
    bounds = np.array([bound for shard in info["shards"] for bound in shard.get("rows", ())], dtype=np.int64)
    starts, ends = bounds[::2], bounds[1::2]
    whole = len(starts) == len(ends) and (np.diff(bounds) >= 0).all() and (ends > starts).all()
    if not whole or (len(bounds) and not 0 <= bounds[0] <= bounds[-1] <= info.get("of", 0)):
        raise UserError(f"{folder / INFO_FILE} is damaged: it does not say which rows were encoded.", REMEDY)
    rows = np.concatenate([np.zeros(0, np.int64), *map(np.arange, starts, ends)])
    if len(rows) != sum(shard["count"] for shard in info["shards"]):
        raise UserError(f"{folder / INFO_FILE} is damaged: it has {len(rows)} rows, other than its shards.", REMEDY)
    return rows


def source_hash(shards: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the hashes of all shards of a dataset, in order."""
    return hashlib.sha256("\n".join(str(shard["sha256"]) for shard in shards).encode()).hexdigest()


def made_from(info: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> bool:
    """Whether latents were encoded from a dataset, given its ``shards``: all of them, or some of its rows."""
    if "only" in info:
        return bool(info.get("source_sha256") == source_hash(shards))
    return [s["source_sha256"] for s in info["shards"]] == [s["sha256"] for s in shards]


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
