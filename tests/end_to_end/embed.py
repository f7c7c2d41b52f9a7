"""Embeds a dataset with ``cached_features`` in every process that was launched: embed.py DATA CACHE OUT.

Each process has a cache of its own if CACHE is called "apart".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.shards.dataset import PatchDataset

data, cache, out = map(Path, sys.argv[1:])
accelerator = make_accelerator(cpu=True)
encoder = load_encoder("demo")
embed, seen = encoder.features, [0]


def counted(batches: Iterable[np.ndarray], device: Any = None) -> np.ndarray:
    def watched() -> Iterable[np.ndarray]:
        for images in batches:
            seen[0] += len(images)
            yield images

    return embed(watched(), device)


encoder.features = counted  # type: ignore[method-assign]
dataset = PatchDataset.open(data)
rank = accelerator.process_index
rows = np.arange(len(dataset))[::-1]
folder = cache / str(rank) if cache.name == "apart" else cache
# Part of the rows first: the second call finds some of them, and the third all.
half = cached_features(dataset, rows[: len(rows) // 2], encoder, folder, 3, accelerator=accelerator)
everything = cached_features(dataset, rows, encoder, folder, 3, accelerator=accelerator)
again = cached_features(dataset, rows, encoder, folder, 3, accelerator=accelerator)
assert np.array_equal(everything, again)
assert np.array_equal(everything[: len(half)], half)
out.mkdir(parents=True, exist_ok=True)
np.savez(out / f"rank-{rank}.npz", features=everything, seen=seen[0], processes=accelerator.num_processes)
