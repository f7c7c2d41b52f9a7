"""Kernel distance (KID) between two sets of features that come from patients, with its variance over patients.

KID is the squared maximum mean discrepancy with the kernel (x·y/d + 1)³ (Bińkowski et al. 2018): the mean kernel of
pairs within each set less twice that of pairs of the two. The plain estimate leaves out a patch with itself (Gretton
et al. 2012). Patches of one patient are alike, so here each pair of patches of one patient is left out of the within
terms. The expectation is then 0 wherever both sets are of one population, however many patches a patient has.

A set may be drawn by strata, such as classes and sites in fixed shares. Leaving out pairs of one patient would then
weigh pairs of one stratum too little, so means are taken for each pair of strata and weighed by the strata's shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latent_medi.statistics.intervals import Spread, jackknife, strata_of, t_interval

KID_UNIT = "KID × 10³"
"""How people read kernel distances: in thousandths. Files have them as they are."""
_LEAST = 3
"""Patients of a stratum: without one of them, it still has a pair."""


def kid_text(value: float | None) -> str:
    """A kernel distance in :data:`KID_UNIT` with three significant digits, since its scale depends on the encoder; a
    dash if it is not available.
    """
    if value is None:
        return "–"
    scaled = 1e3 * value
    if abs(scaled) >= 1e6:
        return f"{scaled:.2e}".replace("e+0", "e").replace("e+", "e")
    if abs(scaled) >= 999.5:
        return f"{scaled:,.0f}"
    return "0" if abs(scaled) < 5e-5 else f"{scaled:.3g}" if abs(scaled) >= 1e-3 else f"{scaled:.4f}"


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a·b/d + 1)³, float64 [len(a), len(b)] (Bińkowski et al. 2018)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    inner = a @ b.T
    inner /= a.shape[1]
    inner += 1.0
    result: np.ndarray = inner * inner * inner
    return result


@dataclass(frozen=True)
class LeftOut:
    """Values that an estimate has without each unit (patient or sample) of one population.

    Args:
        units: Name of each unit, ascending, [n].
        values: Value without it, [n].
        strata: Code of the stratum that it was drawn from, [n].
    """

    units: np.ndarray
    values: np.ndarray
    strata: np.ndarray

    @property
    def spread(self) -> Spread:
        """Variance over the units."""
        return jackknife(self.values, self.strata)

    def bias(self, value: float) -> float:
        """The jackknife's estimate of bias (Quenouille 1956): Σ over strata of (m − 1)·(mean − value)."""
        sizes = np.bincount(self.strata)
        sums = np.bincount(self.strata, self.values - value)
        return float(((sizes - 1) * sums / np.maximum(sizes, 1)).sum())


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and what it is without each patient or sample.

    Args:
        value: The distance; its expectation is 0 where both sets are of one population, so it may be below 0.
        reference: Without each patient of the reference.
        sample: Without each patient, or sample, of the set that is compared with it.
    """

    value: float
    reference: LeftOut
    sample: LeftOut

    @property
    def spread(self) -> Spread:
        """Variance over patients, and samples, of both sets: were all of them drawn anew."""
        return Spread.total([self.reference.spread, self.sample.spread])


@dataclass(frozen=True)
class _Means:
    """Means over pairs of patches by pair of strata, weighed by the strata's shares.

    Args:
        sums: Sum of the kernel, [S, S], symmetric.
        pairs: Number of pairs, [S, S].
        share: Share of each stratum, [S].
    """

    sums: np.ndarray
    pairs: np.ndarray
    share: np.ndarray

    @property
    def value(self) -> float:
        """The weighed mean."""
        return float(self.share @ (self.sums / self.pairs) @ self.share)

    def without_unit(self, stratum: np.ndarray, sums: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """The weighed mean without each of some patients that have one stratum, [U]; NaN where no pair is left.

        Args:
            stratum: Stratum of each patient, [U].
            sums, pairs: The patient's part of ``sums`` and ``pairs`` in each stratum, [U, S].
        """
        weight, each = self.share[stratum], np.arange(len(stratum))
        before = (self.sums / self.pairs)[stratum]
        with np.errstate(invalid="ignore", divide="ignore"):
            after = (self.sums[stratum] - sums) / (self.pairs[stratum] - pairs)
            own = (self.sums[stratum, stratum] - 2 * sums[each, stratum]) / (
                self.pairs[stratum, stratum] - 2 * pairs[each, stratum]
            )
        # A row and a column of the table change; they cross in one place, which changes twice.
        own_before = before[each, stratum]
        before[each, stratum] = after[each, stratum] = 0.0
        change = 2 * (after - before) @ self.share + weight * (own - own_before)
        result: np.ndarray = self.value + weight * change
        return result

    def without(self, stratum: np.ndarray, sums: np.ndarray, pairs: np.ndarray) -> float:
        """The weighed mean without one patient of several strata, arguments as in :meth:`without_unit`."""
        rest = []
        for whole, part in ((self.sums, sums), (self.pairs, pairs)):
            gone = np.zeros_like(whole)
            gone[stratum] = part
            rest.append(whole - gone - gone.T)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.share @ (rest[0] / rest[1]) @ self.share)


class KernelSet:
    """One side of kernel distances.

    Args:
        features: [N, d].
        patients: Patient of each, [N], or the name of each independent sample, by which :func:`mean_distance` knows it
            in other sets; by default each is independent and named by its position.
        strata: Stratum of each in a design with fixed shares, [N]; one by default. Strata of fewer than three patients
            are joined.

    Raises:
        ValueError: Fewer than two patients.
    """

    def __init__(
        self, features: np.ndarray, patients: np.ndarray | None = None, strata: np.ndarray | None = None
    ) -> None:
        n = len(features)
        who = np.arange(n) if patients is None else patients
        self.names, person = np.unique(who, return_inverse=True)
        if len(self.names) < 2:
            raise ValueError(f"the kernel distance needs two patients or samples per set, there are {len(self.names)}")
        stratum = _joined(person, np.zeros(n, int) if strata is None else np.unique(strata, return_inverse=True)[1])
        cells = stratum * len(self.names) + person
        order = np.argsort(cells, kind="stable")
        cells, self._starts = np.unique(cells[order], return_index=True)
        self.features = np.asarray(features, np.float64)[order]
        self._stratum, self._person = np.divmod(cells, len(self.names))
        self._counts = np.diff(np.append(self._starts, n)).astype(np.float64)
        self._first = np.unique(self._stratum, return_index=True)[1]
        self.sizes = self._by_person(self._counts)
        """Patches by patient and stratum, [P, S]."""
        self.total = self.sizes.sum(axis=0)
        self.share = self.total / n
        self.strata = strata_of(self.sizes.T > 0)
        self.within, self.within_left_out = self._within()

    def _by_person(self, values: np.ndarray) -> np.ndarray:
        """A value per unit, [U], as a table by patient and stratum, [P, S]."""
        table = np.zeros((len(self.names), len(self._first)))
        table[self._person, self._stratum] = values
        return table

    def by_patient(self, kernel: np.ndarray) -> np.ndarray:
        """Sums of a value per row, [N], by patient and stratum, [P, S]."""
        return self._by_person(np.add.reduceat(kernel, self._starts))

    def _within(self) -> tuple[float, np.ndarray]:
        """Mean kernel of pairs of different patients, as it is and without each patient, [P]."""
        kernel = polynomial_kernel(self.features, self.features)
        if len(self._starts) < len(kernel):
            kernel = np.add.reduceat(np.add.reduceat(kernel, self._starts, axis=0), self._starts, axis=1)
        kernel[self._person[:, None] == self._person[None, :]] = 0.0
        # By unit and stratum: the kernel's sum over pairs with the other patients there, and the number of these.
        sums = np.add.reduceat(kernel, self._first, axis=1)
        pairs = self._counts[:, None] * (self.total[None, :] - self.sizes[self._person])
        of_strata = [np.add.reduceat(x, self._first, axis=0) for x in (sums, pairs)]
        whole = _Means(of_strata[0], of_strata[1], self.share)
        left_out = np.empty(len(self.names))
        alone = np.bincount(self._person)[self._person] == 1
        left_out[self._person[alone]] = whole.without_unit(self._stratum[alone], sums[alone], pairs[alone])
        for person in np.unique(self._person[~alone]):
            own = self._person == person
            left_out[person] = whole.without(self._stratum[own], sums[own], pairs[own])
        return whole.value, left_out

    def cross_left_out(self, means: np.ndarray) -> np.ndarray:
        """Mean kernel with the other set without each patient, [P], from each row's mean kernel with it, [N]."""
        sums = self.by_patient(means)
        rest = self.total - self.sizes
        with np.errstate(invalid="ignore", divide="ignore"):
            result: np.ndarray = ((sums.sum(axis=0) - sums) / rest) @ self.share
            return result


