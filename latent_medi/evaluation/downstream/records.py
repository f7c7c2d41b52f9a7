"""Results of the downstream stage, as ``metrics.json`` holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.seeds import MeanOverSeeds

Role = Literal["candidate", "baseline", "oracle", "ablation"]
"""An ablation trains on the patches of a synthetic set in another way; it has no part in the verdict."""


@dataclass(frozen=True)
class Accuracies:
    """Balanced accuracies, averaged over patients first. Intervals hold for other patients and other samples.

    Args:
        accuracy_shift: Over all classes at the sites that have a held-out combination.
        accuracy_in_distribution: At the other sites.
        accuracy_seen: Of test patches of combinations that training has.
        accuracy_unseen: Of test patches of held-out combinations.
    """

    accuracy_shift: Estimate
    accuracy_in_distribution: Estimate
    accuracy_seen: Estimate
    accuracy_unseen: Estimate


@dataclass(frozen=True)
class Differences:
    """Differences of two training sets in each of :class:`Accuracies`.

    Args:
        accuracy_shift, accuracy_in_distribution, accuracy_seen, accuracy_unseen: As there.
    """

    accuracy_shift: Difference
    accuracy_in_distribution: Difference
    accuracy_seen: Difference
    accuracy_unseen: Difference


@dataclass(frozen=True)
class SmallGroup:
    """A class × site group of too few patients.

    Args:
        group: Class and site.
        n_patients: Its patients.
    """

    group: str
    n_patients: int


@dataclass(frozen=True, kw_only=True)
class WorstGroup(Estimate):
    """The lowest accuracy, averaged over patients, of class × site groups with at least 10 patients.

    The interval is the named group's, at the level 1 − 0.05 / groups: the group was chosen because it is the lowest.

    Args:
        group: Class and site; null if there is no such group.
        n_groups: Groups with 10 patients.
        not_estimable: Groups with fewer.
    """

    group: str | None
    n_groups: int
    not_estimable: list[SmallGroup]


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of class probabilities.

    Args:
        n_units: Patches, slides or patients that are scored.
        balanced_accuracy: Mean recall over the classes.
        site_averaged_accuracy: Mean over sites of the balanced accuracy over the classes there.
        mcc: Matthews' correlation, −1 to 1.
        auroc: One class versus one other, mean over pairs (Hand & Till 2001).
        ece: Expected calibration error of the most probable class, 15 bins of equal width. Chance raises it where units
            are few, and its interval does not allow for that.
        brier: Squared error summed over classes, 0 to 2.
        worst_group: Accuracy in the worst class × site group.
    """

    n_units: int
    balanced_accuracy: Estimate
    site_averaged_accuracy: Estimate
    mcc: Estimate
    auroc: Estimate
    ece: Estimate
    brier: Estimate
    worst_group: WorstGroup


@dataclass(frozen=True)
class ScopedScores:
    """Scores over two scopes.

    Args:
        shift: Over test patches from sites that have a held-out combination.
        all: Over all test patches.
    """

    shift: ClassificationScores
    all: ClassificationScores


@dataclass(frozen=True)
class ScoresByUnit:
    """Scores per patch, and per slide and patient, whose probabilities are means over their patches.

    They are of the mean probabilities over repeats, and their intervals over patients alone.

    Args:
        patch, slide, patient: Scores of each unit.
    """

    patch: ScopedScores
    slide: ScopedScores
    patient: ScopedScores


@dataclass(frozen=True)
class CombinationScores:
    """Scores in one held-out combination.

    Args:
        name: The combination in words.
        combination: Value by field.
        recall: Share of its test patches that get its class.
        false_positive_rate: Share of the patches of other classes at its site that get its class.
    """

    name: str
    combination: dict[str, str]
    recall: Estimate
    false_positive_rate: Estimate


@dataclass(frozen=True, kw_only=True)
class TrainingSetResult(Accuracies):
    """Scores of the classifier that was trained on one training set.

    Args:
        by_repeat: ``accuracy_shift`` of each repeat.
        combinations: By held-out combination.
        scores: Scores of the mean class probabilities.
        role: Role of the training set.
        variant: The variant of most folds.
        folds: By variant the number of folds of test patients that it classifies: those for which it has the best
            ``accuracy_shift`` on the patients of all other folds. All scores are of these predictions.
        variants: ``accuracy_shift`` by variant.
        repeats: Draws of added patches, or seeds of the network.
        training_seeds: Training seeds of the model that the samples are of, over which the repeats go in turn.
        distinct_added: Number of different added patches by held-out combination, in the last repeat.
        n_training: Training patches.
        n_synthetic: Synthetic ones among them.
    """

    by_repeat: list[float | None]
    combinations: list[CombinationScores]
    scores: ScoresByUnit
    role: Role
    variant: str
    folds: dict[str, int]
    variants: dict[str, float | None]
    repeats: int
    training_seeds: int
    distinct_added: list[int]
    n_training: int
    n_synthetic: int


@dataclass(frozen=True)
class HeldOutCombination:
    """A held-out combination, and what training sets add to it.

    Args:
        name: The combination in words.
        combination: Value by field.
        added: Patches that each training set adds.
        nearest_site: The most similar site to its own; null if there is none.
    """

    name: str
    combination: dict[str, str]
    added: int
    nearest_site: str | None


