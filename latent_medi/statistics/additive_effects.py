"""Additive effects of the values of fields on features, by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.statistics.distances import blocks


def patient_weights(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Weight of each row, float64 [N], such that the rows of a label sum to 1 and its patients weigh the same."""
    pairs, pair = np.unique(np.stack([labels.astype(str), patients.astype(str)], 1), axis=0, return_inverse=True)
    per_pair = np.bincount(pair.reshape(-1))
    names, of_pair = np.unique(pairs[:, 0], return_inverse=True)
    per_label = np.bincount(of_pair, minlength=len(names))
    return 1.0 / (per_pair * per_label[of_pair])[pair.reshape(-1)]


@dataclass
class Effects:
    """Additive effect of each value of each field on features.

    Args:
        values: Values by field, in order.
        vectors: Their effects by field, float32 [values + 1, d]; the last, 0, is that of an unknown value.
    """

    values: dict[str, list[str]]
    vectors: dict[str, np.ndarray]

    def subtract(self, features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
        """Features without the effects of some fields, float32 [N, d].

        Args:
            features: [N, d].
            index: Values of the fields for each row.
            fields: Fields whose effects are subtracted.
        """
        result = np.array(features, np.float32)
        for name in fields:
            codes = pd.Categorical(index[name], self.values[name]).codes  # -1, the last vector, for anything else
            for part in blocks(len(result)):
                result[part] -= self.vectors[name][codes[part]]
        return result


def least_squares(
    features: np.ndarray,
    codes: Sequence[np.ndarray],
    sizes: Sequence[int],
    weights: np.ndarray | None = None,
    intercept: bool = False,
) -> list[np.ndarray]:
    """Effects of the codes of several fields that together predict the features best, float64 [size, d] by field.

    Where the data cannot separate effects, the solution has the least norm, so that fields share them.

    Args:
        features: [N, d].
        codes: Per field the code of each row, [N], from 0; −1 has no effect.
        sizes: Number of codes of each field.
        weights: Weight of each row, [N]; all the same by default.
        intercept: Whether the features may have a constant part, which is not returned.
    """
    first = int(intercept)
    normal, moments = (np.zeros((first + sum(sizes), n)) for n in (first + sum(sizes), features.shape[1]))
    for part in blocks(len(features)):
        columns = [np.ones((len(features[part]), first))]
        columns += [(c[part, None] == np.arange(n)).astype(float) for c, n in zip(codes, sizes, strict=True)]
        design = np.concatenate(columns, axis=1)
        weighted = design if weights is None else design * weights[part, None]
        normal += weighted.T @ design
        moments += weighted.T @ features[part].astype(np.float64)
    solution = np.linalg.lstsq(normal, moments, rcond=1e-10)[0][first:]
    return np.split(solution, np.cumsum(sizes)[:-1])


def additive_effects(features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> Effects:
    """Effects of the values of all fields on real features, every patient weighing the same.

    A combination without training patches is then the sum of its parts: the effect of a site is learned from the
    classes that it has. The effects of a field's values sum to 0.

    Args:
        features: [N, d].
        index: ``patient`` and the columns of ``fields``, [N].
        fields: Categorical fields.
    """
    patients = index["patient"].to_numpy(str)
    weights = patient_weights(np.full(len(patients), ""), patients)
    values = {name: sorted(set(index[name]) - {UNKNOWN_WORD}) for name in fields}
    codes = [pd.Categorical(index[name], values[name]).codes for name in fields]
    sizes = [len(values[name]) for name in fields]
    vectors: dict[str, np.ndarray] = {}
    for name, own in zip(fields, least_squares(features, codes, sizes, weights, intercept=True), strict=True):
        centred = own - own.mean(axis=0) if len(own) else own
        vectors[name] = np.concatenate([centred, np.zeros((1, features.shape[1]))]).astype(np.float32)
    return Effects(values, vectors)
