"""What each value of each field adds to a feature, by least squares, every patient weighing the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.statistics.distances import BLOCK


def patient_weights(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Weight of each row such that a label's rows sum to 1 and its patients weigh the same. float64 [N]."""
    pairs, pair = np.unique(np.stack([labels.astype(str), patients.astype(str)], 1), axis=0, return_inverse=True)
    per_pair = np.bincount(pair.reshape(-1))
    names, of_pair = np.unique(pairs[:, 0], return_inverse=True)
    per_label = np.bincount(of_pair, minlength=len(names))
    return 1.0 / (per_pair * per_label[of_pair])[pair.reshape(-1)]


@dataclass
class Effects:
    """What each value of each field adds to a feature, as far as effects add up.

    Args:
        values: Values by field, in order.
        vectors: Their effects by field, float32 [values + 1, d]; the last is that of an unknown value, 0.
    """

    values: dict[str, list[str]]
    vectors: dict[str, np.ndarray]

    def take_out(self, features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
        """The features less the effects of the stated values of some fields, float32 [N, d].

        Args:
            features: [N, d].
            index: Their rows, with the columns of ``fields``.
            fields: What to take out.
        """
        result = np.array(features, np.float32)
        for name in fields:
            codes = pd.Categorical(index[name], self.values[name]).codes  # -1, the last vector, for anything else
            for start in range(0, len(result), BLOCK):
                result[start : start + BLOCK] -= self.vectors[name][codes[start : start + BLOCK]]
        return result


def additive_effects(features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> Effects:
    """Least squares of real features on the values of all fields at once, every patient weighing the same.

    A combination without training patches is then the sum of its parts: what a site does to a patch is learned from
    the classes that it has. The effects of a field's values sum to 0. Fields that the data cannot tell apart share
    their effect (the solution of least norm).

    Args:
        features: [N, d].
        index: ``patient`` and the columns of ``fields``, [N].
        fields: Categorical fields.
    """
    patients = index["patient"].to_numpy(str)
    weights = patient_weights(np.full(len(patients), ""), patients)
    values = {name: sorted(set(index[name]) - {UNKNOWN_WORD}) for name in fields}
    coded = {name: pd.Categorical(index[name], values[name]).codes for name in fields}
    size = 1 + sum(map(len, values.values()))
    normal, moments = np.zeros((size, size)), np.zeros((size, features.shape[1]))
    for start in range(0, len(features), BLOCK):
        part = slice(start, start + BLOCK)
        blocks = [np.ones((len(weights[part]), 1))]
        blocks += [(coded[name][part, None] == np.arange(len(values[name]))).astype(np.float64) for name in fields]
        design = np.concatenate(blocks, axis=1)
        weighted = design * weights[part, None]
        normal += weighted.T @ design
        moments += weighted.T @ features[part].astype(np.float64)
    solution = np.linalg.lstsq(normal, moments, rcond=1e-10)[0][1:]
    vectors: dict[str, np.ndarray] = {}
    for name in fields:
        own, solution = np.split(solution, [len(values[name])])
        own = own - own.mean(axis=0) if len(own) else own
        vectors[name] = np.concatenate([own, np.zeros((1, features.shape[1]))]).astype(np.float32)
    return Effects(values, vectors)
