"""Samples per second from image shards, in one process: a shuffled stream and a plain pass, against plain webdataset.

    python benchmarks/reading.py [--quick] [--json FILE]

The peer is ``webdataset.WebDataset(shards).decode("rgb8")`` in the order of the shards, its fastest way. Both decode
every image to uint8 and read the metadata: the peer its JSON member, the stream the index.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import webdataset
from output import options, report
from PIL import Image
from scipy import ndimage

from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.stream import PatchStream, epochs
from latent_medi.shards.writing.writer import Patch, write_dataset

BATCH = 64


def build(folder: Path, count: int, size: int) -> PatchDataset:
    """Patches that compress about as stained tissue does."""
    draw = np.random.default_rng(0)
    field = ndimage.gaussian_filter(draw.normal(0, 1, (size * 4, size * 4, 3)), (1.5, 1.5, 0))
    field = np.clip(180 + 40 * field / field.std() + draw.normal(0, 3, field.shape), 0, 255).astype(np.uint8)
    patches = []
    for i in range(count):
        y, x = draw.integers(0, 3 * size, 2)
        image = np.ascontiguousarray(field[y : y + size, x : x + size])
        patient = f"p{i // 50}"
        patches.append(Patch(f"{patient}/{i:06d}", image, patient, patient, -1, -1, 0.5, {"class": "ab"[i % 2]}))
    schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"]}), "class")
    return write_dataset(folder, patches, "reading", schema, size, 0.5, patches_per_shard=512)


def as_files(dataset: PatchDataset, folder: Path) -> list[Path]:
    """The patches as PNG files, one each, in the order of the rows: what a plain loop reads."""
    folder.mkdir()
    files = [folder / f"{row:06d}.png" for row in range(len(dataset))]
    for rows, images in dataset.iterate(None, 128):
        for row, image in zip(rows, images, strict=True):
            Image.fromarray(image).save(files[row], compress_level=1)
    return files


def rate(make: Callable[[], Iterable[int]]) -> float:
    """Samples per second of one pass, whose items say how many samples they hold."""
    start = time.perf_counter()
    return sum(make()) / (time.perf_counter() - start)


def main() -> None:
    parser = options(__doc__, "1,000 patches instead of 8,000")
    arguments = parser.parse_args()
    count = 1000 if arguments.quick else 8000
    with tempfile.TemporaryDirectory() as name:
        dataset = build(Path(name) / "set", count, 256)
        shards = sorted(str(p) for p in (dataset.folder / "data").glob("*.tar"))
        length = count // BATCH * BATCH

        def stream() -> Iterable[int]:
            order = epochs(np.arange(count), 0)
            return (len(batch.rows) for batch in PatchStream(dataset, order, images=length, global_batch=BATCH))

        def plain() -> Iterable[int]:
            return (len(rows) for rows, _ in dataset.iterate(None, BATCH))

        def peer() -> Iterable[int]:
            for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):
                assert sample["png"].dtype == np.uint8
                assert sample["json"]["class"]
                yield 1

        rates = {"stream": 0.0, "plain": 0.0, "webdataset": 0.0}
        for _ in range(3):  # in turns, so that all meet the same machine
            for key, make in (("stream", stream), ("plain", plain), ("webdataset", peer)):
                rates[key] = max(rates[key], rate(make))
    result = {
        "patches": count,
        "shuffled_stream_samples_per_s": rates["stream"],
        "plain_pass_samples_per_s": rates["plain"],
        "webdataset_samples_per_s": rates["webdataset"],
        "shuffled_stream_over_webdataset": rates["stream"] / rates["webdataset"],
        "plain_pass_over_webdataset": rates["plain"] / rates["webdataset"],
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
