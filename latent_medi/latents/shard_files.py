"""The files of a latent folder: compared with their hashes before they are read, with a limit on open files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.core.errors import UserError
from latent_medi.latents.info import REMEDY

_OPEN = 64
"""Files that one folder keeps open: far below the limit of a process, and enough for neighbouring batches."""

_BLOCK = 1 << 22
_HEADER = 1 << 20  # bytes; a header is a few hundred
_ITEM = 2  # bytes of a number in fp16

_compared: set[tuple[str, int, int, str]] = set()
"""Path, size, modification time and hash of every file that this process has compared."""


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor in its file.

    Args:
        start: First byte.
        shape: Of the tensor: rows, views if there are several, then C, h and w.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def latent_bytes(self) -> int:
        """Bytes of a latent."""
        return int(np.prod(self.shape[-3:])) * _ITEM


class ShardFile:
    """One safetensors file with fp16 tensors: a length, a JSON header, and the bytes of the tensors.

    Args:
        path: The file.
        sha256: Its recorded hash.
        shapes: Shape by name of every tensor.

    Raises:
        UserError: It is absent, truncated, or has other content.
    """

    def __init__(self, path: Path, sha256: str, shapes: dict[str, list[int]]) -> None:
        self.path, self.sha256 = path, sha256
        try:
            with open(path, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                length = int.from_bytes(handle.read(8), "little")
                if length > _HEADER:
                    raise ValueError("its header is too long")
                header: dict[str, Any] = json.loads(handle.read(length))
            self.tensors = {
                name: self._tensor(name, header[name], shape, 8 + length, size) for name, shape in shapes.items()
            }
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", REMEDY) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}.", REMEDY) from None

    @staticmethod
    def _tensor(name: str, entry: Any, shape: list[int], base: int, size: int) -> Tensor:
        start, end = entry["data_offsets"]
        if entry["shape"] != shape or entry["dtype"] != "F16" or end - start != int(np.prod(shape)) * _ITEM:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']} instead of F16 {shape}")
        if not 0 <= start <= end <= size - base:
            raise ValueError(f"{name} is truncated")
        return Tensor(base + start, tuple(shape))

    def compare(self, handle: int) -> None:
        """Compare the file, open as ``handle``, with its hash, unless this process did so since its last change.

        Raises:
            UserError: Its content has changed.
        """
        stat = os.fstat(handle)
        key = (str(self.path.absolute()), stat.st_size, stat.st_mtime_ns, self.sha256)
        if key in _compared:
            return
        digest, at = hashlib.sha256(), 0
        while block := os.pread(handle, _BLOCK, at):
            digest.update(block)
            at += len(block)
        if digest.hexdigest() != self.sha256:
            raise UserError(f"{self.path} is damaged: it does not have its recorded hash.", REMEDY)
        _compared.add(key)

    def read(self, handle: int, name: str, first: int, out: np.ndarray) -> None:
        """Read consecutive latents, all views of a row in turn, into ``out``, contiguous fp16.

        Raises:
            UserError: The file is too short.
        """
        tensor, buffer = self.tensors[name], memoryview(out.reshape(-1).view(np.uint8).data)
        at = tensor.start + first * tensor.latent_bytes
        while buffer:
            count = os.preadv(handle, [buffer], at)
            if not count:
                raise UserError(f"{self.path} was truncated while it was read.", REMEDY)
            buffer, at = buffer[count:], at + count


def _close(files: OrderedDict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


class OpenFiles:
    """File descriptors of the :data:`_OPEN` last used shard files; each file is first compared with its hash.

    A memory map would keep a descriptor per file, and there is a file per slide.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._open)

    def read(self, file: ShardFile, parts: Iterable[tuple[str, int, np.ndarray]]) -> None:
        """Read (tensor, first latent, where to) of a file.

        Raises:
            UserError: It is gone or damaged.
        """
        with self._lock:
            handle = self._handle(file)
            for name, first, out in parts:
                file.read(handle, name, first, out)

    def _handle(self, file: ShardFile) -> int:
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        while len(self._open) >= _OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            handle = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror}.", REMEDY) from None
        try:
            file.compare(handle)
        except BaseException:
            os.close(handle)
            raise
        self._open[file.path] = handle
        return handle

    def close(self) -> None:
        """Close all of them; they are opened again when needed."""
        with self._lock:
            _close(self._open)
