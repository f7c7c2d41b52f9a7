"""How often 95 % intervals hold the truth: scores over patients, shares of samples, over simulated test sets.

    python benchmarks/statistics/intervals.py

A patient's patches are right with a chance of his own, from a beta distribution whose mean is the accuracy and whose
variance is a share (the intra-patient correlation) of accuracy × (1 − accuracy). Areas under the curve come from normal
scores whose variance has the patient's part of the same size. "Before" are percentiles of 200 bootstrap resamples of
patients; for means of shares, Wilson's interval of all samples together; for patients with several
classes, strata of equal sets of classes. Prints a table for ``docs/results_simulations.md`` and
fails where a coverage misses its bound by more than two Monte-Carlo errors.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from latent_medi.evaluation.downstream.classification_scores import Units, worst_group
from latent_medi.statistics import left_out
from latent_medi.statistics.intervals import SHARE, Interval, estimate, jackknife, mean_of_shares, wilson
from latent_medi.statistics.left_out import Score
from latent_medi.statistics.patient_means import PatientTable

RESAMPLES = 200
PATIENTS = (10, 14, 28)
ACCURACIES = (0.74, 0.92)
EXTREME = (0.97, 0.99)
"""Accuracies without a bound: of few patients who are nearly all right, little can be known."""


@dataclass(frozen=True)
class World:
    """Test patients of some classes."""

    classes: int
    correlation: float
    patches: int

    @property
    def text(self) -> str:
        return f"{self.classes} classes, correlation {self.correlation:g}, {self.patches} patches"


ANY = (0.0, 1.0)
WORLDS = (World(2, 0.1, 5), World(2, 0.3, 30), World(3, 0.3, 5), World(4, 0.1, 30))


@dataclass
class Coverage:
    """How often intervals held the truth, of those that there were."""

    held: int = 0
    n: int = 0

    def add(self, bounds: Interval, truth: float) -> None:
        if isinstance(bounds, tuple):
            self.held += bounds[0] <= truth <= bounds[1]
            self.n += 1

    @property
    def share(self) -> float:
        return self.held / self.n if self.n else float("nan")

    @property
    def error(self) -> float:
        """Its Monte-Carlo error."""
        return max(self.share * (1 - self.share), 1e-4) ** 0.5 / self.n**0.5 if self.n else float("nan")


@dataclass
class Lines:
    """Rows of the table, and those that miss their bounds."""

    rows: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, name: str, before: list[Coverage], now: list[Coverage], low: float, high: float) -> None:
        def text(found: list[Coverage]) -> str:
            return ", ".join(f"{one.share:.3f}" for one in found) or "–"

        bound = "–" if (low, high) == ANY else f"{low:g} to {high:g}"
        self.rows.append(f"| {name} | {text(before)} | {text(now)} | {bound} |")
        if any(one.share < low - 2 * one.error or one.share > high + 2 * one.error for one in now):
            self.missed.append(name)
        print(self.rows[-1], flush=True)


def percentiles(draws: np.ndarray) -> Interval:
    """The percentile interval of bootstrap values; of a resample without a class there is none."""
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def interval(found: Score, classes: np.ndarray, within: tuple[float, float], n: int) -> Interval:
    """The package's."""
    return estimate(found.value, 0, len(classes), jackknife(found.left_out, classes), within, n).interval


