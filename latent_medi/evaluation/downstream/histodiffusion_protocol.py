"""HistoDiffusion's downstream protocol, as close as frozen features or a small network allow.

Its differences from the default comparison are kept: scores per patch, spread over seeds instead of patients, and other
numbers of patches in each training set. It serves the comparison with published numbers, not claims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.evaluation.cohort.study import SyntheticSet
from latent_medi.evaluation.downstream.classification_scores import scored_patches
from latent_medi.evaluation.downstream.classifiers import Classifier
from latent_medi.evaluation.downstream.records import HistoDiffusionProtocol, HistoDiffusionProtocolRow
from latent_medi.evaluation.downstream.registry import REAL
from latent_medi.evaluation.downstream.training_sets import ProtocolSources, TrainingSet
from latent_medi.evaluation.settings import HistoDiffusionProtocolSettings
from latent_medi.shards.format.selections import choice_order
from latent_medi.statistics.confusion import macro_scores
from latent_medi.statistics.seeds import MeanOverSeeds


def histodiffusion_protocol(
    sources: ProtocolSources, settings: HistoDiffusionProtocolSettings, classifier: Classifier
) -> HistoDiffusionProtocol:
    """HistoDiffusion's: all real training patches and 50, 100 or 300 % synthetic ones per class, selected or random.

    The selected patches are a selection's, in the order of its score, lowest first, without repeats; the random ones
    are its control's, which has as many, or those of the whole set if there is no control. Where a class has too few
    patches, all are taken, and ``n_synthetic`` says how many. Scores are over all test patches at once (the released
    code averages over batches).

    Args:
        sources: Patches and samples.
        settings: The sweep.
        classifier: The classifier, the same as in the comparison.

    Raises:
        UserError: A dataset has no such selection.
    """
    study, synthetic = sources.study, sources.synthetic
    x, y = sources.real[study.train], study.class_labels[study.train]
    counts = {value: int((y == value).sum()) for value in np.unique(y).tolist()}
    pools = {name: _pools(study.synthetic[name], settings.selection) for name in synthetic}
    jobs: list[tuple[str, str, float]] = [(REAL.name, "none", 0.0)]
    jobs += [(name, c, p) for name in synthetic for p in settings.percent for c in ("selected", "random")]
    rows = []
    for name, choice, percent in progress(jobs, desc="HistoDiffusion's protocol", unit="settings"):
        scores = []
        n_synthetic = 0
        # Only a draw, or a network's initial weights, differ between seeds.
        for seed in range(settings.seeds if choice == "random" or classifier.random else 1):
            training_set = TrainingSet(x, y)
            if name in synthetic:
                labels = study.synthetic[name].index[study.class_field].to_numpy(str)
                wanted = {value: int(percent / 100 * n) for value, n in counts.items()}
                extra = _first_per_class(pools[name][choice](seed), labels, wanted)
                n_synthetic = len(extra)
                features = np.concatenate([x, synthetic[name][extra]])
                training_set = TrainingSet(features, np.concatenate([y, labels[extra]]))
            scores.append(
                macro_scores(study.class_labels[study.test], classifier.fit_predict(training_set, seed).predicted)
            )
        means = [MeanOverSeeds.of(values) for values in zip(*scores, strict=True)]
        rows.append(HistoDiffusionProtocolRow(name, choice, percent, len(y), n_synthetic, *means))  # type: ignore[arg-type]
    return HistoDiffusionProtocol(sources.fingerprint, scored_patches(study, study.test), classifier.record, rows)


def _pools(samples: SyntheticSet, selection: str) -> dict[str, Callable[[int], np.ndarray]]:
    """By choice a function that gives, for a seed, positions of samples in the order in which they are taken."""
    folder, known = samples.dataset.folder, list(samples.dataset.info.get("selections", {}))
    if not known:
        raise UserError(
            f"{folder} has no selection, which HistoDiffusion's protocol compares with a random choice.",
            "Make one with `latent-medi select`.",
        )
    name = selection or known[0]
    return {
        "selected": lambda seed: choice_order(samples.index, str(folder), name, "selected", seed),
        "random": lambda seed: choice_order(samples.index, str(folder), name, "random", seed),
    }


def _first_per_class(rows: np.ndarray, labels: np.ndarray, wanted: Mapping[str, int]) -> np.ndarray:
    parts = [rows[labels[rows] == value][:n] for value, n in wanted.items()]
    return np.concatenate([np.zeros(0, int), *parts])
