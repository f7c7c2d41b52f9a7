"""How right distances and their ratios are: what they are where the truth is known, over simulated studies.

    python benchmarks/statistics/distances.py

Features are Gaussian, with an effect of the patient that is half of the variance. A candidate of true ratio r draws
from the real population with probability 1 − √r and from the baseline's otherwise: its kernel distance is r times the
baseline's, exactly. Prints a table for ``docs/results_simulations.md``, each figure with its Monte-Carlo error, and
fails where a figure misses its bound by more than two of these.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from latent_medi.statistics.distances import FeatureStatistics, frechet_distance
from latent_medi.statistics.intervals import t_interval
from latent_medi.statistics.kernel_distance import (
    KernelDistance,
    KernelSet,
    distance_ratio,
    kernel_distance,
    kid,
)
from latent_medi.statistics.patient_gaussian import PatientGaussian

DIM = 16
PATCHES = 5
SHIFT = 0.45
SIMULATIONS = 5
RATIOS = (0.0, 0.1, 0.3, 0.6)
WITHIN = 0.5
"""Share of the variance that is within patients."""


def patients(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Real patches of some patients, and whose they are."""
    who = np.repeat(np.arange(count), PATCHES)
    between = rng.normal(size=(count, DIM)) * (1 - WITHIN) ** 0.5
    return between[who] + rng.normal(size=(len(who), DIM)) * WITHIN**0.5, who


def samples(rng: np.random.Generator, n: int, ratio: float) -> np.ndarray:
    """Samples of a true ratio of kernel distances."""
    far = rng.random(n) < ratio**0.5
    return rng.normal(size=(n, DIM)) + SHIFT * far[:, None]


def true_distance(ratio: float) -> float:
    """Kernel distance of the population that :func:`samples` draws from to the real one: |E φ(x) − E φ(y)|² with the
    features φ of the cubic kernel, 3·|Δ₁|²/d + 3·|Δ₂|²/d² + |Δ₃|²/d³ for the moments of each order.
    """
    mean, one = np.full(DIM, SHIFT), np.eye(DIM)
    second = np.outer(mean, mean)
    third = np.einsum("i,j,k->ijk", mean, mean, mean) + sum(
        np.einsum(how, one, mean) for how in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk")
    )
    parts = [factor * float((x**2).sum()) for factor, x in ((3 / DIM, mean), (3 / DIM**2, second), (DIM**-3, third))]
    return ratio * sum(parts)


