"""The summary of an evaluation, as ``metrics.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from latent_medi.evaluation.verdict import Verdict
from latent_medi.statistics.intervals import Interval


@dataclass(frozen=True)
class SummaryDistances:
    """Kernel distances (KID) to real test patches. What is not available is null.

    Args:
        candidate: The candidate's.
        baseline: The first synthetic baseline's.
        real: Distance between real patients, about 0.
        ratio: Candidate / baseline, over the combinations that both have.
        ratio_interval: Its 95 % interval over patients and samples.
        frechet_ratio: (candidate − real) / (baseline − real) of Fréchet distances.
        frechet_perfect: What a perfect generator's is, by simulation.
        left_out: Why a combination, or a set in it, is not compared, by the combination's name.
    """

    candidate: float | None
    baseline: float | None
    real: float | None
    ratio: float | None
    ratio_interval: Interval
    frechet_ratio: float | None
    frechet_perfect: float | None
    left_out: dict[str, str]


@dataclass(frozen=True)
class SummaryClass:
    """Kernel distances (KID) of each source in one class, null where it is not compared.

    Args:
        name: The class.
        held_out: To held-out patients, by source.
        training: To training images, by source; empty where these are no reference.
    """

    name: str
    held_out: dict[str, float | None]
    training: dict[str, float | None]


@dataclass(frozen=True)
class SummaryDifference:
    """Difference in accuracy under shift, candidate − another training set.

    Args:
        value: The difference; null if either is missing.
        interval: Its 95 % interval over patients and the samples drawn.
    """

    value: float | None
    interval: Interval


@dataclass(frozen=True)
class FurtherTrainingSet:
    """A training set without a column of its own in the summary.

    Args:
        accuracy_shift, accuracy_unseen: Its accuracies.
        difference: Of the candidate from it.
    """

    accuracy_shift: float | None
    accuracy_unseen: float | None
    difference: SummaryDifference


@dataclass(frozen=True)
class SummaryRecovery:
    """How often the requested value is found in the candidate's samples of unseen combinations.

    Args:
        found: Share of the samples, 0 to 1.
        real: The same in real test patches of these combinations.
    """

    found: float | None
    real: float | None


@dataclass(frozen=True)
class SummaryVariety:
    """Variety of the candidate's samples and of real patches of other patients, over all patches together: samples that
    all look alike may show the requested value more often than real patches do. What is not available is null.

    Args:
        recall, recall_real: Share of real test patches that lie among the samples, or among the other real patches.
        coverage, coverage_real: Share of real test patches that have one of them near.
    """

    recall: float | None
    recall_real: float | None
    coverage: float | None
    coverage_real: float | None


@dataclass(frozen=True)
class Headline:
    """The few numbers that matter, with the first encoder.

    Args:
        candidate: Name of the synthetic set that the verdict is about.
        baseline: Name of the synthetic set that ratios are taken to.
        distance_unseen: Distances over unseen combinations.
        distance_unseen_colour_free: The same with the colour-free encoder.
        distance_per_class: Distances over classes.
        accuracy_shift, accuracy_in_distribution, accuracy_seen, accuracy_unseen: Accuracies by training set.
        accuracy_shift_difference: Differences of the candidate from the baselines.
        further: Other training sets.
        recovery_site, recovery_class: Recovery of the requested site and class.
        n_test_patches, n_test_patients: What the accuracy under shift rests on; null without a comparison.
        encoder: Name of the encoder.
        classifier: The downstream classifier in words.
        seconds: Duration by stage.
        warnings: What the verdict must not be read without.
        variety: Variety of the candidate's samples.
        verdict: The verdict.
        distance_per_class_training: Distances to the training images over classes; null where these are no reference.
        classes: Distances of each class, where no combination is held out or the training images are a reference.
        findings: What an evaluation without a downstream comparison found, in sentences that take the verdict's place.
    """

    candidate: str
    baseline: str
    distance_unseen: SummaryDistances
    distance_unseen_colour_free: SummaryDistances
    distance_per_class: SummaryDistances
    accuracy_shift: dict[str, float | None]
    accuracy_in_distribution: dict[str, float | None]
    accuracy_seen: dict[str, float | None]
    accuracy_unseen: dict[str, float | None]
    accuracy_shift_difference: dict[str, SummaryDifference]
    further: dict[str, FurtherTrainingSet]
    recovery_site: SummaryRecovery
    recovery_class: SummaryRecovery
    n_test_patches: int | None
    n_test_patients: int | None
    encoder: str
    classifier: str
    seconds: dict[str, float]
    warnings: list[str]
    variety: SummaryVariety
    verdict: Verdict
    distance_per_class_training: SummaryDistances | None = None
    classes: list[SummaryClass] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
