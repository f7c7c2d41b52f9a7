"""Whether the audit's numbers are right: Cramér's V where its truth is known, and effective patients against the
variance of simulated estimates.

    python benchmarks/statistics/audit.py [--replicates 2000]

Prints two tables for ``docs/results_simulations.md``, each figure with its Monte-Carlo error, and fails where a figure
misses its bound by more than two of these.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
from scipy.stats.contingency import association

from latent_medi.metadata.association import cramers_v
from latent_medi.metadata.estimability import verdict

# Classes, sites (a multiple of them), patients, true V, and the largest distance of the mean from it. A V is not below
# 0, so the mean of one whose truth is 0 is a little above.
TABLES = ((5, 20, 40, 0.0, 0.12), (5, 20, 400, 0.0, 0.05), (2, 4, 40, 0.0, 0.12), (3, 6, 200, 0.5, 0.02))
COHORTS: dict[str, dict[tuple[str, ...], int]] = {
    "A×1: 20, A×2: 1, B×2: 20 → B×1": {("A", "1"): 20, ("A", "2"): 1, ("B", "2"): 20},
    "A×1: 30, A×2: 30, B×2: 30 → B×1": {("A", "1"): 30, ("A", "2"): 30, ("B", "2"): 30},
    "the same and C×1: 40, C×2: 40 → B×1": {
        ("A", "1"): 30, ("A", "2"): 30, ("B", "2"): 30, ("C", "1"): 40, ("C", "2"): 40,
    },
    "three fields → B×1×i": {
        ("A", "1", "i"): 12, ("A", "2", "ii"): 25, ("B", "2", "i"): 7, ("B", "2", "ii"): 30, ("A", "1", "ii"): 9,
    },
}  # fmt: skip


def drawn(rng: np.random.Generator, classes: int, sites: int, patients: int, v: float) -> pd.DataFrame:
    """Patients whose class is their site's with probability v, and otherwise any: Cramér's V of the two is v."""
    site = rng.integers(0, sites, patients)
    kind = np.where(rng.random(patients) < v, site % classes, rng.integers(0, classes, patients))
    return pd.DataFrame({"patient": range(patients), "class": kind.astype(str), "site": site.astype(str)})


def associations(rng: np.random.Generator, replicates: int) -> list[str]:
    """Cramér's V with and without the correction; returns the figures that miss their bounds."""
    print("| Cramér's V of classes × sites, patients | truth | without correction | corrected | bound |")
    print("|---|---|---|---|---|")
    missed = []
    for classes, sites, patients, truth, most in TABLES:
        values = []
        for _ in range(replicates):
            table = drawn(rng, classes, sites, patients, truth)
            counts = np.zeros((classes, sites), int)
            np.add.at(counts, (table["class"].astype(int), table["site"].astype(int)), 1)
            counts = counts[counts.any(axis=1)][:, counts.any(axis=0)]
            values.append((association(counts, method="cramer"), cramers_v(table, "class", "site")))
        figures = np.array(values, float)
        means, errors = figures.mean(axis=0), figures.std(axis=0, ddof=1) / replicates**0.5
        before, after = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
        name = f"{classes} × {sites}, {patients}"
        print(f"| {name} | {truth:g} | {before} | {after} | within {most:g} |")
        if abs(means[1] - truth) > most + 2 * errors[1]:
            missed.append(name)
    return missed


def effective(rng: np.random.Generator, replicates: int) -> list[str]:
    """1/variance of least-squares estimates of simulated patients, and the audit's figure; returns what differs.

    Patients have unit variance. The estimates come from a solver of least squares on the design, not from the audit's
    formula.
    """
    print(
        "\n| combination | smallest margin (before) | effective patients | 1/variance, simulated |\n|---|---|---|---|"
    )
    missed = []
    for name, cells in COHORTS.items():
        fields = ("class", "site", "stain")[: len(next(iter(cells)))]
        people = pd.DataFrame([dict(zip(fields, cell, strict=True)) for cell, n in cells.items() for _ in range(n)])
        wanted = dict(zip(fields, name.rpartition("→ ")[2].split("×"), strict=True))
        numbers = range(len(people))
        found = verdict(people.assign(patient=numbers, slide=numbers, key=numbers), wanted)["effective_patients"]
        levels = [(field, value) for field in fields for value in sorted(set(people[field]))]
        design = np.array([people[field] == value for field, value in levels], float).T
        outcomes = rng.normal(size=(len(people), replicates))
        solution = np.linalg.lstsq(design, outcomes, rcond=None)[0]
        simulated = 1 / np.square(np.array([wanted[field] == value for field, value in levels]) @ solution).mean()
        error = simulated * (2 / replicates) ** 0.5
        margin = min(int((people[field] == value).sum()) for field, value in wanted.items())
        print(f"| {name} | {margin} | {found:.2f} | {simulated:.2f} ± {error:.2f} |")
        if abs(found - simulated) > 2.6 * error:  # four figures: beyond it one run in 25 by chance
            missed.append(name)
    return missed


def main() -> None:
    """Run both simulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    missed = associations(rng, arguments.replicates) + effective(rng, 20 * arguments.replicates)
    if missed:
        sys.exit("Beyond their Monte-Carlo errors: " + "; ".join(missed))


if __name__ == "__main__":
    main()
