"""Features on disk, keyed by dataset and encoder, so that no patch is embedded twice and no stale feature is read."""

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
    """Hash of the pixels, the schema and every column of the index."""
    digest = hashlib.sha256(dataset_hash(dataset).encode())
    digest.update(json.dumps(dataset.schema.to_dict(), sort_keys=True).encode())
    for name in sorted(dataset.index.columns):
        digest.update(f"{name} {column_hash(dataset.index[name])}".encode())
    return digest.hexdigest()


def warn_if_demo_encoder(encoder: ImageEncoder, dataset: PatchDataset) -> None:
    """Warn if the demo's encoder, which was trained on procedural tissue alone, embeds other real patches."""
    made_by, name = dataset.info.get("provenance", {}).get("generator"), encoder.name.split(":")[0].split("@")[0]
    if name == "demo" and made_by != DEMO_GENERATOR and (dataset.index["origin"] == "real").any():
        _warn(
            f"The encoder 'demo' was trained on the demo's procedural tissue alone, and embeds {dataset.folder}. "
            "Use an encoder of pathology, such as phikon-v2, for meaningful numbers."
        )


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    log.warning("%s", text)  # once, not for every batch of rows


def cache_file(dataset: PatchDataset, encoder: ImageEncoder, folder: str | Path) -> Path:
    """The file of a cache with a dataset's features: float32 ``features`` [N, d], and ``known`` [N], 1 for each row
    that has been embedded."""
    key = hashlib.sha256(f"{dataset_hash(dataset)} {encoder.fingerprint}".encode()).hexdigest()[:32]
    return Path(folder) / f"features-{key}.safetensors"


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
        cache_folder: Folder of the cache, with one file per dataset content and encoder fingerprint.
        batch: Patches per forward pass.
        device: Torch device; the encoder's own if None.
        accelerator: With several processes, process i modulo their number embeds batch i of the missing rows, and the
            first process writes the cache, which all must be able to read. Every process must call this function with
            the same arguments but ``device``.

    Returns:
        float32 [len(rows), d], in the order of ``rows``; the same in every process and for any number of them.

    Raises:
        UserError: The processes do not see the same cache.
    """
    warn_if_demo_encoder(encoder, dataset)
    rows = np.asarray(rows, np.int64)
    n = len(dataset.index)
    path = cache_file(dataset, encoder, cache_folder)
    features, known = _read(path, n, encoder.dim)
    missing = np.unique(rows[~known[rows]])
    if accelerator is not None and accelerator.num_processes > 1:
        _check_same(missing, path, accelerator)
    if len(missing):
        # Processes share whole batches, since batching may change the last digits of a feature.
        rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        chunks = _chunks(missing, batch)
        mine = np.concatenate([missing[:0], *chunks[rank::processes]])
        where = torch.device(device) if device else encoder.device
        with closing(ReadAhead(dataset, read_ahead_threads(where, dataset))) as reader:
            batches = _batches(reader, mine, batch, f"{encoder.name} features", rank == 0)
            for part in _parts(chunks, processes, batch):
                shares = [np.concatenate([missing[:0], *part[r::processes]]) for r in range(processes)]
                found = encoder.features(islice(batches, len(part[rank::processes])), device)
                for share, theirs in zip(shares, _gathered(found, accelerator), strict=True):
                    features[share] = theirs
                    known[share] = True
                if rank == 0:
                    save_tensors({"features": features, "known": known.astype(np.uint8)}, path)
            for _ in batches:  # no batch is left; this ends the progress display
                pass
        if accelerator is not None:
            accelerator.wait_for_everyone()  # so that no process reads the file while it is written
    return features[rows]


def _chunks(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def _parts(chunks: list[np.ndarray], processes: int, batch: int) -> list[list[np.ndarray]]:
    """Groups of batches between two writes of the cache: a sixteenth of them, and at least 4,096 rows."""
    size = max(-(-len(chunks) // _WRITES), -(-_LEAST // batch))
    size = -(-size // processes) * processes
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def _check_same(missing: np.ndarray, path: Path, accelerator: Accelerator) -> None:
    """Check that all processes lack the same rows."""
    from accelerate.utils import gather_object

    digests = gather_object([hashlib.sha256(path.name.encode() + missing.tobytes()).hexdigest()])
    if len(set(digests)) > 1:
        raise UserError(
            f"The {accelerator.num_processes} processes do not find the same features in {path}.",
            "Put the cache where every process can read it, and start them with the same settings.",
        )


def _gathered(mine: np.ndarray, accelerator: Accelerator | None) -> list[np.ndarray]:
    """The arrays of all processes, in their order."""
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
        except (UserError, KeyError) as error:  # its features can be computed again
            log.warning("The feature cache %s is embedded again: %s", path, error)
        remove(path)
    return np.zeros((n, dim), np.float32), np.zeros(n, bool)


def _batches(reader: ReadAhead, rows: np.ndarray, batch: int, desc: str, shown: bool) -> Iterator[np.ndarray]:
    batches = reader.batches(rows, batch)
    for _, images in progress(batches, len(rows), desc, "patches", batch) if shown else batches:
        yield images
