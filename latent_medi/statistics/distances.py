"""Fréchet distance between two sets of features, and PCA for small sets.

All sums are float64. A Fréchet distance is biased upwards by roughly d²/n, so it is only comparable at equal n, and
only well defined when n ≥ 2d in both sets; the kernel distance (:mod:`latent_medi.statistics.kernel_distance`) has no
such bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RANK_RULE = 2  # Fréchet distance needs at least this many samples per dimension, in each set
PCA_RULE = 4  # samples per PCA dimension
RANK_DEFICIENT = "rank-deficient: compare only at equal n"
_CHUNK = 8192  # rows that are taken to float64 at once
BLOCK = 16384
"""Rows that are worked on at once where whole sets would be copied. Fewer are one block: sums then have one order."""


def blocks(n: int) -> list[slice]:
    """Parts of ``n`` rows, of at most :data:`BLOCK` each."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


class FeatureStatistics:
    """Count, mean and covariance of a stream of features, in float64.

    Args:
        dim: Feature dimension d.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.n = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStatistics:
        """Statistics of one array [N, d]; the memory it takes does not grow with N."""
        statistics = cls(features.shape[1])
        for start in range(0, len(features), _CHUNK):
            statistics.update(features[start : start + _CHUNK])
        return statistics

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance (division by n − 1), [d, d]; needs n ≥ 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two samples, there are {self.n}")
        return self._scatter / (self.n - 1)

    def update(self, features: np.ndarray) -> None:
        """Add a batch [N, d]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {features.shape}, expected [N, {self.dim}]")
        if len(features) == 0:
            return
        x = np.array(features, np.float64)
        mean = x.mean(axis=0)
        x -= mean
        total = self.n + len(x)
        delta = mean - self.mean
        self._scatter += x.T @ x
        self._scatter += np.outer(delta, delta) * (self.n * len(x) / total)
        self.mean = self.mean + delta * (len(x) / total)
        self.n = total


def psd_root(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix; rounding below zero is cut off."""
    values, vectors = np.linalg.eigh(matrix)
    result: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return result


def _factor(matrix: np.ndarray) -> np.ndarray:
    """R with R·Rᵀ = matrix: a tenth of the work of :func:`psd_root` where the matrix is positive definite."""
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return psd_root(matrix)


def frechet(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray, root_b: np.ndarray | None = None
) -> float:
    """Fréchet distance of two Gaussians: |μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½) (Heusel et al. 2017).

    tr (Σa·Σb)^½ is the sum of roots of the eigenvalues of Rᵀ·Σa·R with any R·Rᵀ = Σb. That is symmetric, so no complex
    root appears. R is the Cholesky factor, or the symmetric root where Σb is singular.

    Args:
        mean_a, cov_a, mean_b, cov_b: Moments, [d] and [d, d].
        root_b: Σb^½ if it is known already.
    """
    root = _factor(cov_b) if root_b is None else root_b
    product = root.T @ cov_a @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    delta = mean_a - mean_b
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    return float(delta @ delta + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def frechet_distance(a: FeatureStatistics | np.ndarray, b: FeatureStatistics | np.ndarray) -> float:
    """Fréchet distance of two feature sets, [N, d] arrays or their statistics; float64 throughout."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and min(len(a), len(b)) < a.shape[1]:
        return _frechet_of_few(a, b)
    a = FeatureStatistics.of(a) if isinstance(a, np.ndarray) else a
    b = FeatureStatistics.of(b) if isinstance(b, np.ndarray) else b
    return frechet(a.mean, a.cov, b.mean, b.cov)


