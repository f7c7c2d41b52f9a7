"""Linear probes at the size of MeDi's study: seconds of every fit of its protocol, and of the default comparison's.

    python benchmarks/probe.py [--quick] [--threads 2] [--part protocol] [--device cuda] [--json FILE]

Features are random: 1,024 correlated dimensions with a class, a site and a patient in them. The protocol is run whole,
on the study's three tasks with up to 30 patches of each of its slides: two synthetic sets, two pools, five ratios, four
numbers of sites, five seeds; it must take at most 20 minutes on two cores, and 8 GB. Of the default comparison (32
classes, 137,000 patches) a few fits are run, and stand for all. The peer is scikit-learn's LogisticRegression, with its
own tolerance and with a tight one, on two classes and on eight, as many patches as it can do.
"""

from __future__ import annotations

import resource
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from output import options, report
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_sample_weight

from latent_medi.core.progress import set_up_logging
from latent_medi.evaluation.downstream.classifiers import LinearProbeClassifier
from latent_medi.evaluation.downstream.medi_protocol import medi_protocol
from latent_medi.evaluation.downstream.training_sets import ProtocolSources, TrainingSet
from latent_medi.evaluation.settings import MediProtocolSettings
from latent_medi.statistics.linear_probe import MAX_ITER
from latent_medi.statistics.logistic_regression import Problem, Scaling

TASKS = {"nsclc": ["LUAD", "LUSC"], "uterine": ["UCEC", "UCS"], "rcc": ["KICH", "KIRC", "KIRP"]}
SLIDES = {
    "LUAD": (406, 88, 22), "LUSC": (406, 62, 22), "UCEC": (327, 87, 17), "UCS": (54, 17, 6),
    "KIRC": (289, 100, 12), "KIRP": (161, 66, 16), "KICH": (60, 22, 5),
}  # fmt: skip
"""Training and test slides of the study, and training sites."""
SITES = [5, 10, 15, 0]
RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
TRAINING_SETS, REPEATS = 12, 10
PARTS = ["protocol", "comparison", "peer"]


