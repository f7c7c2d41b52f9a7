"""Features on disk, keyed by what they were made from, so that nothing is embedded twice and nothing stale is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from latent_medi.core.checksums import load_tensors, save_tensors, warn_unsealed
from latent_medi.core.errors import UserError
from latent_medi.core.files import remove
from latent_medi.core.progress import get_logger, progress
from latent_medi.features.encoders import ImageEncoder
from latent_medi.features.registry import DEMO_GENERATOR
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.selections import column_hash
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads

if TYPE_CHECKING:
    from accelerate import Accelerator

log = get_logger(__name__)

_WRITES, _LEAST = 16, 4096


def dataset_hash(dataset: PatchDataset) -> str:
    """Hash of the pixels (shard hashes) and of which row is which patch (keys in order)."""
    digest = hashlib.sha256()
    for shard in dataset.info["shards"]:
        digest.update(str(shard["sha256"]).encode())
    digest.update("\n".join(dataset.index["key"]).encode())
    return digest.hexdigest()


def content_hash(dataset: PatchDataset) -> str:
    """Hash of the pixels and of all that is known of them: fields, splits and every other column of the index."""
    digest = hashlib.sha256(dataset_hash(dataset).encode())
    digest.update(json.dumps(dataset.schema.to_dict(), sort_keys=True).encode())
    for name in sorted(dataset.index.columns):
        digest.update(f"{name} {column_hash(dataset.index[name])}".encode())
    return digest.hexdigest()


def tell_if_foreign(encoder: ImageEncoder, dataset: PatchDataset) -> None:
    """Warn where the demo's encoder, which has seen procedural tissue alone, is to judge other real patches."""
    made_by, name = dataset.info.get("provenance", {}).get("generator"), encoder.name.split(":")[0].split("@")[0]
    if name == "demo" and made_by != DEMO_GENERATOR and (dataset.index["origin"] == "real").any():
        _warn(
            f"The encoder 'demo' has seen the demo's procedural tissue alone and judges {dataset.folder}: take one of "
            "pathology, such as phikon-v2, for any number that is to mean something."
        )


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    log.warning("%s", text)  # once, not for every batch of rows


def cached_features(
    dataset: PatchDataset,
    rows: np.ndarray,
    encoder: ImageEncoder,
    cache_folder: str | Path,
    batch: int = 128,
    device: str | None = None,
    accelerator: Accelerator | None = None,
) -> np.ndarray:
    """Features of some rows of a dataset, embedding only those that the cache lacks.

    Args:
        dataset: Real or synthetic patches.
        rows: Row numbers of the index; any order, repeats allowed.
        encoder: The encoder.
        cache_folder: Where the cache lies; one file per dataset content and encoder fingerprint.
        batch: Patches per forward pass.
        device: Torch device; the encoder's own if None.
        accelerator: With several processes, batch i of what the cache lacks is embedded by process i modulo their
            number, and the first process writes the cache, which lies where all of them can read it. Every process
            must call, with the same arguments but ``device``.

    Returns:
        float32 [len(rows), d], in the order of ``rows``; the same in every process and for any number of them.

    Raises:
        UserError: The processes do not see the same cache.
    """
    tell_if_foreign(encoder, dataset)
    rows = np.asarray(rows, np.int64)
    n = len(dataset.index)
    key = hashlib.sha256(f"{dataset_hash(dataset)} {encoder.fingerprint}".encode()).hexdigest()[:32]
    path = Path(cache_folder) / f"features-{key}.safetensors"
    features, known = _read(path, n, encoder.dim)
    missing = np.unique(rows[~known[rows]])
    if accelerator is not None and accelerator.num_processes > 1:
        _check_same(missing, path, accelerator)
    if len(missing):
        # Whole batches are dealt out: how rows are batched can move the last digits of a feature.
        rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        chunks = _chunks(missing, batch)
        mine = np.concatenate([missing[:0], *chunks[rank::processes]])
        where = torch.device(device) if device else encoder.device
        with closing(ReadAhead(dataset, read_ahead_threads(where, dataset))) as reader:
            batches = _batches(reader, mine, batch, f"{encoder.name} features", rank == 0)
            for part in _parts(chunks, processes, batch):
                dealt = [np.concatenate([missing[:0], *part[r::processes]]) for r in range(processes)]
                found = encoder.features(islice(batches, len(part[rank::processes])), device)
                for share, theirs in zip(dealt, _gathered(found, accelerator), strict=True):
                    features[share] = theirs
                    known[share] = True
                if rank == 0:
                    save_tensors({"features": features, "known": known.astype(np.uint8)}, path)
            for _ in batches:  # ends its progress display; there is nothing left in it
                pass
        if accelerator is not None:
            accelerator.wait_for_everyone()  # nobody reads the next time what is being written now
    return features[rows]


def _chunks(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def _parts(chunks: list[np.ndarray], processes: int, batch: int) -> list[list[np.ndarray]]:
    """Batches that are embedded before the cache is written again: an interrupted run loses a sixteenth at most.

    Fewer than 4,096 rows are not worth the whole file's writing.
    """
    size = max(-(-len(chunks) // _WRITES), -(-_LEAST // batch))
    size = -(-size // processes) * processes
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def _check_same(missing: np.ndarray, path: Path, accelerator: Accelerator) -> None:
    """Refuse to go on if processes lack different rows: their parts would be put in wrong places."""
    from accelerate.utils import gather_object

    digests = gather_object([hashlib.sha256(path.name.encode() + missing.tobytes()).hexdigest()])
    if len(set(digests)) > 1:
        raise UserError(
            f"The {accelerator.num_processes} processes do not find the same features in {path}.",
            "Put the cache where every process can read it, and start them with the same settings.",
        )


def _gathered(mine: np.ndarray, accelerator: Accelerator | None) -> list[np.ndarray]:
    """What each process has, in the order of the processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return [mine]
    from accelerate.utils import gather_object

    return gather_object([mine])


def _read(path: Path, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    if path.is_file():
        try:
            stored, sealed = load_tensors(path, "")
            features, known = stored["features"], stored["known"].astype(bool)
            if features.shape == (n, dim) and known.shape == (n,) and features.dtype == np.float32:
                if not sealed:
                    warn_unsealed(path, "Remove it to have its features embedded again.")
                return features, known
            raise UserError("it holds features of another shape")
        except (UserError, KeyError) as error:  # costs time, nothing else: everything in it can be made again
            log.warning("The feature cache %s is embedded again: %s", path, error)
        remove(path)
    return np.zeros((n, dim), np.float32), np.zeros(n, bool)


def _batches(reader: ReadAhead, rows: np.ndarray, batch: int, desc: str, shown: bool) -> Iterator[np.ndarray]:
    batches = reader.batches(rows, batch)
    for _, images in progress(batches, total=-(-len(rows) // batch), desc=desc, unit="batch") if shown else batches:
        yield images
