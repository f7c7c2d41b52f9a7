"""What an evaluation costs: features per second, and the Fréchet distance of large feature sets.

    python benchmarks/evaluation.py [--quick] [--encoder NAME] [--weights PATH] [--json FILE]

Features: ``cached_features`` from a dataset folder to the written cache, against a bare loop that reads the same
images, one PNG file each, with Pillow, and calls the same encoder on the same batches without keeping anything. The
encoder over and over on one batch is the most that any way of reading could give.

Distance: ``frechet_distance`` of 2 × 50,000 × 2048 features against bare numpy: two float64 covariances, a Cholesky
factor and one symmetric eigenvalue problem. Both have one thread of linear algebra, so that CPU time, which other
programs on the machine disturb less, can be compared as well.

Memory: the most that accumulating the moments of streamed features takes beyond what was there before, at two numbers
of features, one four times the other; and the most that a process takes, and how long, while it compares two synthetic
sets of 25,000 patches by 100,000 real ones, half of them for training, in 2048 features (a tenth and 512 with --quick):
the table of distances, Fréchet distances and their simulated ratio, neighbourhoods, principal components, and nearest
patches of a few.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from output import options, report
from PIL import Image
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reading import as_files, build

from latent_medi.evaluation.cohort.comparison_sets import REAL, Comparison
from latent_medi.evaluation.cohort.roles import synthetic_roles
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.distance_to_real import distance_table, overall
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.statistics.distances import FeatureStatistics, frechet_distance, pca_basis
from latent_medi.statistics.neighbours import nearest_neighbours

BATCH = 128


def fastest(runs: dict[str, Callable[[int], object]], turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Wall-clock and CPU seconds of the fastest of several turns, taken in turn so that all meet the same machine."""
    wall, busy = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run(turn)
            wall[name] = min(wall[name], time.perf_counter() - start)
            busy[name] = min(busy[name], time.process_time() - cpu)
    return wall, busy


def bare_loop(files: list[Path], encoder: ImageEncoder) -> np.ndarray:
    """Features of image files, nothing around it."""
    parts = []
    with torch.inference_mode():
        for i in range(0, len(files), BATCH):
            images = np.stack([np.asarray(Image.open(file)) for file in files[i : i + BATCH]])
            parts.append(encoder.module(encoder.prepare(images)).cpu().numpy())
    return np.concatenate(parts)