class Features:
    """Random features of an encoder.

    Args:
        d: Dimensions.
        classes: Number of classes.
        spread: Of the classes' centres: how easy they are.
    """

    def __init__(self, d: int, classes: int, spread: float) -> None:
        rng = np.random.default_rng(0)
        decay = (np.arange(1, d + 1) ** -0.5).astype(np.float32)
        self.decay, self.d = decay, d
        self.mix = (rng.normal(size=(d, d)) * 3 / d**0.5).astype(np.float32)
        self.centres = (rng.normal(size=(classes, d)) * spread * decay).astype(np.float32)

    def draw(self, codes: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
        """float32 [N, d]; ``groups`` are sites or slides, each with a shift of its own."""
        rng = np.random.default_rng(seed)
        shifts = rng.normal(size=(int(groups.max()) + 1, self.d)).astype(np.float32) * 0.5 * self.decay
        found = np.empty((len(codes), self.d), np.float32)
        for start in range(0, len(codes), 10_000):
            part = slice(start, start + 10_000)
            noise = rng.standard_normal((len(codes[part]), self.d), np.float32) * self.decay
            found[part] = (self.centres[codes[part]] + shifts[groups[part]] + noise) @ self.mix + 0.5
        return found


def against_scikit_learn(n: int, d: int, classes: int, device: str) -> dict[str, float]:
    """Seconds of one fit and accuracy on other patches, of both."""
    rng, world = np.random.default_rng(1), Features(d, classes, 0.06)
    codes, groups = rng.integers(0, classes, n + 20_000), rng.integers(0, n // 20, n + 20_000)
    x = world.draw(codes, groups, 2)
    weights = compute_sample_weight("balanced", codes[:n])
    start = time.perf_counter()
    found = Problem(x[:n], codes[:n], weights, Scaling.none(d), device).solve(1.0, MAX_ITER)
    seconds = time.perf_counter() - start
    logits = x[n:] @ found.weights.T.astype(np.float32) + found.intercept
    ours = (logits[:, 0] > 0).astype(int) if classes == 2 else logits.argmax(axis=1)
    right = float((ours == codes[n:]).mean())
    result = {"accuracy": right, "seconds": seconds, "iterations": found.iterations}
    for name, tolerance, precision in (("own", 1e-4, np.float32), ("tight", 1e-7, np.float64)):
        learn = x[:n].astype(precision)  # in single precision its own solution is not exact either
        start = time.perf_counter()
        peer = LogisticRegression(tol=tolerance, max_iter=MAX_ITER).fit(learn, codes[:n], weights)
        spent = time.perf_counter() - start
        result |= {
            f"times_faster_than_{name}": spent / seconds,
            f"accuracy_less_that_of_{name}": right - float((peer.predict(x[n:]) == codes[n:]).mean()),
        }
    return {f"{classes}_classes_{key}": value for key, value in result.items()}


def tasks_study(patches: int, world: Features) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """The three tasks' slides as the parts of a study that the protocol reads, and features of all patches."""
    rows = []
    for value, (train, test, sites) in SLIDES.items():
        for slide in range(train + test):
            site = f"{value}{slide % sites}" if slide < train else f"{value}-new{slide % 11}"
            rows += [(value, site, f"{value}-{slide}", slide < train)] * patches
    index = pd.DataFrame(rows, columns=["class", "site", "patient", "train"])
    names = sorted(SLIDES)
    code_of = {value: i for i, value in enumerate(names)}
    own = index[index["train"]]
    parts = [own]
    for classes in TASKS.values():
        for value in classes:
            parts.append(own[own["class"].isin(classes) & (own["class"] != value)].assign(**{"class": value}))
    planned = pd.concat(parts, ignore_index=True)

    def features(table: pd.DataFrame, seed: int) -> np.ndarray:
        return world.draw(table["class"].map(code_of).to_numpy(), pd.factorize(table["site"])[0], seed)

    sets = {
        "medi": SimpleNamespace(index=planned, fields=("class", "site")),
        "cls": SimpleNamespace(index=planned, fields=("class",)),
    }
    study = SimpleNamespace(
        index=index, class_field="class", site_field="site", classes=names, synthetic=sets,
        class_labels=index["class"].to_numpy(str), site_labels=index["site"].to_numpy(str),
        train=np.flatnonzero(index["train"]), test=np.flatnonzero(~index["train"]),
    )  # fmt: skip
    synthetic = {name: features(planned, 5 + i) for i, name in enumerate(sets)}
    return study, features(index, 4), synthetic


def protocol(patches: int, d: int, device: str) -> dict[str, float]:
    """All fits of the protocol, with up to ``patches`` patches of each slide."""
    study, real, synthetic = tasks_study(patches, Features(d, len(SLIDES), 0.06))
    settings = MediProtocolSettings(tasks=TASKS, ratios=RATIOS, pools=["union", "separate"], sites=SITES)
    start, processor = time.perf_counter(), time.process_time()
    record = medi_protocol(ProtocolSources(study, "", real, synthetic), settings, device)
    seconds, peak = time.perf_counter() - start, peak_mib()
    return {
        "protocol_real_patches": len(real),
        "protocol_synthetic_patches": len(synthetic["medi"]),
        "protocol_fits": len(record.rows) * settings.seeds,
        "protocol_minutes": seconds / 60,
        "protocol_processor_minutes": (time.process_time() - processor) / 60,
        "protocol_peak_mib": peak,
        "protocol_not_converged": record.not_converged,
    }


def peak_mib() -> float:
    """Most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def comparison(n: int, d: int, device: str, fits: int) -> dict[str, float]:
    """Fits of the default comparison: the real patches, then with a few thousand others each time."""
    rng, world, added = np.random.default_rng(6), Features(d, 32, 0.15), n // 25
    codes, groups = rng.integers(0, 32, n + added), rng.integers(0, n // 30, n + added)
    x, labels = world.draw(codes, groups, 7), np.char.add("class", codes.astype(str))
    test = x[: n // 4]
    classifier = LinearProbeClassifier(test, sorted(set(labels)), 1.0, None, device, (x[:n], labels[:n]))
    seconds = []
    for i in range(fits + 1):
        extra = n + rng.permutation(added)[: added // 2]
        rows = np.concatenate([np.arange(n), extra])
        start = time.perf_counter()
        classifier.fit_predict(TrainingSet(x[rows], labels[rows]), i)
        seconds.append(time.perf_counter() - start)
    later = float(np.mean(seconds[1:]))
    every = TRAINING_SETS * REPEATS
    return {
        "comparison_patches": n,
        "comparison_first_fit_seconds": seconds[0],
        "comparison_later_fit_seconds": later,
        f"comparison_{every}_fits_minutes": (seconds[0] + every * later) / 60,
        "comparison_peak_mib": peak_mib(),
    }


def main() -> None:
    parser = options(__doc__, "64 dimensions and a twentieth of the patches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the fits")
    parser.add_argument("--threads", type=int, default=2, help="of the fits, on the CPU")
    parser.add_argument("--part", choices=PARTS, nargs="*", default=PARTS, help="what to run; by default all")
    arguments = parser.parse_args()
    set_up_logging()
    quick, device, parts = arguments.quick, arguments.device, arguments.part
    torch.set_num_threads(arguments.threads)
    d = 64 if quick else 1024
    result: dict[str, float] = {"threads": torch.get_num_threads(), "dimensions": d}
    # First, so that its peak is its own.
    if "protocol" in parts:
        result |= protocol(2 if quick else 30, d, device)
    if "comparison" in parts:
        result |= comparison(6_850 if quick else 137_000, d, device, 2 if quick else 4)
    for classes in (2, 8) if "peer" in parts else ():
        result |= against_scikit_learn(1_000 if quick else 20_000, d, classes, device)
    report(result, arguments.json)


if __name__ == "__main__":
    main()
