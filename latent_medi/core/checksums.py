"""Checksums of folders, as a list of files in ``checksums.json``, and of safetensors files, in their metadata.

Files of earlier versions and of other programs have no checksum: they are read with one warning per path.
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
from latent_medi.core.files import JsonObject, atomic_path, read_sealed, sha256_file, write_sealed
from latent_medi.core.progress import get_logger

log = get_logger(__name__)

CHECKSUMS_FILE = "checksums.json"
"""File of a folder that lists the SHA-256 of the other files."""

_TENSORS = "sha256"  # key in the metadata of a safetensors file


def inside(folder: Path, name: Any, named_in: Path) -> Path:
    """The path of a file that a JSON file names; it must be inside a folder.

    Args:
        folder: The folder.
        name: Relative path, with forward slashes.
        named_in: The JSON file, for the message.

    Raises:
        UserError: ``name`` is no text, absolute, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and name and "\\" not in name else ("..",)
    if ".." in parts or parts[0].startswith("/") or ":" in parts[0] or "\0" in str(name):
        raise UserError(
            f"{named_in} names {name!r}, which is no file inside its folder.", "Restore it from where it was written."
        )
    return folder.joinpath(*parts)


def read_result(path: Path, remedy: str) -> JsonObject:
    """Read a JSON object of :func:`~latent_medi.core.files.write_sealed`; warn once if it has no checksum.

    Raises:
        UserError: The file is absent, no JSON object, or damaged.
    """
    value, sealed = read_sealed(path, remedy)
    if not sealed:
        warn_unsealed(path, remedy)
    return value


@lru_cache(maxsize=1024)
def warn_unsealed(path: Path, remedy: str = "") -> None:
    """Warn, once per path and process, that a file or folder has no checksums.

    Args:
        path: The file or folder.
        remedy: How to add checksums, as a sentence; by default the command that adds them.
    """
    remedy = remedy or f"`latent-medi shards verify {path} seal=true` adds them."
    log.warning("%s has no checksums, so damage to it would not be noticed. %s", path, remedy)


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write :data:`CHECKSUMS_FILE` into a folder.

    Args:
        folder: The folder.
        names: Files, relative to the folder; by default every JSON and safetensors file at any depth.
    """
    if names is None:
        found = [p for ending in ("*.json", "*.safetensors") for p in folder.rglob(ending)]
        names = [p.relative_to(folder).as_posix() for p in found if p != folder / CHECKSUMS_FILE]
    write_sealed(folder / CHECKSUMS_FILE, {"sha256": {name: sha256_file(folder / name) for name in sorted(names)}})


def verify_checksums(folder: Path, remedy: str) -> bool:
    """Compare a folder's files with its :data:`CHECKSUMS_FILE`.

    Args:
        folder: The folder.
        remedy: What to do if a file is damaged, as a sentence.

    Returns:
        Whether the folder has checksums.

    Raises:
        UserError: A file is absent or damaged.
    """
    file = folder / CHECKSUMS_FILE
    if not file.exists():
        return False
    content, sealed = read_sealed(file, remedy)
    listed = content.get("sha256")
    if not sealed or not isinstance(listed, dict):
        raise UserError(f"{file} is damaged: it has no checksum of its own, or lists no files.", remedy)
    compare(folder, listed, file, remedy)
    return True


def compare(folder: Path, listed: Mapping[str, Any], named_in: Path, remedy: str) -> None:
    """Compare files with a list of their SHA-256.

    Raises:
        UserError: A file is absent, damaged, outside the folder, or cannot be read.
    """
    for name, expected in listed.items():
        path = inside(folder, name, named_in)
        try:
            right = path.is_file() and sha256_file(path) == expected
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", remedy) from None
        if not right:
            state = "is damaged: its checksum is wrong" if path.is_file() else "is absent"
            raise UserError(f"{path} {state}.", remedy)


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of the file's other metadata."""
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
    """Write tensors of PyTorch or NumPy as a safetensors file, atomically, with a checksum in its metadata."""
    entries = dict(metadata or {})
    entries[_TENSORS] = _digest(tensors, entries)
    with atomic_path(path) as temporary:
        if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            save_arrays(dict(tensors), temporary, metadata=entries)
        else:
            from safetensors.torch import save_file

            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata=entries)


def load_tensors(path: Path, remedy: str, framework: Literal["np", "pt"] = "np") -> tuple[dict[str, Any], bool]:
    """Read tensors written by :func:`save_tensors`, and check their checksum.

    Args:
        path: The file.
        remedy: What to do if the file is damaged, as a sentence.
        framework: "np" for NumPy arrays, "pt" for PyTorch tensors.

    Returns:
        The tensors by name, and whether the file had a checksum.

    Raises:
        UserError: The file is absent, no safetensors file, or damaged.
    """
    try:
        with safe_open(path, framework) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors raises a class of its own for each kind of damage
        raise UserError(f"{path} is damaged: {error}", remedy) from None
    if _TENSORS in metadata and metadata[_TENSORS] != _digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum is wrong.", remedy)
    return tensors, _TENSORS in metadata
