"""Two published downstream protocols, as close as frozen features or a small network allow.

Where they differ from ours they are kept as they are: scores per patch, spread over seeds instead of patients, no
matching of counts between arms. They are there for comparison with published numbers, not for claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger, progress
from latent_medi.evaluation.cohort.combinations import among
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.downstream.classification_scores import quiet_balanced, site_averaged
from latent_medi.evaluation.downstream.classifiers import Learner
from latent_medi.evaluation.downstream.training_sets import Lesson
from latent_medi.evaluation.settings import EvaluateSettings, HistoDiffusionProtocolSettings, MediProtocolSettings
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.statistics.linear_probe import MAX_ITER, fit_quietly

log = get_logger(__name__)

PROTOCOLS = ("default", "medi", "histodiffusion")


def mean_and_sem(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and its standard error, s/√n with n − 1 in s; None for the error of a single seed."""
    n = len(values)
    sem = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(np.mean(values)), "sem": sem, "by_seed": [float(v) for v in values]}


def medi_protocol(
    study: Study, real: np.ndarray, arms: Mapping[str, np.ndarray], settings: MediProtocolSettings
) -> dict[str, Any]:
    """MeDi's: real patches of k random sites, at most ``max_real`` per class, and ⌊ratio·n⌋ synthetic ones.

    LogisticRegression with balanced classes and C = 1 on unscaled features; test on all test patches. A seed draws the
    same sites and real patches for every arm and ratio; synthetic patches are drawn without repeats from all that an
    arm has, so there are fewer where it runs out.

    Args:
        study: The cohort.
        real: Features of every real row, [N, d].
        arms: Features of every sample of each synthetic dataset.
        settings: The sweep.

    Returns:
        ``test`` (patches, patients, sites), ``settings``, ``not_converged`` (fits), and ``rows``: ``arm`` ("real"
        where the ratio is 0), ``sites``, ``max_real``, ``ratio``, ``n_real`` and ``n_synthetic`` by seed, and mean,
        standard error and values by seed of ``balanced_accuracy``, ``site_averaged_balanced_accuracy`` and ``mcc``.

    Raises:
        UserError: More sites than there are in training, a negative number, or no seed.
    """
    names = np.unique(study.site_labels[study.train])
    _check(settings.seeds, [*settings.ratios, *settings.max_real, *settings.sites], "medi_protocol")
    if max(settings.sites, default=0) > len(names):
        raise UserError(f"medi_protocol.sites asks for {max(settings.sites)} sites; training has {len(names)}.")
    labels = study.class_labels
    sites = study.site_labels[study.test]
    truth = labels[study.test]
    jobs = [
        (arm, k, most, ratio)
        for k in settings.sites
        for most in settings.max_real
        for ratio in settings.ratios
        for arm in (["real"] if ratio == 0 else arms)
    ]
    rows, stuck = [], 0
    for arm, k, most, ratio in progress(jobs, desc="MeDi's protocol", unit="setting"):
        values: dict[str, list[float]] = {"balanced_accuracy": [], "site_averaged_balanced_accuracy": [], "mcc": []}
        n_real, n_synthetic = [], []
        for seed in range(settings.seeds):
            chosen = medi_real(study, k, most, seed)
            x, y = real[chosen], labels[chosen]
            if arm != "real":
                pool = study.synthetic[arm].index[study.class_field].to_numpy(str)
                rng = np.random.default_rng([seed, 37])
                extra = rng.permutation(len(pool))[: int(ratio * len(chosen))]
                x, y = np.concatenate([x, arms[arm][extra]]), np.concatenate([y, pool[extra]])
            n_real.append(len(chosen))
            n_synthetic.append(len(y) - len(chosen))
            if len(np.unique(y)) < 2:
                raise UserError(f"MeDi's protocol with {k} sites and seed {seed} has one class to learn from only.")
            model = LogisticRegression(class_weight="balanced", max_iter=MAX_ITER)
            stuck += not fit_quietly(model, np.asarray(x, np.float64), y)
            found = model.predict(np.asarray(real[study.test], np.float64)).astype(str)
            values["balanced_accuracy"].append(quiet_balanced(truth, found))
            values["site_averaged_balanced_accuracy"].append(site_averaged(truth, found, sites))
            values["mcc"].append(float(matthews_corrcoef(truth, found)))
        rows.append(
            {"arm": arm, "sites": k or len(names), "max_real": most, "ratio": ratio, "n_real": n_real,
             "n_synthetic": n_synthetic, **{name: mean_and_sem(v) for name, v in values.items()}}
        )  # fmt: skip
    return {"test": _test_record(study), "settings": vars(settings), "not_converged": stuck, "rows": rows}