def accuracies(world: World, n: int, accuracy: float, replicates: int, seed: int) -> list[tuple[Coverage, Coverage]]:
    """Coverage, before and now, of the balanced accuracy and of Matthews' correlation."""
    rng = np.random.default_rng([seed, n])
    c, m = world.classes, world.patches
    of_patient = np.repeat(np.arange(c), n)
    truth, patients = np.repeat(of_patient, m), np.repeat(np.arange(c * n), m)
    spread = 1 / world.correlation - 1
    matthews = (c * accuracy - 1) / (c - 1)
    balanced, correlation = (Coverage(), Coverage()), (Coverage(), Coverage())
    even = np.full(c, 1 / c)
    for _ in range(replicates):
        chance = rng.beta(accuracy * spread, (1 - accuracy) * spread, c * n)[patients]
        right = rng.random(len(truth)) < chance
        predicted = np.where(right, truth, (truth + rng.integers(1, c, len(truth))) % c)
        balanced[1].add(
            interval(left_out.mean_of_groups(right.astype(float), truth, even, patients), of_patient, SHARE, n),
            accuracy,
        )
        found = left_out.correlation(truth, predicted, c, patients)
        correlation[1].add(interval(found, of_patient, (-1.0, 1.0), n), matthews)
        weights = rng.multinomial(c * n, np.full(c * n, 1 / (c * n)), RESAMPLES).astype(float)
        tables = np.bincount(patients * c * c + truth * c + predicted, minlength=c * n * c * c)
        drawn = (weights @ tables.reshape(c * n, c * c)).reshape(-1, c, c)
        t, p, total = drawn.sum(axis=2), drawn.sum(axis=1), drawn.sum(axis=(1, 2))
        hits = np.einsum("bii->bi", drawn)
        with np.errstate(invalid="ignore", divide="ignore"):
            balanced[0].add(percentiles((hits / t).mean(axis=1)), accuracy)
            under = np.sqrt((total**2 - (p**2).sum(axis=1)) * (total**2 - (t**2).sum(axis=1)))
            correlation[0].add(percentiles((hits.sum(axis=1) * total - (t * p).sum(axis=1)) / under), matthews)
    return [balanced, correlation]


def areas(world: World, n: int, area: float, replicates: int, seed: int) -> tuple[Coverage, Coverage]:
    """Coverage, before (of two classes, in a quarter of the replicates) and now, of the area under the curve."""
    rng = np.random.default_rng([seed, n])
    c, m = world.classes, world.patches
    of_patient = np.repeat(np.arange(c), n)
    truth, patients = np.repeat(of_patient, m), np.repeat(np.arange(c * n), m)
    shift = stats.norm.ppf(area) * 2**0.5 * np.eye(c)[truth]
    before, now = Coverage(), Coverage()
    for replicate in range(replicates):
        effect = rng.normal(size=(c * n, c))[patients] * world.correlation**0.5
        score = shift + effect + rng.normal(size=(len(truth), c)) * (1 - world.correlation) ** 0.5
        now.add(interval(left_out.pairwise_auroc(truth, score, patients), of_patient, SHARE, n), area)
        if c == 2 and replicate % 4 == 0:
            rank = stats.rankdata(score[:, 1])
            order = np.argsort(rank)
            weights = rng.multinomial(c * n, np.full(c * n, 1 / (c * n)), RESAMPLES).astype(float)[:, patients][
                :, order
            ]
            up = weights * (truth[order] == 1)
            down = weights - up
            pairs = up.sum(axis=1) * down.sum(axis=1)
            before.add(percentiles((up * np.cumsum(down, axis=1)).sum(axis=1) / pairs), area)
    return before, now


def shares(chances: tuple[float, ...], sizes: tuple[int, ...], replicates: int, seed: int) -> tuple[Coverage, Coverage]:
    """Coverage, before and now, of a mean over combinations of shares of samples."""
    rng = np.random.default_rng(seed)
    truth = float(np.mean(chances))
    before, now = Coverage(), Coverage()
    for hits in rng.binomial(sizes, chances, (replicates, len(sizes))).tolist():
        found = mean_of_shares(hits, sizes)
        now.add(found.interval, truth)
        total = sum(sizes)
        before.add(wilson(round((found.value or 0.0) * total), total), truth)
    return before, now


def several_classes(classes: int, n: int, accuracy: float, replicates: int, seed: int) -> tuple[Coverage, Coverage]:
    """Coverage of the balanced accuracy where each of n patients has patches of each class with a chance of one half:
    by strata of the very classes that a patient has, and by samples that share no class.
    """
    rng = np.random.default_rng(seed)
    by_set, now = Coverage(), Coverage()
    for _ in range(replicates):
        truth, patients = (np.repeat(codes, 5) for codes in np.nonzero(rng.random((classes, n)) < 0.5))
        right = (rng.random(len(truth)) < rng.beta(accuracy * 9, (1 - accuracy) * 9, n)[patients]).astype(float)
        table = PatientTable(truth, patients, np.full(len(truth), True), classes, n)
        now.add(table.estimate(right, share=True).interval, accuracy)
        own = table.present[:, table.present.any(axis=0)]
        strata = np.unique(own, axis=1, return_inverse=True)[1].reshape(-1)
        spread = jackknife(table.left_out(right), strata)
        by_set.add(estimate(table.mean(right), 0, n, spread, SHARE, table.smallest_class).interval, accuracy)
    return by_set, now


