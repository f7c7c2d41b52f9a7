"""A Gaussian model of features: a mean per stratum, an effect of the patient, and what differs within a patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_medi.statistics.distances import psd_root


@dataclass(frozen=True)
class PatientGaussian:
    """Features of patches of patients.

    Args:
        strata: Names of the strata, ascending, [S].
        means: Mean of each, [S, d].
        between: Root of the covariance of patients' means within a stratum, [d, d].
        within: Root of the covariance of a patient's patches, [d, d].
    """

    strata: np.ndarray
    means: np.ndarray
    between: np.ndarray
    within: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, patients: np.ndarray, strata: np.ndarray) -> PatientGaussian:
        """Moments by the analysis of variance of features [N, d] (Searle, Casella and McCulloch 1992, §3.6)."""
        names, stratum = np.unique(strata, return_inverse=True)
        means, residual = _centred(features, stratum)
        _, who = np.unique(patients, return_inverse=True)
        counts = np.bincount(who)
        centres, inner = _centred(residual, who)
        n, people = len(features), len(counts)
        within = inner.T @ inner / max(n - people, 1)
        size = (n - (counts**2).sum() / n) / max(people - 1, 1)
        spread = (centres * counts[:, None]).T @ centres / max(people - len(names), 1)
        between = (spread - within) / max(size, 1e-12)
        return cls(names, means, psd_root(between), psd_root(within))

    def draw(self, patients: np.ndarray, strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Features [N, d] of new patients, as many as ``patients`` [N] has, with patches of these strata [N]."""
        names, who = np.unique(patients, return_inverse=True)
        dim = self.means.shape[1]
        effects = rng.normal(size=(len(names), dim)) @ self.between
        own = rng.normal(size=(len(who), dim)) @ self.within
        result: np.ndarray = self.means[np.searchsorted(self.strata, strata)] + effects[who] + own
        return result


def _centred(x: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each group, [G, d], and what rows [N, d] are more than that of theirs."""
    order = np.argsort(codes, kind="stable")
    starts = np.unique(codes[order], return_index=True)[1]
    means = np.add.reduceat(np.asarray(x, np.float64)[order], starts, axis=0) / np.bincount(codes)[:, None]
    return means, x - means[codes]
