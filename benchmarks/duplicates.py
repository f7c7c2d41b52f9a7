"""How long it takes to find pictures that lie under two patients, and what their fingerprints cost while patches are
written.

    python benchmarks/duplicates.py --n 271710

The patches are random fields with spectra as steep as tissue's (amplitude falls with frequency to a power of 0.3 to
1.6). Among them are copies under another patient, turned or mirrored, encoded again as JPEG of quality 75 to 95; and
near misses, which are 60 to 75 % of another patch and the rest of a third. The search is the one that follows
every import. ``write_ms`` is the time to write a procedural patch of 256 px as PNG into a shard with its fingerprint,
``fingerprint_share`` the fingerprint's share of it.
"""

from __future__ import annotations

import io
import tempfile
import time

import numpy as np
from output import options, report
from PIL import Image

from latent_medi.core.progress import progress, set_up_logging
from latent_medi.demo.tissue import random_shape, random_stain, render
from latent_medi.shards.checking.likeness import fingerprint, shared_pictures
from latent_medi.shards.writing.writer import Patch, write_shard

EDGE = 32
_CHUNK = 4096


def fields(n: int, rng: np.random.Generator) -> np.ndarray:
    """Random patches, uint8 [n, 32, 32, 3], grey."""
    steps = np.hypot(np.fft.fftfreq(EDGE)[:, None], np.fft.rfftfreq(EDGE)) * EDGE
    steps[0, 0] = 1.0
    slope = rng.uniform(0.3, 1.6, (n, 1, 1))
    waves = np.fft.rfft2(rng.normal(size=(n, EDGE, EDGE))) / steps**slope
    field = np.fft.irfft2(waves, s=(EDGE, EDGE))
    field -= field.mean(axis=(1, 2), keepdims=True)
    field /= field.std(axis=(1, 2), keepdims=True)
    return grey(190 + 20 * field)


def grey(values: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of brightness [...]."""
    return np.repeat(np.clip(np.rint(values), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def copied(image: np.ndarray, number: int) -> np.ndarray:
    """Turned, mirrored and encoded again."""
    turned = np.rot90(image, number % 4)
    turned = turned[:, ::-1] if number % 8 > 3 else turned
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(turned)).save(file, "JPEG", quality=(75, 85, 95)[number % 3])
    return np.asarray(Image.open(file))


def cohort(n: int, planted: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of patches, uint8 [n, 32, 32], and their patients: ``planted`` copies of the first ones at the end,
    and before these as many near misses."""
    images = np.empty((n, EDGE, EDGE), np.uint8)
    for start in range(0, n, _CHUNK):
        images[start : start + _CHUNK] = fields(min(_CHUNK, n - start), rng)[..., 0]
    for i in range(planted):
        share = rng.uniform(0.6, 0.75)
        images[n - 2 * planted + i] = share * images[planted + i] + (1 - share) * images[2 * planted + i]
        images[n - planted + i] = copied(grey(images[i]), i)[..., 0]
    return images, np.arange(n) // 40


def cost_of_writing(count: int) -> tuple[float, float]:
    """Milliseconds to write a patch of 256 px with its fingerprint, and to make the fingerprint."""
    rng = np.random.default_rng(0)
    images = [
        np.kron(render(random_shape(rng), random_stain(rng), rng), np.ones((4, 4, 1), np.uint8)) for _ in range(count)
    ]
    images = [np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8) for image in images]
    patches = [Patch(f"p/{i}", image, "p", "p", -1, -1, 0.5, {}) for i, image in enumerate(images)]
    fingerprint(images[0])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_shard(folder, 0, patches)
        written = time.perf_counter() - start
    start = time.perf_counter()
    for image in images:
        fingerprint(image)
    return 1e3 * written / count, 1e3 * (time.perf_counter() - start) / count


def main() -> None:
    parser = options(__doc__, "20,000 patches instead of 271,710")
    parser.add_argument("--n", type=int, default=271_710, help="patches, as many as TCGA-UT has")
    arguments = parser.parse_args()
    set_up_logging()
    n = 20_000 if arguments.quick else arguments.n
    planted = max(1, n // 500)
    images, patients = cohort(n, planted, np.random.default_rng(0))
    prints = [fingerprint(grey(image)) for image in progress(images, n, "fingerprints", "patch")]
    start = time.perf_counter()
    numbers = shared_pictures(prints, patients.astype(str).tolist(), lambda rows: grey(images[rows]))
    seconds = time.perf_counter() - start
    ends = np.arange(n - planted, n)
    right = (numbers[ends] >= 0) & (numbers[ends] == numbers[: len(ends)])
    others = np.setdiff1d(np.flatnonzero(numbers >= 0), np.concatenate([ends, np.arange(planted)]))
    write_ms, fingerprint_ms = cost_of_writing(20 if arguments.quick else 100)
    report(
        {
            "patches": n,
            "planted": planted,
            "found": int(right.sum()),
            "found_share": float(right.mean()),
            "near_misses": planted,
            "false_patches": len(others),
            "search_seconds": seconds,
            "patches_per_second": n / seconds,
            "write_ms": write_ms,
            "fingerprint_ms": fingerprint_ms,
            "fingerprint_share": fingerprint_ms / write_ms,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
