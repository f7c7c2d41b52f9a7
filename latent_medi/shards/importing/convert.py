"""Other containers of patches (arrays, tars) into a dataset folder, a chunk at a time; the recipes' common part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_file
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.image_file import check_file
from latent_medi.shards.importing.workers import dispatch
from latent_medi.shards.writing.finish import Description, finish_dataset, finished_dataset
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.records import kept_shards
from latent_medi.shards.writing.rewrite import prepare_rewrite
from latent_medi.shards.writing.writer import write_shard

C = TypeVar("C")


@dataclass(frozen=True)
class Source(Generic[C]):
    """Patches in files of any form, a chunk for each shard.

    Args:
        chunks: What each shard is made from; JSON-able.
        read: The patches of a chunk, at least one.
        files: The files of a chunk; their content decides whether a rerun keeps its shard.
    """

    chunks: Sequence[C]
    read: Callable[[C], Iterable[Patch]]
    files: Callable[[C], Sequence[Path]]


def convert(out: Path, source: Source[C], about: Description, jobs: int = 1) -> PatchDataset:
    """Write one shard per chunk; a rerun keeps the shards whose chunk and files have not changed.

    Args:
        out: Dataset folder.
        source: The patches.
        about: What the dataset is.
        jobs: Threads.

    Raises:
        UserError: There is no chunk, a file cannot be read, or a patch cannot be stored.
    """
    if not source.chunks:
        raise UserError(f"There is nothing to convert into {out}.")
    with output_lock(out):
        tokens = _tokens(source, about, jobs)
        if whole := finished_dataset(out, about, tokens):
            return whole
        prepare_rewrite(out, about.splits)
        kept = kept_shards(out, tokens)
        todo = [number for number in range(len(tokens)) if number not in kept]

        def write(number: int) -> None:
            write_shard(out, number, source.read(source.chunks[number]), about.codec, tokens[number])

        # Threads: decoding, scaling and encoding leave the interpreter's lock.
        work = dispatch(write, [(number,) for number in todo], jobs, backend="threading")
        for _ in progress(work, len(todo), f"writing {about.name}", "shards"):
            pass
        return finish_dataset(out, about, range(len(tokens)))


def _tokens(source: Source[C], about: Description, jobs: int) -> list[str]:
    """What each shard is made from: a hash of its chunk, its files and the settings."""
    every = sorted({path for chunk in source.chunks for path in source.files(chunk)})
    for path in every:
        try:
            check_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", "Repair or remove it.") from None
    hashes = dict(zip(every, dispatch(sha256_file, [(p,) for p in every], jobs, backend="threading"), strict=True))
    settings = [about.patch_size, about.mpp, about.codec, about.schema.to_dict()]
    return [
        hashlib.sha256(json.dumps([chunk, *settings, files], sort_keys=True, default=str).encode()).hexdigest()
        for chunk, files in ((chunk, [hashes[path] for path in source.files(chunk)]) for chunk in source.chunks)
    ]


def scaled(image: np.ndarray, patch_size: int, where: str) -> np.ndarray:
    """A square image scaled down whole to ``patch_size``, antialiased; unchanged if it has that size.

    Args:
        image: uint8 [H, W, 3].
        patch_size: Edge in pixels.
        where: What messages call the image.

    Raises:
        UserError: It is not square, or smaller.
    """
    height, width = image.shape[:2]
    if height != width or height < patch_size:
        raise UserError(f"{where} is {width}×{height}; a patch of {patch_size} px needs a square that is no smaller.")
    if height == patch_size:
        return image
    return np.asarray(Image.fromarray(image).resize((patch_size, patch_size), Image.Resampling.LANCZOS))
