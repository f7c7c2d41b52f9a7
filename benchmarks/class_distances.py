"""What distances by class cost at the size of TCGA-UT: seconds by part and peak memory, on random features.

    python benchmarks/class_distances.py [--quick] [--json FILE] [--classes N] [--threads N]

137,000 training and 32,000 test patches of 32 classes and 626 sites, none of which has two classes or is in both parts,
and two synthetic sets of as many patches as there are for training, one of which knows the site; 1,024 features. Timed
are the choice of what is compared, the table by class to training images and to test patients, and the one by class and
site, with raw Fréchet distances. --quick takes a tenth of the patches and 128 features; with
--classes fewer classes, sites and patches in proportion, since time grows with the classes.
"""

from __future__ import annotations

import resource
import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
from output import options, report
from threadpoolctl import threadpool_limits

from latent_medi.evaluation.cohort.comparison_sets import Part, class_comparisons, field_comparisons
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.fidelity.distance_to_real import distance_table
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.distances import pca_basis

MOST_CLASSES, TRAIN_SITES, TEST_SITES = 32, 398, 228
CLASSES = tuple(f"class{i:02d}" for i in range(MOST_CLASSES))
SITES = tuple(f"s{i:03d}" for i in range(TRAIN_SITES + TEST_SITES))
SCHEMA = Schema((Field("class", "class", CLASSES), Field("tss", "categorical", SITES)))
PER_PATIENT = 25


def table(count: int, sites: range, first: int, n_classes: int) -> pd.DataFrame:
    """Patches in turn of each site, whose class is the site's number modulo the classes; ``first`` numbers patients."""
    site = np.resize(np.arange(sites.start, sites.stop), count)
    patient = first + site + (np.arange(count) // (len(sites) * PER_PATIENT)) * len(SITES)
    return pd.DataFrame(
        {
            "class": np.array(CLASSES, object)[site % n_classes],
            "tss": np.array(SITES, object)[site],
            "patient": np.char.add("p", patient.astype(str)).astype(object),
        }
    )


def features_of(labels: pd.DataFrame, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 [n, dim], shifted by class and by site."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((len(labels), dim), np.float32)
    for size, name in ((0.5, "class"), (0.2, "tss")):
        codes, values = pd.factorize(labels[name], sort=True)
        centres = np.random.default_rng(7).standard_normal((len(values), dim)).astype(np.float32)
        x += np.float32(size) * centres[codes]
    return x + np.float32(shift)


def cohort(train: int, test: int, n_classes: int) -> Study:
    """A study without files."""
    n_train, n_test = (n * n_classes // MOST_CLASSES for n in (TRAIN_SITES, TEST_SITES))
    of_train = table(train, range(n_train), 0, n_classes)
    of_test = table(test, range(TRAIN_SITES, TRAIN_SITES + n_test), 10**6, n_classes)
    index = pd.concat([of_train, of_test], ignore_index=True)
    rows = np.arange(train, len(index))
    people = pd.factorize(index["patient"].iloc[rows])[0]
    half = (np.random.default_rng(0).random(people.max() + 1) < 0.5)[people]
    synthetic = {}
    for name, fields in (("medi", ("class", "tss")), ("cls", ("class",))):
        labels = of_train if "tss" in fields else of_train.assign(tss="unknown")
        dataset = cast(PatchDataset, SimpleNamespace(index=labels))
        synthetic[name] = SyntheticSet(name, dataset, fields, np.arange(train))
    real = cast(PatchDataset, SimpleNamespace(index=index, schema=SCHEMA))
    shown = np.arange(train)
    return Study(
        real,
        "class",
        "tss",
        [],
        synthetic,
        shown,
        shown,
        rows[half],
        rows[half],
        rows[~half],
        rows,
        oracle_reason="",
        notes=[],
    )


def run(train: int, test: int, dim: int, n_classes: int) -> dict[str, float]:
    """Seconds of each part, and MiB."""
    train, test = (n * n_classes // MOST_CLASSES for n in (train, test))
    study = cohort(train, test, n_classes)
    made = study.synthetic["medi"].index
    sets = {"medi": features_of(made, dim, 1), "cls": features_of(made, dim, 2, 0.1)}
    real = features_of(study.index, dim, 0)
    result: dict[str, float] = {"classes": n_classes, "training_patches": train, "test_patches": test, "features": dim}
    result["features_mib"] = sum(x.nbytes for x in (real, *sets.values())) / 2**20
    start, busy = time.perf_counter(), time.process_time()
    features = Features(real, sets, pca_basis(real[study.train]))
    parts: list[tuple[str, Part, list[str]]] = [
        ("class_to_training", "train", []),
        ("class_to_test", "test", []),
        ("class_and_site_to_training", "train", ["class", "tss"]),
        ("class_and_site_to_test", "test", ["class", "tss"]),
    ]
    for name, part, fields in parts:
        before = time.process_time()
        chosen = field_comparisons(study, fields, 0, part) if fields else class_comparisons(study, 0, part)
        result[f"{name}_choice_cpu_s"] = time.process_time() - before
        found = distance_table(study, features, chosen, 0, "paper", part)
        result[f"{name}_cpu_s"] = time.process_time() - before
        result[f"{name}_compared"] = found.means["medi"].n_combinations
    result["minutes"] = (time.perf_counter() - start) / 60
    result["cpu_minutes"] = (time.process_time() - busy) / 60
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return result


def main() -> None:
    """Measure and report."""
    parser = options(__doc__, "a tenth of the patches, and 128 features")
    parser.add_argument("--threads", type=int, default=1, help="of the linear algebra; an evaluation has one")
    parser.add_argument("--classes", type=int, default=MOST_CLASSES, help="number of classes, 2 to 32")
    given = parser.parse_args()
    size = (13_700, 3_200, 128) if given.quick else (137_000, 32_000, 1024)
    with threadpool_limits(given.threads, user_api="blas"):
        report(run(*size, given.classes), given.json)


if __name__ == "__main__":
    main()