def _frechet_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance where a set has fewer samples than dimensions, without a matrix [d, d].

    With centred sets as rows of X and Y, tr (Σa·Σb)^½ is the sum of the singular values of X·Yᵀ/√((N−1)(M−1)).
    """
    mean_a, mean_b = (np.asarray(x, np.float64).mean(axis=0) for x in (a, b))
    x, y = ((np.asarray(z, np.float64) - mean) / np.sqrt(len(z) - 1) for z, mean in ((a, mean_a), (b, mean_b)))
    product = x @ y.T if len(x) <= len(y) else y @ x.T
    eigenvalues = np.linalg.eigvalsh(product @ product.T)
    delta = mean_a - mean_b
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    return float(delta @ delta + (x * x).sum() + (y * y).sum() - 2.0 * cross)


def fd_infinity(
    reference: np.ndarray, sample: np.ndarray, points: int = 15, seed: int = 0
) -> tuple[float, float] | None:
    """FD∞, the Fréchet distance for infinitely many samples: intercept of FD over 1/N (Chong & Forsyth 2020).

    The reference is not extrapolated, so its own share of the bias stays: compare with the real-vs-real distance.

    Args:
        reference: Real features [M, d].
        sample: Features [N, d].
        points: Subsample sizes, in even steps from N/4 (2d at least) to N; three subsamples of each.
        seed: Seed of the subsamples.

    Returns:
        The intercept, which is noisy and may be below 0, and its standard error (of the subsampling alone, so a lower
        bound); None where there are fewer than 4d samples.
    """
    n, dim = sample.shape
    if n < 2 * RANK_RULE * dim or len(reference) < RANK_RULE * dim:
        return None
    rng = np.random.default_rng([seed, 41])
    fixed = FeatureStatistics.of(reference)
    root = psd_root(fixed.cov)
    sizes = np.repeat(np.linspace(max(RANK_RULE * dim, n // 4), n, points).astype(int), 3)
    values = []
    for size in sizes:
        part = FeatureStatistics.of(sample[rng.choice(n, size, replace=False)])
        values.append(frechet(part.mean, part.cov, fixed.mean, fixed.cov, root_b=root))
    line = stats.linregress(1.0 / sizes, values)
    return float(line.intercept), float(line.intercept_stderr)


def project(features: np.ndarray, mean: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Coordinates of features [N, d] around a mean [d] along directions [d, k], float64 [N, k], block by block."""
    out = np.empty((len(features), directions.shape[1]))
    for part in blocks(len(features)):
        out[part] = (np.asarray(features[part], np.float64) - mean) @ directions
    return out


def scatter(features: np.ndarray, mean: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Σ w·(x − mean)·(x − mean)ᵀ over features [N, d], float64 [d, d], block by block; every w is 1 if not given."""
    total = np.zeros((features.shape[1],) * 2)
    for i, part in enumerate(blocks(len(features))):
        x = np.asarray(features[part], np.float64) - mean
        y = x if weights is None else x * weights[part, None]
        total = y.T @ x if i == 0 else total + y.T @ x
    return total


@dataclass(frozen=True)
class Basis:
    """Principal directions of real training features.

    Args:
        mean: [d].
        components: Orthonormal rows by falling variance, [d, d].
    """

    mean: np.ndarray
    components: np.ndarray

    def project(self, features: np.ndarray, dims: int) -> np.ndarray:
        """First ``dims`` coordinates of each feature vector, float64 [N, dims]."""
        return project(features, self.mean, self.components[:dims].T)


def pca_basis(features: np.ndarray) -> Basis:
    """All principal directions of [N, d] features, each with its largest entry positive so that the sign is fixed."""
    statistics = FeatureStatistics.of(features)
    vectors = np.linalg.eigh(statistics.cov)[1][:, ::-1].T
    largest = np.abs(vectors).argmax(axis=1)
    signs = np.sign(vectors[np.arange(len(vectors)), largest])
    return Basis(statistics.mean, vectors * signs[:, None])


def full_rank(n: int, dim: int) -> bool:
    """Whether a Fréchet distance over ``dim`` features may be reported with ``n`` samples in the smaller set."""
    return n >= RANK_RULE * dim


def pca_dims(n: int, dim: int) -> int:
    """Dimensions left after PCA for ``n`` samples in the smaller set: at most n/4, at least 1."""
    return max(1, min(dim, n // PCA_RULE))