def kernel_distance(reference: KernelSet, sample: KernelSet) -> KernelDistance:
    """Distance of two sets, whose patients must not be the same ones."""
    cross = polynomial_kernel(reference.features, sample.features)
    within, mean = reference.within + sample.within, float(cross.mean())
    parts = [
        LeftOut(
            side.names,
            side.within_left_out + other.within - 2 * side.cross_left_out(cross.mean(axis=axis)),
            side.strata,
        )
        for side, other, axis in ((reference, sample, 1), (sample, reference, 0))
    ]
    return KernelDistance(within - 2 * mean, *parts)


def kid(
    a: np.ndarray, b: np.ndarray, patients_a: np.ndarray | None = None, patients_b: np.ndarray | None = None
) -> float:
    """Kernel distance of two sets of features.

    Args:
        a, b: Features [N, d] and [M, d].
        patients_a, patients_b: Patient of each; pairs of patches of one patient are left out of the within terms. By
            default each is independent, which is the usual KID.

    Raises:
        ValueError: Fewer than two patients or samples in a set.
    """
    return kernel_distance(KernelSet(a, patients_a), KernelSet(b, patients_b)).value


def mean_distance(parts: Sequence[KernelDistance]) -> KernelDistance:
    """Mean of distances, of which several may have patients or samples in common, known by their names."""
    values = [part.value for part in parts]
    mean = float(np.mean(values))
    sides = [_merged([part.reference for part in parts], values), _merged([part.sample for part in parts], values)]
    return KernelDistance(mean, *sides)