def medi_real(study: Study, sites: int, max_real: int, seed: int) -> np.ndarray:
    """Training rows of ``sites`` random sites (0: all), at most ``max_real`` per class (0: all), ascending."""
    rng = np.random.default_rng([seed, 31])
    where = study.site_labels
    names = np.unique(where[study.train])
    kept = names[rng.permutation(len(names))[: sites or len(names)]]
    rows = among(study.train, np.isin(where, kept))
    if not max_real:
        return rows
    labels = study.class_labels[rows]
    parts = [rng.permutation(rows[labels == value])[:max_real] for value in np.unique(labels)]
    return np.sort(np.concatenate(parts))


def histodiffusion_protocol(
    study: Study,
    real: np.ndarray,
    arms: Mapping[str, np.ndarray],
    settings: HistoDiffusionProtocolSettings,
    learner: Learner,
) -> dict[str, Any]:
    """HistoDiffusion's: all real training patches and 50, 100 or 300 % synthetic ones per class, selected or random.

    The selected come from a selection's choice, in the order of its score, lowest first, without repeats; the random
    ones from its control, which is as large, or from all samples if it has none. Where a class has fewer than asked,
    all are taken, and ``n_synthetic`` says how many. Scores are over all test patches at once (the released code
    averages over batches).

    Args:
        study: The cohort.
        real: Features of every real row, [N, d].
        arms: Features of every sample of each synthetic dataset.
        settings: The sweep.
        learner: The classifier, the same as in the comparison.

    Returns:
        ``test``, ``settings``, and ``rows``: ``arm``, ``choice`` ("none", "selected" or "random"), ``percent``,
        ``n_real``, ``n_synthetic``, and mean, standard error and values by seed of ``accuracy``, ``f1``,
        ``sensitivity`` and ``specificity`` (macro averages).

    Raises:
        UserError: A dataset has no such selection, a negative number, or no seed.
    """
    _check(settings.seeds, settings.percent, "histodiffusion_protocol")
    labels = study.class_labels
    x, y = real[study.train], labels[study.train]
    counts = {value: int((y == value).sum()) for value in np.unique(y).tolist()}
    pools = {name: _pools(study.synthetic[name], settings.selection) for name in arms}
    jobs: list[tuple[str, str, float]] = [("real", "none", 0.0)]
    jobs += [(a, c, p) for a in arms for p in settings.percent for c in ("selected", "random")]
    rows = []
    for arm, choice, percent in progress(jobs, desc="HistoDiffusion's protocol", unit="setting"):
        values: dict[str, list[float]] = {"accuracy": [], "f1": [], "sensitivity": [], "specificity": []}
        n_synthetic = 0
        # Only a draw or a network's start differs between seeds.
        for seed in range(settings.seeds if choice == "random" or learner.random else 1):
            lesson = Lesson(x, y)
            if arm != "real":
                made = study.synthetic[arm].index[study.class_field].to_numpy(str)
                asked = {value: int(percent / 100 * n) for value, n in counts.items()}
                extra = _first_per_class(pools[arm][choice](seed), made, asked)
                n_synthetic = len(extra)
                lesson = Lesson(np.concatenate([x, arms[arm][extra]]), np.concatenate([y, made[extra]]))
            found = learner.learn(lesson, seed).predicted
            for name, value in classification_scores(labels[study.test], found).items():
                values[name].append(value)
        rows.append(
            {"arm": arm, "choice": choice, "percent": percent, "n_real": len(y), "n_synthetic": n_synthetic,
             **{name: mean_and_sem(v) for name, v in values.items()}}
        )  # fmt: skip
    return {"test": _test_record(study), "settings": vars(settings), **learner.about, "rows": rows}


