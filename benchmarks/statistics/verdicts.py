"""How often an evaluation calls a candidate useful that is no better than stain transfer, and one that is better.

    python benchmarks/statistics/verdicts.py --replicates 2000

The world: patches are points with patient effects (intra-patient correlation 0.2, 5 patches per patient); three
sites and two classes, of which one combination has no training patch. Stain transfer is a mechanism that draws
patches of that combination, somewhat off; it comes in two equal variants, computed from the same patches.
The candidate is another draw of the very same mechanism (gain 0), or of one that is less off, by a true gain in
accuracy of 0.03, 0.05 or 0.10. The classifier is a ridge regression in
closed form in place of the logistic regression, which is too slow for this many fits.
Estimates, intervals and the verdict are the product's own functions.

Three rules are applied to the same worlds. "before": the candidate is one set of samples, used whole in each of five
repeats; stain transfer is the better of its variants on the test patients; intervals are percentiles of 200 patient
resamples; a candidate ahead of all is at least "may be useful". "now": ten draws of half of a pool on either side,
variants chosen on other patients, the jackknife over patients and the variance over draws. "known error": the same
difference with its true standard error and the normal distribution.

The rule is applied to the differences alone: an evaluation gives no verdict on further grounds (the oracle does not
help, samples are far from tissue or do not show what was asked for), which are not simulated. "not useful" has the
bound that the rule promises, a one-sided error of 10 % against a single baseline: the candidate is truly ahead of the
real patches alone.

Each figure has its Monte-Carlo error; a line fails only where it misses its bound by more than two of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np
from scipy import stats

from latent_medi.evaluation.verdict import answer
from latent_medi.statistics.cross_fitting import FOLDS, patient_folds
from latent_medi.statistics.differences import Difference, Draws, Scored, difference, pool_factor
from latent_medi.statistics.intervals import MIN_PATIENTS

PATCHES, ADDED, REPEATS = 5, 160, 10
WITHIN_PATIENT = 0.2
MEANS = np.array([[[0.0, 0.0], [0.0, 0.6], [-0.8, 1.0]], [[2.0, 0.0], [2.0, 0.6], [0.6, 3.2]]])
"""By class and site; patches of class 1 at the third site have no training patch."""
OFF = np.array([0.6, -2.0])
"""How far off stain transfer is, in units of a patch's standard deviation."""
GAINS = (0.0, 0.03, 0.05, 0.10)
PATIENTS = (5, 10, 20, 28)
CHUNK = 100