def _merged(parts: Sequence[LeftOut], values: Sequence[float]) -> LeftOut:
    """Mean of values without each unit, where a unit may be in some of them alone."""
    units = np.unique(np.concatenate([part.units for part in parts]))
    left_out, present = np.full(len(units), float(np.mean(values))), []
    for part, value in zip(parts, values, strict=True):
        place = np.searchsorted(units, part.units)
        left_out[place] += (part.values - value) / len(parts)
        groups = np.zeros((part.strata.max() + 1, len(units)), bool)
        groups[part.strata, place] = True
        present.append(groups)
    return LeftOut(units, left_out, strata_of(np.concatenate(present)))


def distance_ratio(candidate: KernelDistance, baseline: KernelDistance) -> tuple[float, Spread] | None:
    """Distance of a candidate as a share of a baseline's, and its variance; both have the same reference.

    Returns:
        The ratio: 0 is the population itself, 1 is no nearer than the baseline, and below 0 is chance. ``None`` where
        the baseline's distance may be nothing: its 95 % interval includes 0.
    """
    bounds = t_interval(baseline.value, baseline.spread)
    if bounds is None or bounds[0] <= 0:
        return None
    common, a, b = candidate.reference, candidate.sample, baseline.sample
    sides = [
        LeftOut(common.units, common.values / baseline.reference.values, common.strata),
        LeftOut(a.units, a.values / baseline.value, a.strata),
        LeftOut(b.units, candidate.value / b.values, b.strata),
    ]
    value = candidate.value / baseline.value
    return value - sum(side.bias(value) for side in sides), Spread.total([side.spread for side in sides])


def _joined(person: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """Strata, those of fewer than three patients joined; with the largest where they have fewer even so."""
    stratum = np.asarray(stratum).reshape(-1)

    def people(of: np.ndarray) -> np.ndarray:
        pairs = np.unique(np.stack([of, person.reshape(-1)]), axis=1)
        return np.bincount(pairs[0])

    counts = people(stratum)
    if len(counts) == 1 or counts.min() >= _LEAST:
        return stratum
    largest = int(counts.argmax())
    joined = np.where((counts < _LEAST)[stratum], len(counts), stratum)
    if counts[largest] >= _LEAST and people(joined)[-1] < _LEAST:
        joined[joined == len(counts)] = largest
    result: np.ndarray = np.unique(joined, return_inverse=True)[1].reshape(-1)
    return result
