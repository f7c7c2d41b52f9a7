"""Checksums of what is not JSON: a folder's files in one list beside them, and tensors within their own file.

What earlier versions and other programs wrote has none; it is read, with one warning per path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_sealed, sha256_file, write_sealed
from latent_medi.core.progress import get_logger

log = get_logger(__name__)

SUMS_FILE = "checksums.json"
"""A folder's list of files that are read, with the SHA-256 of each."""

_TENSORS = "sha256"  # key of a safetensors file's metadata


def inside(folder: Path, name: Any, told_in: Path) -> Path:
    """The path of a file that a JSON file names, which must lie in a folder.

    Args:
        folder: The folder.
        name: Relative, with forward slashes.
        told_in: The JSON file, for the message.

    Raises:
        UserError: It is no name, absolute, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and name and "\\" not in name else ("..",)
    if ".." in parts or parts[0].startswith("/") or ":" in parts[0] or "\0" in str(name):
        raise UserError(
            f"{told_in} names {name!r}, which is no file inside its folder.", "Restore it from where it was written."
        )
    return folder.joinpath(*parts)


def read_result(path: Path, remedy: str) -> dict[str, Any]:
    """Read JSON of :func:`~latent_medi.core.files.write_sealed`; a file without a checksum is reported once.

    Raises:
        UserError: It is absent, no JSON object, or damaged.
    """
    value, sealed = read_sealed(path, remedy)
    if not sealed:
        tell_unsealed(path, remedy)
    return value


@lru_cache(maxsize=1024)
def tell_unsealed(path: Path, mended: str = "") -> None:
    """Warn, once per path and process, that damage to something would not be noticed.

    Args:
        path: A folder or file without checksums.
        mended: How it gets some, in a sentence; by default the command that adds them.
    """
    mended = mended or f"`latent-medi shards verify {path} seal=true` adds them."
    log.warning("%s has no checksums, so damage to it would not be noticed. %s", path, mended)


def write_sums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write :data:`SUMS_FILE` into a folder.

    Args:
        folder: The folder.
        names: Files, relative to it; ``None`` takes every JSON and safetensors file at any depth.
    """
    if names is None:
        found = [p for ending in ("*.json", "*.safetensors") for p in folder.rglob(ending)]
        names = [p.relative_to(folder).as_posix() for p in found if p != folder / SUMS_FILE]
    write_sealed(folder / SUMS_FILE, {"sha256": {name: sha256_file(folder / name) for name in sorted(names)}})


def check_sums(folder: Path, remedy: str) -> bool:
    """Compare a folder's files with its :data:`SUMS_FILE`.

    Args:
        folder: The folder.
        remedy: What to do if something is damaged, in a sentence.

    Returns:
        Whether it has that file.

    Raises:
        UserError: A file is absent, or is not what was written.
    """
    file = folder / SUMS_FILE
    if not file.exists():
        return False
    told, sealed = read_sealed(file, remedy)
    listed = told.get("sha256")
    if not sealed or not isinstance(listed, dict):
        raise UserError(f"{file} is damaged: it has no checksum of its own, or lists no files.", remedy)
    compare(folder, listed, file, remedy)
    return True


def compare(folder: Path, listed: Mapping[str, Any], told_in: Path, remedy: str) -> None:
    """Compare files with a list of their SHA-256.

    Raises:
        UserError: A file is absent, outside the folder, cannot be read, or is not what was written.
    """
    for name, expected in listed.items():
        path = inside(folder, name, told_in)
        try:
            right = path.is_file() and sha256_file(path) == expected
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", remedy) from None
        if not right:
            state = "is damaged: it does not have the checksum it was written with" if path.is_file() else "is absent"
            raise UserError(f"{path} {state}.", remedy)


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors of one framework, and over a file's other metadata."""
    kept = {key: value for key, value in metadata.items() if key != _TENSORS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        if isinstance(tensor, np.ndarray):
            digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        else:
            import torch

            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of PyTorch or NumPy as a safetensors file with their checksum in its metadata, atomically."""
    told = dict(metadata or {})
    told[_TENSORS] = _digest(tensors, told)
    with atomic_path(path) as temporary:
        if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            save_arrays(dict(tensors), temporary, metadata=told)
        else:
            from safetensors.torch import save_file

            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=told)


def load_tensors(path: Path, remedy: str, framework: Literal["np", "pt"] = "np") -> tuple[dict[str, Any], bool]:
    """Read what :func:`save_tensors` wrote.

    Args:
        path: The file.
        remedy: What to do if it is damaged, in a sentence.
        framework: "np" for arrays, "pt" for PyTorch's tensors.

    Returns:
        The tensors by name, and whether they had a checksum.

    Raises:
        UserError: It is absent, no safetensors file, or not what was written.
    """
    try:
        with safe_open(path, framework) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # safetensors has its own for each way in which a file is wrong
        raise UserError(f"{path} is damaged: {error}", remedy) from None
    if _TENSORS in metadata and metadata[_TENSORS] != _digest(tensors, metadata):
        raise UserError(f"{path} is damaged: it does not have the checksum it was written with.", remedy)
    return tensors, _TENSORS in metadata