@dataclass
class Lines:
    """Rows of the table, and those that miss their bounds."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(
        self, name: str, found: Sequence[float], low: float, high: float, before: Sequence[float] | None = None
    ) -> None:
        """A mean over simulated studies, its bounds, and what another estimator gives."""
        value, error = _mean(found)
        bound = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "–"
        self.rows.append((name, "–" if before is None else _text(*_mean(before)), _text(value, error), bound))
        if value < low - 2 * error or value > high + 2 * error:
            self.missed.append(name)

    def show(self) -> None:
        print("| | before | now | bound |\n|---|---|---|---|")
        for row in self.rows:
            print("| " + " | ".join(row) + " |")


def _mean(values: Sequence[float]) -> tuple[float, float]:
    found = np.asarray(values, float)
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)


def _text(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def covers(distance: KernelDistance, truth: float) -> float:
    """Whether the interval of a distance has the truth."""
    bounds = t_interval(distance.value, distance.spread)
    return float(bounds is not None and bounds[0] <= truth <= bounds[1])


def nothing(lines: Lines, rng: np.random.Generator, replicates: int) -> None:
    """Real patients, and a perfect generator, against real patients."""
    found: dict[str, list[float]] = {name: [] for name in ("real", "perfect", "real before", "perfect before", "in")}
    for _ in range(replicates):
        (a, who), (b, whose), made = patients(rng, 28), patients(rng, 28), samples(rng, 140, 0.0)
        reference = KernelSet(a, who)
        real, perfect = kernel_distance(reference, KernelSet(b, whose)), kernel_distance(reference, KernelSet(made))
        found["real"].append(real.value)
        found["perfect"].append(perfect.value)
        found["real before"].append(kid(a, b))
        found["perfect before"].append(kid(a, made))
        found["in"].append((covers(real, 0.0) + covers(perfect, 0.0)) / 2)
    lines.add("KID, real against real", found["real"], 0.0, 0.0, found["real before"])
    lines.add("KID, perfect generator", found["perfect"], 0.0, 0.0, found["perfect before"])
    lines.add("interval of a KID of 0 has it", found["in"], 0.93, 1.0)


def ratios(lines: Lines, rng: np.random.Generator, replicates: int, count: int) -> None:
    """The ratio of kernel distances, and the intervals of both."""
    n = count * PATCHES
    truth = true_distance(1.0)
    values: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    inside: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    distances, none = [], 0
    for _ in range(replicates):
        reference = KernelSet(*patients(rng, count))
        baseline = kernel_distance(reference, KernelSet(samples(rng, n, 1.0)))
        distances.append(covers(baseline, truth))
        for ratio in RATIOS:
            result = distance_ratio(kernel_distance(reference, KernelSet(samples(rng, n, ratio))), baseline)
            if result is None:
                none += 1
                continue
            bounds = t_interval(*result)
            values[ratio].append(result[0])
            inside[ratio].append(float(bounds is not None and bounds[0] <= ratio <= bounds[1]))
    lines.add(f"{count} patients: interval of the baseline's KID has it", distances, 0.93 if count >= 14 else 0.9, 1.0)
    for ratio in RATIOS:
        low, high = (ratio - 0.03, ratio + 0.03) if count >= 20 else (-np.inf, np.inf)
        lines.add(f"{count} patients: KID ratio, true {ratio:g}", values[ratio], low, high)
        lines.add(f"{count} patients: its interval has {ratio:g}", inside[ratio], 0.93 if count >= 14 else 0.9, 1.0)
    print(f"{count} patients: no ratio in {none / (replicates * len(RATIOS)):.1%}", file=sys.stderr)


def frechet_ratios(lines: Lines, rng: np.random.Generator, replicates: int, count: int) -> None:
    """The ratio of Fréchet distances, which is exact for candidates that are shifted by √r of the baseline's shift, and
    what a perfect generator is said to get, from a model fitted to the real patches of the same study.
    """
    n = count * PATCHES
    values: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    said: list[float] = []
    for _ in range(replicates):
        (a, who), (b, whose) = patients(rng, count), patients(rng, count)
        reference = FeatureStatistics.of(a)
        real = frechet_distance(reference, b)
        gap = frechet_distance(reference, rng.normal(size=(n, DIM)) + SHIFT) - real
        if gap <= 0:
            continue
        for ratio in RATIOS:
            made = rng.normal(size=(n, DIM)) + SHIFT * ratio**0.5
            values[ratio].append((frechet_distance(reference, made) - real) / gap)
        one = np.zeros(2 * n, int)
        model = PatientGaussian.fit(np.concatenate([a, b]), np.concatenate([who, whose + count]), one)
        gaps = []
        for _ in range(SIMULATIONS):
            x, other, perfect = (model.draw(people, one[:n], rng) for people in (who, whose, np.arange(n)))
            gaps.append(frechet_distance(x, perfect) - frechet_distance(x, other))
        said.append(float(np.mean(gaps)) / gap)
    for ratio in RATIOS:
        lines.add(f"{count} patients: FD ratio, true {ratio:g}", values[ratio], -np.inf, np.inf)
    lines.add(f"{count} patients: FD ratio that a perfect generator is said to get", said, -np.inf, np.inf)
    lines.add(
        f"{count} patients: that less the FD ratio of a true 0", np.subtract(said, values[0.0]).tolist(), -0.1, 0.1
    )


def main() -> None:
    """Run all simulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = Lines()
    parts: list[tuple[str, Callable[[np.random.Generator], None]]] = [
        ("nothing", lambda rng: nothing(lines, rng, arguments.replicates)),
        *(
            (f"ratios {count}", lambda rng, count=count: ratios(lines, rng, arguments.replicates, count))
            for count in (10, 20, 28)
        ),
        *(
            (f"Fréchet {count}", lambda rng, count=count: frechet_ratios(lines, rng, arguments.replicates, count))
            for count in (28,)
        ),
    ]
    for number, (name, part) in enumerate(parts):
        start = time.process_time()
        part(np.random.default_rng([arguments.seed, number]))
        print(f"{name}: {time.process_time() - start:.0f} s of one core", file=sys.stderr)
    lines.show()
    if lines.missed:
        sys.exit("Beyond two Monte-Carlo errors: " + "; ".join(lines.missed))


if __name__ == "__main__":
    main()
