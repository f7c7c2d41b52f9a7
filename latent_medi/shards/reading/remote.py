"""Dataset folders behind a URL: ``s3://``, ``gs://``, ``hf://``, ``https://`` and whatever else fsspec opens.

The index is fetched once. Patches are fetched as byte ranges of the tars, many at a time: any order costs the same, and
no tar is downloaded whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from latent_medi.core.errors import UserError
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.folder import INDEX_FILE, INFO_FILE, NEXT_INDEX, index_fits, read_folder

_AT_ONCE = 256  # byte ranges per request to the file system

_REMOTE = ("s3", "s3a", "gs", "gcs", "http", "https")  # protocols of the extra `remote`


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL, not a local path."""
    return "://" in str(place)


def open_dataset(place: str | Path, storage: Mapping[str, Any] | None = None) -> PatchDataset:
    """Open a dataset folder, local or behind a URL.

    Args:
        place: A local folder, or a URL such as ``s3://bucket/prostate``.
        storage: What fsspec's file system needs, such as ``{"anon": True}`` or ``{"endpoint_url": …}``.

    Raises:
        UserError: It is no dataset, cannot be reached, or fsspec lacks what the protocol needs.
    """
    return RemotePatchDataset.fetch(str(place), dict(storage or {})) if is_url(place) else PatchDataset.open(place)


class RemotePatchDataset(PatchDataset):
    """A dataset folder behind a URL, for reading only.

    Attributes:
        url: Where it is.
    """

    url: str
    _storage: dict[str, Any]
    _filesystem: Any = None
    _process: int = -1

    @staticmethod
    def fetch(url: str, storage: dict[str, Any]) -> RemotePatchDataset:
        """Fetch the index and ``dataset.json`` of a folder.

        Raises:
            UserError: As for :func:`open_dataset`.
        """
        filesystem, root = _filesystem(url, storage)

        def bring(name: str) -> None:
            try:
                Path(folder, name).write_bytes(filesystem.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                raise UserError(f"{url} is no dataset folder: it has no {name}.", "Check the URL.") from None
            except Exception as error:  # every file system has its own kinds of error
                raise _unreadable(f"{url}/{name}", error) from None

        with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
            bring(INFO_FILE)
            bring(INDEX_FILE)
            try:
                if not index_fits(Path(folder)):
                    with suppress(UserError):  # it exists if the folder was copied between a writer's two steps
                        bring(NEXT_INDEX)
                info, schema, index = read_folder(Path(folder), url)
            except UserError as error:
                raise UserError(error.message.replace(folder, url), error.hint) from None
        dataset = RemotePatchDataset(Path(PurePosixPath(root)), info, schema, index)
        dataset.url, dataset._storage = url, storage
        dataset._filesystem, dataset._process = filesystem, os.getpid()
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection: each process opens its own."""
        return self.__dict__ | {"_filesystem": None}

    def __repr__(self) -> str:
        return f"RemotePatchDataset({self.url!r}, {len(self)} patches of {self.patch_size} px)"

    def open_shard(self, file: str) -> BinaryIO:
        """A shard as a stream of bytes, read ahead in blocks."""
        try:
            return self._connection().open(f"{_split(self.url)[1]}/{file}", "rb")
        except Exception as error:  # every file system has its own kinds of error
            raise _unreadable(self.place_of(file), error) from None

    def place_of(self, file: str) -> str:
        """The name of a file of the folder in messages."""
        return f"{self.url}/{file}"

    def _connection(self) -> Any:
        if self._filesystem is None or self._process != os.getpid():  # connections do not survive a fork
            self._filesystem, _ = _filesystem(self.url, {**self._storage, "skip_instance_cache": True})
            self._process = os.getpid()
        return self._filesystem

    def _read_into(self, out: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        filesystem, root = self._connection(), _split(self.url)[1]
        for start in range(0, len(positions), _AT_ONCE):
            part = positions[start : start + _AT_ONCE]
            wanted = self.index[["shard", "offset", "size"]].iloc[rows[part]]
            files, ends = [f"{root}/{shard}" for shard in wanted["shard"]], wanted["offset"] + wanted["size"]
            found = filesystem.cat_ranges(files, wanted["offset"].tolist(), ends.tolist(), on_error="return")
            for position, data in zip(part, found, strict=True):
                row = int(rows[position])
                if isinstance(data, Exception):
                    raise _unreadable(f"Patch {self.index['key'].iloc[row]!r} of {self.url}", data)
                out[position] = self._decode(bytes(data), row)

    def add_split(self, *_: Any, **__: Any) -> None:
        """Refused: a dataset behind a URL is read-only."""
        raise UserError(f"{self.url} cannot be written to.", "Make the split in a local copy.")

    def add_selection(self, *_: Any, **__: Any) -> None:
        """Refused: a dataset behind a URL is read-only."""
        raise UserError(f"{self.url} cannot be written to.", "Select in a local copy.")

    def verify(self, images: bool = False) -> list[str]:
        """Refused: it would download everything."""
        raise UserError(f"{self.url} is behind a URL.", "Verify the folder on its own machine.")


def _split(url: str) -> tuple[str, str]:
    """Protocol and path in the file system's own form, without a slash at the end."""
    protocol, _, rest = url.partition("://")
    return protocol, (url if protocol.startswith("http") else rest).rstrip("/")


def _unreadable(what: str, error: Exception) -> UserError:
    return UserError(f"{what} cannot be read: {type(error).__name__}: {error}.")


def _filesystem(url: str, storage: Mapping[str, Any]) -> tuple[Any, str]:
    import fsspec

    protocol, root = _split(url)
    try:
        return fsspec.filesystem(protocol, **storage), root
    except ImportError as error:
        hint = "pip install 'latent-medi[remote]'" if protocol in _REMOTE else "Install what fsspec asks for."
        raise UserError(f"{url} cannot be opened: {str(error).rstrip('.')}.", hint) from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}.", "fsspec knows s3, gs, hf, https and others.") from None