def patches(mean: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Patches of patients, [*shape, PATCHES, 2], of total variance 1."""
    effects = rng.normal(size=(*shape, 1, 2)) * math.sqrt(WITHIN_PATIENT)
    return mean + effects + rng.normal(size=(*shape, PATCHES, 2)) * math.sqrt(1 - WITHIN_PATIENT)


class Ridge:
    """Least squares with an intercept on the real training patches and further ones of class 1; classes weigh the same.

    Args:
        training: Real training patches by class, [n, 2] each.
    """

    def __init__(self, training: list[np.ndarray]) -> None:
        with_one = [self.extended(x) for x in training]
        self.moments = [x.T @ x for x in with_one]
        self.sums = [x.sum(axis=0) for x in with_one]
        self.counts = [len(x) for x in training]

    @staticmethod
    def extended(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)

    def fit(self, added: np.ndarray | None) -> np.ndarray:
        """Coefficients [..., 3] with added patches [..., n, 2] of class 1, or none."""
        moments, sums, n = self.moments[1], self.sums[1], self.counts[1]
        if added is not None:
            x = self.extended(added)
            moments, sums, n = moments + np.swapaxes(x, -1, -2) @ x, sums + x.sum(axis=-2), n + x.shape[-2]
        left = self.moments[0] / self.counts[0] + moments / n + 1e-3 * np.eye(3)
        return np.linalg.solve(left, (sums / n - self.sums[0] / self.counts[0])[..., None])[..., 0]

    @staticmethod
    def accuracy(coefficients: np.ndarray) -> np.ndarray:
        """True balanced accuracy at the third site, [...]."""
        reach = np.linalg.norm(coefficients[..., :2], axis=-1)
        margins = [(coefficients[..., :2] @ MEANS[k, 2] + coefficients[..., 2]) / reach for k in (0, 1)]
        return (stats.norm.cdf(-margins[0]) + stats.norm.cdf(margins[1])) / 2

    @staticmethod
    def right(coefficients: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Share of each test patient's patches that is right: [B, R, 3] and [B, 2, P, m, 2] to [B, R, 2, P]."""
        w = coefficients[..., :2]
        places = np.einsum("brd,bkpmd->brkpm", w, test, optimize=True) + coefficients[:, :, 2, None, None, None]
        result = (places > 0).mean(axis=-1)
        result[:, :, 0] = 1 - result[:, :, 0]
        return result


def world(seed: int) -> Ridge:
    """The classifier with real training patches of 14 patients per combination, but for the unseen one."""
    rng = np.random.default_rng(seed)
    seen = [[0, 1, 2], [0, 1]]
    return Ridge([np.concatenate([patches(MEANS[k, s], (14,), rng).reshape(-1, 2) for s in seen[k]]) for k in (0, 1)])


def drawn(off: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Samples of a mechanism that is off by a multiple of ``OFF``."""
    return MEANS[1, 2] + off * OFF + rng.normal(size=(*shape, 2))


def expected(ridge: Ridge, off: float, n: int = 4000) -> float:
    """True accuracy with a mechanism's samples, over draws."""
    return float(ridge.accuracy(ridge.fit(drawn(off, (n, ADDED), np.random.default_rng(11)))).mean())


def off_for(ridge: Ridge, gain: float) -> float:
    """How far off a mechanism is that gains so much over stain transfer."""
    if gain == 0:
        return 1.0
    grid = np.linspace(-0.6, 1.0, 33)
    return float(np.interp(-gain, [expected(ridge, 1.0) - expected(ridge, o) for o in grid], grid))


def repeats_of(off: float, pool: int, repeats: int, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of ADDED without replacement from a pool for each replicate, [B, R, ADDED, 2]."""
    every = drawn(off, (replicates, pool), rng)
    order = rng.random((replicates, repeats, pool)).argsort(axis=-1)[..., :ADDED]
    return every[np.arange(replicates)[:, None, None], order]


def two_variants(pool: int, repeats: int, replicates: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The two variants of stain transfer, which agree in nine tenths of the variance, as :func:`repeats_of`."""
    first = repeats_of(1.0, pool, repeats, replicates, rng)
    centre = MEANS[1, 2] + OFF
    noise = rng.normal(size=first.shape)
    return [first, centre + math.sqrt(0.9) * (first - centre) + math.sqrt(0.1) * noise]


def left_out(right: np.ndarray) -> np.ndarray:
    """Balanced accuracy without each patient, from their own, [..., 2, P]; [..., 2 P]."""
    n = right.shape[-1]
    rest = (right.sum(axis=-1, keepdims=True) - right) / (n - 1)
    every = (rest + right.mean(axis=-1)[..., ::-1, None]) / 2
    return every.reshape(*right.shape[:-2], 2 * n)


def balanced(right: np.ndarray) -> np.ndarray:
    """Balanced accuracy of [..., 2, P]."""
    return right.mean(axis=(-1, -2))


def compared(first: np.ndarray, second: np.ndarray, pools: tuple[float | None, float | None]) -> Difference:
    """The product's difference of two training sets, from the patients' accuracies by repeat, [R, 2, P] each."""
    n = first.shape[-1]
    scored = [
        Scored(Draws(pool, [0] * len(x)), balanced(x), left_out(x), np.repeat([0, 1], n))
        for pool, x in zip(pools, (first, second), strict=True)
    ]
    return difference(scored[0], scored[1], 2 * n * PATCHES, 2 * n, n)


def cross_fit(variants: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Each fold's patients classified by the variant that is best on all others: [V, B, R, 2, P] to [B, R, 2, P]."""
    result = np.empty(variants.shape[1:])
    for fold in range(FOLDS):
        keep = folds != fold
        scores = (variants.mean(axis=2) * keep).sum(axis=-1) / keep.sum(axis=-1)  # [V, B, 2]
        best = scores.mean(axis=-1).argmax(axis=0)
        chosen = variants[best, np.arange(variants.shape[1])]
        result = np.where(keep, result, chosen)
    return result


def bootstrapped(change: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles of 200 resamples of patients within classes, from differences [2, P]."""
    n = change.shape[-1]
    draws = sum(change[k][rng.integers(0, n, (200, n))].mean(axis=1) for k in (0, 1)) / 2
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Counts:
    """Of one number of patients and gain: the share of replicates, by rule, of each event."""

    shares: dict[str, float]
    replicates: int

    def error(self, name: str) -> float:
        """Monte-Carlo error."""
        p = self.shares[name]
        return math.sqrt(max(p * (1 - p), 1 / self.replicates) / self.replicates)


def simulate(ridge: Ridge, gain: float, n: int, replicates: int, seed: int) -> Counts:
    """Every rule on the same worlds."""
    rng = np.random.default_rng([seed, n, round(1000 * gain)])
    off = off_for(ridge, gain)
    truth = expected(ridge, off, 20000) - expected(ridge, 1.0, 20000) if gain else 0.0
    folds = np.stack([patient_folds(np.arange(n), np.zeros(n, int), k) for k in (0, 1)])
    half = pool_factor(ADDED, 2 * ADDED)
    events: dict[str, list[bool]] = {}
    values = []
    for _ in range(0, replicates, CHUNK):
        test = np.stack([patches(MEANS[k, 2], (CHUNK, n), rng) for k in (0, 1)], axis=1)

        def right(samples: np.ndarray, test: np.ndarray = test) -> np.ndarray:
            return ridge.right(ridge.fit(samples), test)

        real = ridge.right(np.broadcast_to(ridge.fit(None), (CHUNK, 1, 3)), test)
        candidate = right(repeats_of(off, 2 * ADDED, REPEATS, CHUNK, rng))
        transfer = cross_fit(np.stack([right(x) for x in two_variants(2 * ADDED, REPEATS, CHUNK, rng)]), folds)
        whole = right(repeats_of(off, ADDED, 1, CHUNK, rng))
        variants = np.stack([right(x) for x in two_variants(ADDED * 3 // 2, 5, CHUNK, rng)])
        better = variants.mean(axis=(2, 3, 4)).argmax(axis=0)
        for b in range(CHUNK):
            found = compared(candidate[b], transfer[b], (half, half))
            said = answer([found, compared(candidate[b], real[b], (half, None))])
            values.append(found.value or 0.0)
            before = whole[b].mean(axis=0) - variants[better[b], b].mean(axis=0)
            from_real = whole[b].mean(axis=0) - real[b].mean(axis=0)
            interval = bootstrapped(before, rng)
            ahead = balanced(before) > 0 and balanced(from_real) > 0
            sure = ahead and interval[0] > 0 and bootstrapped(from_real, rng)[0] > 0
            row = {
                "before useful": sure,
                "before may be": ahead and not sure,
                "before excludes 0": not interval[0] <= 0 <= interval[1],
                "useful": said == "useful",
                "may be": said == "may be useful",
                "not useful": said == "not useful",
            }
            if isinstance(found.interval, tuple):
                row["excludes 0"] = not found.interval[0] <= 0 <= found.interval[1]
                row["covers"] = found.interval[0] <= truth <= found.interval[1]
            for name, value in row.items():
                events.setdefault(name, []).append(bool(value))
    shares = {name: float(np.mean(hits)) for name, hits in events.items()}
    shares["known error"] = float(np.mean(np.array(values) / np.std(values) > stats.norm.ppf(0.975)))
    return Counts(shares, len(values))


def misses(found: Counts, gain: float, n: int) -> list[str]:
    """The bounds that a line misses by more than two Monte-Carlo errors."""
    result = []
    highest = {"not useful": 0.10} | ({"useful": 0.05, "may be": 0.10, "excludes 0": 0.06} if gain == 0 else {})
    for name, bound in highest.items():
        if name in found.shares and found.shares[name] > bound + 2 * found.error(name):
            result.append(f"{name} above {bound:.0%}")
    if gain and n == max(PATIENTS):
        error = math.hypot(found.error("useful"), found.error("known error"))
        if found.shares["useful"] < found.shares["known error"] - 0.05 - 2 * error:
            result.append("power more than 5 points below that of a test that knows the error")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ridge = world(options.seed)
    print(f"accuracy: real {ridge.accuracy(ridge.fit(None)):.3f}, stain transfer {expected(ridge, 1.0):.3f}")
    columns = [
        "before useful",
        "before may be",
        "before excludes 0",
        "useful",
        "may be",
        "not useful",
        "excludes 0",
        "covers",
        "known error",
    ]
    print("| gain | patients | " + " | ".join(columns) + " | |")
    print("|---" * (len(columns) + 3) + "|")
    failed = False
    for gain, n in [(gain, n) for gain in GAINS for n in PATIENTS if gain == 0 or n >= MIN_PATIENTS]:
        found = simulate(ridge, gain, n, options.replicates, options.seed)
        cells = [f"{found.shares[c]:.3f} ± {found.error(c):.3f}" if c in found.shares else "–" for c in columns]
        problems = misses(found, gain, n)
        failed |= bool(problems)
        print(f"| {gain:.2f} | {n} | " + " | ".join(cells) + f" | {'; '.join(problems)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