def lowest(groups: int, n: int, accuracy: float, replicates: int, seed: int) -> Coverage:
    """Coverage of the lowest of several groups of the same accuracy."""
    rng = np.random.default_rng(seed)
    found = Coverage()
    truth = np.zeros(groups * n * 5, int)
    sites = np.repeat(np.arange(groups), n * 5)
    units = Units(truth, sites, np.repeat(np.arange(groups * n), 5), np.ones(len(truth), int))
    for _ in range(replicates):
        chance = np.repeat(rng.beta(accuracy * 9, (1 - accuracy) * 9, groups * n), 5)
        found.add(worst_group((rng.random(len(truth)) >= chance).astype(int), units, ["a", "b"]).interval, accuracy)
    return found


SHARES: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "3 × 20 samples, 0.02, 0.5, 0.98": ((0.02, 0.5, 0.98), (20, 20, 20)),
    "3 × 20, all 0.95": ((0.95,) * 3, (20,) * 3),
    "6 × 100, all 0.99": ((0.99,) * 6, (100,) * 6),
    "4 × 50, all 0.6": ((0.6,) * 4, (50,) * 4),
    "10, 10 and 400, 0.3, 0.7, 0.95": ((0.3, 0.7, 0.95), (10, 10, 400)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    replicates, seed = options.replicates, options.seed
    lines = Lines()
    print("Worlds, in this order: " + "; ".join(world.text for world in WORLDS))
    print("| 95 % interval of | before | now | bound |\n|---|---|---|---|")
    for accuracy in ACCURACIES:
        for n in PATIENTS:
            bounds = (0.92, 1.0) if n < 14 else (0.93, 0.98)
            of = f"of {accuracy:g}, {n} patients per class"
            results = [accuracies(world, n, accuracy, replicates, seed) for world in WORLDS]
            for which, name in enumerate(("balanced accuracy", "MCC at an accuracy")):
                before, now = ([result[which][i] for result in results] for i in (0, 1))
                lines.add(f"{name} {of}", before, now, *bounds)
            found = [areas(world, n, accuracy, replicates, seed) for world in WORLDS[:3]]
            lines.add(f"AUROC {of}", [a for a, _ in found if a.n], [b for _, b in found], *bounds)
    for accuracy in EXTREME:
        for n in (PATIENTS[0], PATIENTS[-1]):
            pairs = [accuracies(world, n, accuracy, replicates, seed)[0] for world in WORLDS]
            name = f"balanced accuracy of {accuracy:g}, {n} patients per class"
            lines.add(name, [before for before, _ in pairs], [now for _, now in pairs], *ANY)
    for name, (chances, sizes) in SHARES.items():
        of_shares = shares(chances, sizes, replicates, seed)
        lines.add(f"mean of shares: {name}", [of_shares[0]], [of_shares[1]], 0.93, 1.0)
    for groups in (2, 6):
        lines.add(
            f"lowest of {groups} groups of 14 patients", [], [lowest(groups, 14, 0.8, replicates, seed)], 0.93, 1.0
        )
    for classes, n in ((3, 30), (5, 40)):
        of_classes = several_classes(classes, n, 0.74, replicates, seed)
        name = f"balanced accuracy of 0.74, {n} patients with any of {classes} classes"
        lines.add(name, [of_classes[0]], [of_classes[1]], 0.93, 0.98)
    print(f"Monte-Carlo error of 0.95: {(0.95 * 0.05 / replicates) ** 0.5:.4f}")
    for name in lines.missed:
        print(f"misses its bound: {name}")
    return 1 if lines.missed else 0


if __name__ == "__main__":
    sys.exit(main())