def classification_scores(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1, sensitivity and specificity averaged over the classes present in the truth."""
    labels = np.unique(truth)
    everything = np.union1d(labels, found)
    table = confusion_matrix(truth, found, labels=everything)
    right, asked, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    present = np.isin(everything, labels)
    negatives = table.sum() - asked
    specificity = np.divide(
        negatives - (said - right), negatives, out=np.full(len(everything), np.nan), where=negatives > 0
    )
    return {
        "accuracy": float(accuracy_score(truth, found)),
        "f1": float(f1_score(truth, found, labels=labels, average="macro", zero_division=0)),
        "sensitivity": float((right[present] / asked[present]).mean()),
        "specificity": float(np.mean(specificity[present])),
    }


def _pools(arm: SyntheticSet, selection: str) -> dict[str, Callable[[int], np.ndarray]]:
    """Positions of an arm's samples, selected best first, and random in an order by seed."""
    index = arm.index
    known = list(arm.dataset.info.get("selections", {}))
    if not known:
        raise UserError(
            f"{arm.dataset.folder} has no selection, and HistoDiffusion's protocol compares one with chance.",
            "Make one with `latent-medi select`.",
        )
    name = selection or known[0]
    column = f"{SELECTED_PREFIX}{name}"
    if column not in index:
        raise UserError(f"{arm.dataset.folder} has no selection {name!r}; {nearest(name, known)}.")
    chosen = np.flatnonzero(index[column].to_numpy(bool))
    if f"{column}_score" in index:
        scores = index[f"{column}_score"].to_numpy(float)[chosen]
        chosen = chosen[np.argsort(scores, kind="stable")]  # NaN goes last
    control = f"{column}_control"
    others = np.flatnonzero(index[control].to_numpy(bool)) if control in index else np.arange(len(index))
    return {
        "selected": lambda seed: chosen,
        "random": lambda seed: np.random.default_rng([seed, 41]).permutation(others),
    }


def _first_per_class(rows: np.ndarray, labels: np.ndarray, asked: Mapping[str, int]) -> np.ndarray:
    parts = [rows[labels[rows] == value][:n] for value, n in asked.items()]
    return np.concatenate([np.zeros(0, int), *parts])


def _test_record(study: Study) -> dict[str, Any]:
    table = study.index.iloc[study.test]
    return {
        "n_patches": len(table),
        "n_patients": int(table["patient"].nunique()),
        "sites": sorted(set(table[study.site_field].astype(str))),
    }


def check_protocol(settings: EvaluateSettings) -> None:
    """Refuse sizes of the protocol asked for that cannot be followed.

    Raises:
        UserError: A negative number, or no seed.
    """
    medi, histo = settings.medi_protocol, settings.histodiffusion_protocol
    if settings.downstream_protocol == "medi":
        _check(medi.seeds, [*medi.ratios, *medi.max_real, *medi.sites], "medi_protocol")
    if settings.downstream_protocol == "histodiffusion":
        _check(histo.seeds, histo.percent, "histodiffusion_protocol")


def _check(seeds: int, numbers: Sequence[float], where: str) -> None:
    if seeds < 1:
        raise UserError(f"{where}.seeds must be 1 or more.")
    if any(n < 0 for n in numbers):
        raise UserError(f"{where} has a negative number.", "Counts, ratios and percentages start at 0.")