@dataclass(frozen=True)
class ClassifierRecord:
    """The downstream classifier.

    Args:
        kind: "linear", a linear probe on frozen features, or "cnn", a network trained on the pixels.
        regularisation: Linear probe: C, and how it was chosen.
        network: Network: its name.
        steps: Network: optimiser steps.
        batch: Network: patches per step.
        seeds: Network: number of networks per training set.
    """

    kind: Literal["linear", "cnn"]
    regularisation: dict[str, object] | None = None
    network: str | None = None
    steps: int | None = None
    batch: int | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Downstream:
    """Scores of classifiers by training set, in one encoder's features.

    Args:
        fingerprint: The encoder's.
        classifier: The classifier.
        classes: Class values.
        affected_sites: Sites that have a held-out combination.
        combinations: Held-out combinations.
        n_train: Real training patches.
        test_patients: Test patients of each class at the affected sites.
        training_sets: By training set.
        differences: Differences first − second, by first and second training set.
        unavailable: Why a training set could not be built.
        not_converged: Training sets, with their variant, whose classifier did not converge.
    """

    fingerprint: str
    classifier: ClassifierRecord
    classes: list[str]
    affected_sites: list[str]
    combinations: list[HeldOutCombination]
    n_train: int
    test_patients: dict[str, int]
    training_sets: dict[str, TrainingSetResult]
    differences: dict[str, dict[str, Differences]]
    unavailable: dict[str, str]
    not_converged: list[str]


Pool = Literal["", "union", "separate"]
"""Samples that MeDi's protocol draws from: all of a task's classes, or those at sites where training has the class."""


@dataclass(frozen=True)
class ScoredPatches:
    """The real test patches that a protocol scores.

    Args:
        n_patches, n_patients: Their numbers.
        sites: Their sites.
    """

    n_patches: int
    n_patients: int
    sites: list[str]


@dataclass(frozen=True)
class MediProtocolRow:
    """One combination of settings of MeDi's protocol.

    Args:
        training_set: "real" where the ratio is 0, otherwise the synthetic set.
        sites: Training sites.
        max_real: Real training patches per class at most; 0 stands for all.
        ratio: Synthetic patches per real one.
        n_real, n_synthetic: Patches by seed.
        balanced_accuracy, site_averaged_balanced_accuracy, mcc: Scores.
        task: The task; empty for all classes.
        pool: Which samples were drawn from; empty for "real".
    """

    training_set: str
    sites: int
    max_real: int
    ratio: float
    n_real: list[int]
    n_synthetic: list[int]
    balanced_accuracy: MeanOverSeeds
    site_averaged_balanced_accuracy: MeanOverSeeds
    mcc: MeanOverSeeds
    task: str = ""
    pool: Pool = ""


@dataclass(frozen=True)
class MediTask:
    """A task of MeDi's protocol: distinguishing some classes.

    Args:
        classes: The classes.
        sites: Their training sites.
        n_train: Their real training patches.
        test: Their test patches.
        draws: By number of sites, those that each seed drew; not where all take part.
        left_out: Numbers of sites that were asked for and that the task does not have, or that lack a class.
    """

    classes: list[str]
    sites: int
    n_train: int
    test: ScoredPatches
    draws: dict[str, list[list[str]]]
    left_out: list[int]


@dataclass(frozen=True)
class MediProtocol:
    """Results of MeDi's protocol.

    Args:
        fingerprint: The encoder's.
        test: Test patches.
        not_converged: Fits that did not converge.
        rows: By combination of settings.
        tasks: The tasks; a single one without a name for all classes.
    """

    fingerprint: str
    test: ScoredPatches
    not_converged: int
    rows: list[MediProtocolRow]
    tasks: dict[str, MediTask] = field(default_factory=dict)


@dataclass(frozen=True)
class HistoDiffusionProtocolRow:
    """One combination of settings of HistoDiffusion's protocol.

    Args:
        training_set: "real", or the synthetic set.
        choice: How synthetic patches were chosen.
        percent: Synthetic patches per 100 real ones of the same class.
        n_real, n_synthetic: Patches.
        accuracy: Share of correct predictions.
        f1, sensitivity, specificity: Means over the classes.
    """

    training_set: str
    choice: Literal["none", "selected", "random"]
    percent: float
    n_real: int
    n_synthetic: int
    accuracy: MeanOverSeeds
    f1: MeanOverSeeds
    sensitivity: MeanOverSeeds
    specificity: MeanOverSeeds


@dataclass(frozen=True)
class HistoDiffusionProtocol:
    """Results of HistoDiffusion's protocol.

    Args:
        fingerprint: The encoder's.
        test: Test patches.
        classifier: The classifier.
        rows: By combination of settings.
    """

    fingerprint: str
    test: ScoredPatches
    classifier: ClassifierRecord
    rows: list[HistoDiffusionProtocolRow]


@dataclass(frozen=True)
class Protocols:
    """Results of published protocols, by encoder; empty where a protocol was not asked for.

    Args:
        medi: MeDi's.
        histodiffusion: HistoDiffusion's.
    """

    medi: dict[str, MediProtocol]
    histodiffusion: dict[str, HistoDiffusionProtocol]