def embedding(encoder: ImageEncoder, count: int, size: int, turns: int) -> dict[str, float]:
    """Patches per second of both ways of embedding."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = build(folder / "set", count, size)
        files = as_files(dataset, folder / "png")
        ours = cached_features(dataset, np.arange(count), encoder, folder / "warm", BATCH)
        theirs = bare_loop(files, encoder)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
        first = dataset.read(np.arange(BATCH))
        wall, busy = fastest(
            {
                "cached_features": lambda turn: cached_features(
                    dataset, np.arange(count), encoder, folder / str(turn), BATCH
                ),
                "bare_loop": lambda turn: bare_loop(files, encoder),
                "encoder_alone": lambda turn: encoder.features([first] * (count // BATCH)),
            },
            turns,
        )
    result = {f"{name}_patches_per_s": count / seconds for name, seconds in wall.items()}
    result["cached_features_over_bare_loop"] = wall["bare_loop"] / wall["cached_features"]
    if encoder.device.type == "cpu":
        result["cached_features_over_bare_loop_in_cpu_time"] = busy["bare_loop"] / busy["cached_features"]
    return result


def bare_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance in as few operations as numpy allows."""
    moments = []
    for features in (a, b):
        x = features.astype(np.float64)
        mean = x.mean(axis=0)
        x -= mean
        moments.append((mean, x.T @ x / (len(x) - 1)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = np.linalg.cholesky(cov_b)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ cov_a @ root), 0.0)).sum()
    return float((mean_a - mean_b) @ (mean_a - mean_b) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def features_of(count: int, dim: int, seed: int) -> np.ndarray:
    """float32 [count, dim] whose variances fall as they do in an encoder's features."""
    draw = np.random.default_rng(seed)
    spread = (1.0 / np.sqrt(np.arange(1, dim + 1))).astype(np.float32)
    return draw.standard_normal((count, dim), np.float32) * spread[draw.permutation(dim)] + np.float32(0.1 * seed)


def distance(count: int, dim: int, turns: int) -> dict[str, float]:
    """Seconds of both ways to the Fréchet distance."""
    a, b = features_of(count, dim, 0), features_of(count, dim, 1)
    values: dict[str, float] = {}

    def keep(name: str, run: Callable[[np.ndarray, np.ndarray], float]) -> None:
        values[name] = run(a, b)

    with threadpool_limits(1, user_api="blas"):
        wall, busy = fastest(
            {
                "frechet": lambda turn: keep("frechet", frechet_distance),
                "bare_numpy": lambda turn: keep("bare_numpy", bare_distance),
            },
            turns,
        )
    return {
        "features": count,
        "dim": dim,
        "frechet_s": wall["frechet"],
        "bare_numpy_s": wall["bare_numpy"],
        "frechet_time_over_bare_numpy": wall["frechet"] / wall["bare_numpy"],
        "frechet_time_over_bare_numpy_in_cpu_time": busy["frechet"] / busy["bare_numpy"],
        "frechet_relative_difference": abs(values["frechet"] / values["bare_numpy"] - 1.0),
    }


def peak(count: int, dim: int, batch: int) -> float:
    """MiB that accumulating streamed features takes at most."""
    draw, statistics = np.random.default_rng(0), FeatureStatistics(dim)
    tracemalloc.start()
    for _ in range(count // batch):
        statistics.update(draw.standard_normal((batch, dim), np.float32))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def _study(count: int) -> tuple[Study, Comparison]:
    """A cohort of ``count`` real patches, half of them the reference, and two synthetic sets; no files."""
    half, made = count // 2, count // 4
    labels = pd.DataFrame({"class": np.resize(["a", "b", "c"], count), "site": np.resize(list("wxyz"), count)})
    index = pd.DataFrame({"class": np.resize(["a", "b", "c"], made), "site": np.resize(list("wxyz"), made)})
    study = SimpleNamespace(
        patients=np.array([f"p{i:05d}" for i in np.arange(count) // 50]),
        index=labels,
        class_field="class",
        site_field="site",
        train=np.arange(half, count),
        synthetic=dict.fromkeys(("cls", "medi"), SimpleNamespace(fields=("class", "site"), index=index)),
        roles=synthetic_roles(["cls", "medi"]),
    )
    rows = {"cls": np.arange(made), "medi": np.arange(made), REAL: np.arange(half, half + made)}
    return cast(Study, study), Comparison({}, np.arange(half), rows, dict.fromkeys(rows, 0.0))


def _most(count: int, dim: int, out: Any) -> None:
    """Compare two synthetic sets, half as many as the real patches together; gives MiB of all features and of the
    memory beyond them, and seconds.
    """
    real = features_of(count, dim, 0)
    made = {name: features_of(count // 4, dim, seed) for name, seed in (("medi", 0), ("cls", 1))}
    study, comparison = _study(count)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    features = Features(real, made, pca_basis(real[study.train]))
    distance_table(study, features, [comparison], 0)
    overall(study, features, comparison, 0)
    nearest_neighbours(made["medi"][:2048], real)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sets = real.nbytes + sum(x.nbytes for x in made.values())
    out.put((sets / 2**20, (after - before) / 2**10, after / 2**10, seconds))


def memory_of_evaluation(count: int, dim: int) -> dict[str, float]:
    """Memory and time of judging two synthetic sets, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_most, args=(count, dim, out))
    process.start()
    sets, beyond, most, seconds = out.get()
    process.join()
    found = {"judged": count, "judged_sets_mib": sets, "judging_mib": beyond, "judging_mib_over_sets": beyond / sets}
    return found | {"judging_peak_mib": most, "judging_s": seconds}


def main() -> None:
    parser = options(__doc__, "512 patches instead of 4,096, and 2 × 5,000 × 512 features")
    parser.add_argument("--encoder", default="demo", help="name or folder of the encoder")
    parser.add_argument("--weights", help="its weights, if it needs any")
    arguments = parser.parse_args()
    quick = arguments.quick
    encoder = load_encoder(arguments.encoder, arguments.weights, "cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, float] = {"patches": 512 if quick else 4096, "batch": BATCH}
    result |= embedding(encoder, int(result["patches"]), encoder.preprocessing.size or 256, 3)
    count, dim = (5000, 512) if quick else (50_000, 2048)
    result |= distance(count, dim, 3 if quick else 2)
    small, large = peak(count // 4, dim, 1000), peak(count, dim, 1000)
    result |= {"peak_mib": large, "peak_over_peak_at_a_quarter": large / small}
    result |= memory_of_evaluation(*((10_000, 512) if quick else (100_000, 2048)))
    report(result, arguments.json)


if __name__ == "__main__":
    main()
