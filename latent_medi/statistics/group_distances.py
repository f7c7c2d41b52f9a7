"""How far samples are from real patches, on the scale of how far real patches are from each other.

A kernel distance has no scale of its own: it depends on the encoder. Here it is read next to the distances of groups of
real patches, such as class × site, to all other real patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_medi.statistics.kernel_distance import polynomial_kernel

_LEAST = 10
"""Rows that a group of real patches needs to have a distance."""


@dataclass(frozen=True)
class DistanceInGroups:
    """A kernel distance (KID), and the same between real patches.

    Args:
        value: From the samples to the real patches.
        farthest: From the group of real patches that is farthest from all others to these; None without a group
            of 10 patches of two patients, and others.
        patients: From a patient to all others, median over the patients; None without two patients of two patches.
    """

    value: float
    farthest: float | None
    patients: float | None

    @property
    def ratio(self) -> float | None:
        """The distance over the larger of the two between real patches; None where both are unknown or nothing."""
        real = max(self.farthest or 0.0, self.patients or 0.0)
        return self.value / real if real > 0 else None


def distance_in_groups(
    samples: np.ndarray, real: np.ndarray, groups: np.ndarray, patients: np.ndarray
) -> DistanceInGroups:
    """Kernel distances of samples to real patches, and of each group and each patient of these to the others.

    Pairs of patches of one patient are left out of what real patches have in common with each other, except within a
    single patient. The matrix of all pairs of real patches is held: give a few thousand rows.

    Args:
        samples: Features [N, d], two rows or more.
        real: Features [M, d] of two patients or more.
        groups, patients: Of each real row, [M].
    """
    n = len(samples)
    own = polynomial_kernel(samples, samples)
    kernel = polynomial_kernel(real, real)
    people = np.unique(patients, return_inverse=True)[1]
    apart = people[:, None] != people[None, :]
    within_samples = (own.sum() - np.trace(own)) / (n * (n - 1))
    cross = polynomial_kernel(samples, real).mean()
    value = float(within_samples + kernel[apart].mean() - 2 * cross)
    return DistanceInGroups(value, _farthest_group(kernel, apart, groups, people), _between_patients(kernel, people))


def _sums(matrix: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Sums of the blocks of a matrix [M, M] by the groups of its rows and columns, [G, G]."""
    member = (codes[:, None] == np.arange(codes.max() + 1)).astype(np.float64)
    result: np.ndarray = member.T @ matrix @ member
    return result


def _farthest_group(kernel: np.ndarray, apart: np.ndarray, groups: np.ndarray, people: np.ndarray) -> float | None:
    codes = np.unique(groups, return_inverse=True)[1]
    sums, pairs = _sums(np.where(apart, kernel, 0.0), codes), _sums(apart.astype(np.float64), codes)
    found = []
    for code, size in enumerate(np.bincount(codes)):
        others = np.arange(len(sums)) != code
        if size < _LEAST or len(np.unique(people[codes == code])) < 2 or not others.any():
            continue
        rest = np.ix_(others, others)
        if not pairs[rest].sum() or not pairs[code, others].sum():
            continue
        found.append(
            sums[code, code] / pairs[code, code]
            + sums[rest].sum() / pairs[rest].sum()
            - 2 * sums[code, others].sum() / pairs[code, others].sum()
        )
    return float(max(found)) if found else None


def _between_patients(kernel: np.ndarray, people: np.ndarray) -> float | None:
    sizes = np.bincount(people)
    sums = _sums(kernel, people)
    # Of the patient's own pairs, those of a patch with itself are left out; of the others', those of one patient.
    own = np.diag(sums) - np.bincount(people, np.diag(kernel))
    n_rest = len(people) - sizes
    total, diagonal = sums.sum(), np.diag(sums)
    rest = total - 2 * sums.sum(axis=1) + diagonal - (diagonal.sum() - diagonal)
    rest_pairs = n_rest**2 - ((sizes**2).sum() - sizes**2)
    usable = (sizes >= 2) & (rest_pairs > 0)
    if not usable.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        values = own / (sizes * (sizes - 1)) + rest / rest_pairs - 2 * (sums.sum(axis=1) - diagonal) / (sizes * n_rest)
    return float(np.median(values[usable]))
