"""Whether a generator repeats its training patients: copies by their pixels, and nearness in feature space.

Every number is compared with that of real patients that the model has not seen: some of their patches are near to
training patches, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats
from sklearn.cluster import KMeans

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger, progress
from latent_medi.evaluation.cohort.combinations import describe
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.records import (
    CombinationCopies,
    CopyTest,
    ListedPair,
    Memorisation,
    SetMemorisation,
)
from latent_medi.features.pixel_copies import SIDE, VIEWS, copy_scores, invariants, small_patches
from latent_medi.shards.checking.likeness import LEAST_LIKENESS, likeness
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics import left_out
from latent_medi.statistics.distances import project, scatter
from latent_medi.statistics.intervals import SHARE, Estimate, estimate, jackknife, share_of_samples
from latent_medi.statistics.neighbours import nearest_neighbours
from latent_medi.statistics.subsampling import patients_in_turn

log = get_logger(__name__)

CANDIDATES = 20
"""Training patches that each patch is compared with pixel by pixel."""
LEAST_COPY = 0.6
"""A correlation below this is no copy, however few held-out patches there are to set the threshold by."""
_QUANTILE = 0.999
_SPREADS = 8.55
"""Quartile ranges above the median, of Fisher's z, beyond which one of a million largest correlations would lie
(Gumbel's distribution)."""
_QUARTILES_FROM = 20
_LISTED = 24
_CALIBRATION = 4000
_MIN_BANK = 20
_CT_DIMS, _CT_CLUSTERS, _CT_LEAST = 64, 8, 20


@dataclass
class Copies:
    """Which patches are copies of training patches, as far as pixels tell.

    Args:
        threshold: Correlation above which a patch is a copy.
        scores: Correlation with the most similar training patch, by synthetic set (each of its rows) and for
            "held_out" (the study's reference).
        partner: Real row of that training patch, likewise.
        view: How it is turned, an index of ``VIEWS``, likewise.
        n_threshold: Probe patches that the threshold comes from.
        duplicates: Real patches of other patients that show the same picture as a training patch: of the "probe" part,
            left out of the threshold, and of "held_out", not counted as flagged.
    """

    threshold: float
    scores: dict[str, np.ndarray]
    partner: dict[str, np.ndarray]
    view: dict[str, np.ndarray]
    n_threshold: int = 0
    duplicates: dict[str, np.ndarray] = field(default_factory=dict)


class CopyFinder:
    """Finds copies of training patches.

    Args:
        bank: Training patches, made small (:func:`latent_medi.features.pixel_copies.small_patches`), [M, S, S].
        others: Patches of other real patients, [N, S, S]: no more than one in a thousand of these is called a copy.
        device: Torch device of the correlations.
        one_picture: Takes positions of others and of the training patches most like them, and returns which pairs are
            the same picture. Such others do not count in the threshold, which is about different pictures.

    Attributes:
        threshold: See :func:`copy_threshold`.
        duplicates: Which of the others are the same picture as a training patch, bool [N].
    """

    def __init__(
        self,
        bank: np.ndarray,
        others: np.ndarray,
        device: str = "cpu",
        one_picture: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.bank, self.table, self.device = bank, invariants(bank), device
        self.duplicates = np.zeros(len(others), bool)
        scores = np.zeros(0, np.float32)
        if len(others):
            scores, partner, _ = self.likeness(others)
            if one_picture is not None:
                alike = np.flatnonzero(scores > LEAST_COPY)
                self.duplicates[alike] = one_picture(alike, partner[alike])
        self.threshold = copy_threshold(scores[~self.duplicates])

    def likeness(self, small: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correlation of each patch with the most similar training patch [N], that one's row in the bank [N], and how
        it is turned, an index of ``VIEWS`` [N]."""
        candidates = nearest_neighbours(invariants(small), self.table, CANDIDATES, device=self.device)[1]
        return copy_scores(small, self.bank, candidates, self.device)


def copy_threshold(scores: np.ndarray) -> float:
    """The correlation above which a patch is a copy, from those of patches that are none.

    One in a thousand of them exceeds it, but it is no larger than what their quartiles predict for one in a million: a
    few copies among them, such as real patches that occur twice and shifted, must not hide all others.

    Args:
        scores: Largest correlation of each patch with a training patch, [N]; of no patch, the threshold is the least.
    """
    if not len(scores):
        return LEAST_COPY
    found = float(np.quantile(scores, _QUANTILE))
    if len(scores) >= _QUARTILES_FROM:
        low, middle, high = np.quantile(np.arctanh(np.clip(scores, -1 + 1e-6, 1 - 1e-6)), [0.25, 0.5, 0.75])
        found = min(found, float(np.tanh(middle + _SPREADS * (high - low))))
    return max(LEAST_COPY, found)


def find_copies(study: Study, device: str = "cpu", batch: int = 256) -> Copies:
    """Compare every synthetic patch, and every held-out one, with the training patches that may be its original.

    The threshold comes from the study's probe part, without the patches in it that show the same picture as a training
    patch; the record also has the share of the reference's patches that it flags.

    Args:
        study: The cohort.
        device: Torch device of the correlations.
        batch: Patches that are read at once.
    """
    probe = study.probe
    if len(probe) > _CALIBRATION:
        probe = np.sort(np.random.default_rng(7).choice(probe, _CALIBRATION, replace=False))
    finder = CopyFinder(
        _small(study.real, study.shown, batch),
        _small(study.real, probe, batch),
        device,
        lambda places, partners: _one_picture(study.real, probe[places], study.shown[partners], batch),
    )
    copies = Copies(finder.threshold, {}, {}, {}, int((~finder.duplicates).sum()), {"probe": finder.duplicates})
    sources = {s.name: (s.dataset, s.rows) for s in study.synthetic.values()}
    for name, (dataset, rows) in {**sources, "held_out": (study.real, study.reference)}.items():
        score, position, view = finder.likeness(_small(dataset, rows, batch))
        copies.scores[name], copies.partner[name], copies.view[name] = score, study.shown[position], view
    flagged = np.flatnonzero(copies.scores["held_out"] > copies.threshold)
    copies.duplicates["held_out"] = np.zeros(len(study.reference), bool)
    copies.duplicates["held_out"][flagged] = _one_picture(
        study.real, study.reference[flagged], copies.partner["held_out"][flagged], batch
    )
    return copies


def _one_picture(real: PatchDataset, rows: np.ndarray, others: np.ndarray, batch: int) -> np.ndarray:
    """Which pairs of rows are one picture, turned or encoded again, bool [N]."""
    same = np.zeros(len(rows), bool)
    for start in progress(range(0, len(rows), batch), len(rows), "patches that may be one picture", "pairs", batch):
        part = slice(start, start + batch)
        pairs = zip(real.read(rows[part]), real.read(others[part]), strict=True)
        same[part] = [likeness(one, other) >= LEAST_LIKENESS for one, other in pairs]
    return same


def _small(dataset: PatchDataset, rows: np.ndarray, batch: int) -> np.ndarray:
    batches = dataset.iterate(rows, batch)
    shown = progress(batches, len(rows), f"pixels of {dataset.name}", "patches", batch)
    parts = [small_patches(images) for _, images in shown]
    return np.concatenate(parts) if parts else np.zeros((0, SIDE, SIDE), np.float32)


def memorisation(
    study: Study,
    features: Features,
    copies: Copies,
    fingerprint: str,
    seed: int,
    names: bool = False,
    device: str = "cpu",
) -> Memorisation:
    """The record of one encoder.

    Args:
        study: The cohort.
        features: Features of one encoder.
        copies: From :func:`find_copies`; they do not depend on the encoder.
        fingerprint: The encoder's.
        seed: Seed of the subsamples and of the clusters of C_T.
        names: Whether listed pairs have the names of patients and training patches, instead of numbers.
        device: Torch device of the distances.
    """
    flagged = (copies.scores["held_out"] > copies.threshold) & ~copies.duplicates["held_out"]
    duplicates = {part: int(mask.sum()) for part, mask in copies.duplicates.items()}
    patients = study.patients[study.reference]
    authentic = _Authentic(study, features, device)
    held_out = features.real[study.reference]
    rule = (
        "A copy correlates with a training patch, turned, mirrored or shifted by up to an eighth of its side, more "
        f"than {_QUANTILE:.1%} of the patches of other real patients do, and by at least {LEAST_COPY:g}."
    )
    if duplicates["probe"]:
        rule += f" {duplicates['probe']} of these patches show the same picture as a training patch and do not count."
    return Memorisation(
        fingerprint=fingerprint,
        rule=rule,
        threshold=copies.threshold,
        threshold_patches=copies.n_threshold,
        real_duplicates=duplicates,
        held_out_flagged=_share(flagged, patients),
        held_out_auth_pct=estimate(None, 0, 0) if authentic.alone else _share(authentic.of(held_out), patients, 100.0),
        synthetic={
            s.name: _set_memorisation(study, features, copies, s, authentic, seed, names)
            for s in study.synthetic.values()
            if len(s.rows)
        },
    )


def _set_memorisation(
    study: Study,
    features: Features,
    copies: Copies,
    synthetic: SyntheticSet,
    authentic: _Authentic,
    seed: int,
    names: bool,
) -> SetMemorisation:
    copied = copies.scores[synthetic.name] > copies.threshold
    samples = features.synthetic[synthetic.name]
    train, held_out = features.real[study.train], features.real[study.reference]
    hits = None if authentic.alone else int(authentic.of(samples).sum())
    return SetMemorisation(
        copies=int(copied.sum()),
        copy_rate=share_of_samples(int(copied.sum()), len(synthetic.rows)),
        auth_pct=estimate(None, 0, 0) if hits is None else share_of_samples(hits, len(samples), 100.0),
        ct=_copy_test(train, held_out, samples, seed, authentic.device),
        combinations=_combinations(study, features, synthetic, copied, seed, authentic.device),
        listed=_listed(study, copies, synthetic, names),
    )


class TooManyCopies(UserError):
    """More copies of training patches than are allowed; the metrics are written."""


def check_copy_rate(record: Mapping[str, Memorisation], most: float) -> None:
    """Refuse a generator that copies more than it may.

    Args:
        record: The section of the metrics, by encoder.
        most: Largest share of copies allowed, 0 to 1.

    Raises:
        TooManyCopies: Names the synthetic set, how many copies there are, and the first pair.
    """
    for found in record.values():
        for name, one in found.synthetic.items():
            rate = one.copy_rate
            if rate.value is not None and rate.value > most:
                first = one.listed[0]
                raise TooManyCopies(
                    f"{one.copies} of {rate.n_patches} patches of {name} are copies of training patches "
                    f"({rate.value:.2%}, allowed {most:.2%}); the most alike is {first.synthetic_key} of row "
                    f"{first.train_row} of the real dataset ({first.patient}).",
                    "Do not share these patches or this model. metrics.json lists the pairs; train with more patients "
                    "or for fewer images, or drop copies with `latent-medi select`.",
                )


def _share(hits: np.ndarray, patients: np.ndarray, scale: float = 1.0) -> Estimate:
    """The share of patches, bool [N], that are hits, times ``scale``, with its interval over patients."""
    names, codes = np.unique(patients, return_inverse=True)
    found = left_out.mean(hits.astype(float), codes)
    share = estimate(found.value, len(hits), len(names), jackknife(found.left_out), SHARE)
    return share.times(scale)


class _Authentic:
    """AuthPct: a patch is authentic if its nearest training patch has a nearer training patch of another patient.

    The published rule takes any other training patch. Patches of one slide are nearly the same, so almost everything
    would be called authentic.
    """

    def __init__(self, study: Study, features: Features, device: str = "cpu") -> None:
        self.train, self.device = features.real[study.train], device
        names, codes = np.unique(study.patients[study.train], return_inverse=True)
        self.alone = len(names) < 2  # nobody else's patch could be nearer
        self.own = nearest_neighbours(self.train, self.train, 1, [(codes, codes)], device)[0][:, 0]

    def of(self, samples: np.ndarray) -> np.ndarray:
        """bool [N]."""
        distance, position = nearest_neighbours(samples, self.train, 1, device=self.device)
        result: np.ndarray = distance[:, 0] > self.own[position[:, 0]]
        return result


def _copy_test(
    train: np.ndarray, held_out: np.ndarray, samples: np.ndarray, seed: int, device: str = "cpu"
) -> CopyTest:
    """Whether samples are nearer to training patches than held-out ones are.

    Distances to the nearest training patch of the same cluster (k-means on training features) are ranked against those
    of held-out patches (Mann–Whitney, as a z-score); the mean over clusters is weighted by held-out patches. The
    z-score takes patches for independent: its sign has a meaning, its size overstates the certainty.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    dims = min(_CT_DIMS, train.shape[1])
    directions = np.linalg.eigh(scatter(train, mean))[1][:, ::-1][:, :dims]
    x, real, made = (project(part, mean, directions) for part in (train, held_out, samples))
    clusters = KMeans(min(_CT_CLUSTERS, max(1, len(x) // 100)), n_init=3, random_state=seed).fit(x)
    labels = [clusters.predict(part) for part in (x, real, made)]
    total, weight, left_out = 0.0, 0, 0
    for cluster in range(clusters.n_clusters):
        bank, others, own = (part[label == cluster] for part, label in zip((x, real, made), labels, strict=True))
        if min(len(bank), len(others), len(own)) < _CT_LEAST:
            left_out += len(own)
            continue
        a, b = (nearest_neighbours(part, bank, 1, device=device)[0][:, 0] for part in (own, others))
        u = stats.mannwhitneyu(a, b).statistic
        n, m = len(a), len(b)
        total += m * (u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)
        weight += m
    return CopyTest(float(total / weight) if weight else None, len(samples), left_out)


def _combinations(
    study: Study, features: Features, synthetic: SyntheticSet, copied: np.ndarray, seed: int, device: str
) -> list[CombinationCopies]:
    """Per combination of class and site, as far as the model was conditioned on them: how near samples are to training
    and to held-out patients.

    Both banks have as many patches, from as many patients where possible. Samples of a generator that has learned the
    combination and not its patients are as near to one as to the other.
    """
    fields = [f for f in (study.class_field, study.site_field) if f in synthetic.fields]
    result = []
    for values, rows in sorted(synthetic.index.groupby(fields, observed=True).indices.items()):
        combination = dict(zip(fields, values if isinstance(values, tuple) else (values,), strict=True))
        train, held_out = (study.rows_of(part, combination) for part in (study.train, study.reference))
        record = CombinationCopies(
            describe(combination), combination, len(rows), int(copied[rows].sum()), None, None, None, 0
        )
        n = min(len(train), len(held_out))
        if n >= _MIN_BANK:
            rng = np.random.default_rng([seed, 23])
            samples = features.synthetic[synthetic.name][rows]
            distances = []
            for part in (train, held_out):
                bank = part[patients_in_turn(study.patients[part], n, rng, last_by_name=True)]
                distances.append(nearest_neighbours(samples, features.real[bank], 1, device=device)[0][:, 0])
            near, far = distances
            record = replace(
                record,
                median_train=float(np.median(near)),
                median_held_out=float(np.median(far)),
                nearer_train=float((near < far).mean()),
                n_bank=n,
            )
        result.append(record)
    return result


def _listed(study: Study, copies: Copies, synthetic: SyntheticSet, names: bool) -> list[ListedPair]:
    """The pairs most alike, copies or not, so that a person can see what the threshold means; every copy is listed.

    The training patch is a row of the real dataset's index, and its patient a number, the place among the sorted
    patients: only who has the dataset can find them.
    """
    score = copies.scores[synthetic.name]
    order = np.argsort(-score, kind="stable")
    most = max(_LISTED, int((score > copies.threshold).sum()))
    keys, partner = synthetic.index["key"].to_numpy(str), copies.partner[synthetic.name]
    real_keys, patients = study.index["key"].to_numpy(str), study.patients
    number = np.unique(patients, return_inverse=True)[1] + 1
    return [
        ListedPair(
            synthetic_key=str(keys[row]),
            train_row=int(partner[row]),
            patient=str(patients[partner[row]]) if names else f"patient {number[partner[row]]}",
            likeness=float(score[row]),
            view=VIEWS[copies.view[synthetic.name][row]],
            copy=bool(score[row] > copies.threshold),
            train_key=str(real_keys[partner[row]]) if names else None,
        )
        for row in order[:most]
    ]
