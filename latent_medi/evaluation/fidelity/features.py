"""Features of a cohort in one encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from latent_medi.statistics.distances import Basis


@dataclass
class Features:
    """Features of one encoder.

    Args:
        real: Of every row of the real index, [N, d].
        synthetic: Of every row of each synthetic set, by its name.
        basis: Principal directions of the real training features.
    """

    real: np.ndarray
    synthetic: Mapping[str, np.ndarray]
    basis: Basis
