"""Other containers of patches (arrays, tars) into a dataset folder, a chunk at a time; the recipes' common part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from joblib import Parallel, delayed
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_file
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.image_file import check_file
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.records import finished_shards
from latent_medi.shards.writing.rewrite import make_way
from latent_medi.shards.writing.writer import finish_dataset, finished_dataset, write_shard

C = TypeVar("C")


def convert(
    out: Path,
    chunks: Sequence[C],
    read: Callable[[C], Iterable[Patch]],
    files: Callable[[C], Sequence[Path]],
    *,
    name: str,
    schema: Schema,
    patch_size: int,
    mpp: float,
    codec: str,
    provenance: Mapping[str, Any],
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None = None,
    jobs: int = 1,
) -> PatchDataset:
    """Write one shard per chunk; a rerun keeps the shards whose chunk and source files have not changed.

    Args:
        out: Dataset folder.
        chunks: What each shard is made from; JSON-able.
        read: The patches of a chunk, at least one.
        files: The source files of a chunk, whose content decides whether a shard is kept.
        name, schema, patch_size, mpp, codec, provenance, splits: As for
            :func:`~latent_medi.shards.writing.writer.finish_dataset`.
        jobs: Threads.

    Raises:
        UserError: There is no chunk, or a patch cannot be stored.
    """
    if not chunks:
        raise UserError(f"There is nothing to convert into {out}.")
    with output_lock(out):
        return _convert(out, chunks, read, files, name, schema, patch_size, mpp, codec, provenance, splits, jobs)


def _convert(
    out: Path, chunks: Sequence[C], read: Callable[[C], Iterable[Patch]], files: Callable[[C], Sequence[Path]],
    name: str, schema: Schema, patch_size: int, mpp: float, codec: str, provenance: Mapping[str, Any],
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None, jobs: int,
) -> PatchDataset:  # fmt: skip
    every = sorted({path for chunk in chunks for path in files(chunk)})
    for path in every:
        try:
            check_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", "Repair or remove it.") from None
    # Threads: decoding, scaling and encoding leave the interpreter's lock.
    pool = Parallel(jobs, prefer="threads", return_as="generator")
    hashes = dict(zip(every, pool(delayed(sha256_file)(path) for path in every), strict=True))
    tokens = []
    for chunk in chunks:
        parts = [chunk, patch_size, mpp, codec, schema.to_dict(), [hashes[path] for path in files(chunk)]]
        tokens.append(hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest())
    expected = {"name": name, "schema": schema.to_dict(), "patch_size": patch_size, "mpp": float(mpp), "codec": codec}
    if whole := finished_dataset(out, expected, tokens, splits):
        return whole
    make_way(out, splits or {})
    done = finished_shards(out)
    todo = [n for n, token in enumerate(tokens) if n not in done or done[n].token != token]
    work = pool(delayed(_write)(out, number, read, chunks[number], codec, tokens[number]) for number in todo)
    for _ in progress(work, len(todo), f"writing {name}", "shard"):
        pass
    return finish_dataset(
        out, name, schema, patch_size, mpp, codec, provenance, splits, shards=range(len(chunks))
    )  # fmt: skip


def _write(out: Path, number: int, read: Callable[[C], Iterable[Patch]], chunk: C, codec: str, token: str) -> None:
    write_shard(out, number, read(chunk), codec, token)


def scaled(image: np.ndarray, patch_size: int, where: str) -> np.ndarray:
    """A square image scaled down whole to ``patch_size``, antialiased; unchanged if it has that size.

    Raises:
        UserError: It is not square, or smaller.
    """
    height, width = image.shape[:2]
    if height != width or height < patch_size:
        raise UserError(f"{where} is {width}×{height}; a patch of {patch_size} px needs a square that is no smaller.")
    if height == patch_size:
        return image
    return np.asarray(Image.fromarray(image).resize((patch_size, patch_size), Image.Resampling.LANCZOS))
