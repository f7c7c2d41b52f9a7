"""What the page begins with: the question, the answer in plain words, and the numbers that carry it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_medi.evaluation.downstream.registry import baseline_kinds, label_of
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.summary import conclusions
from latent_medi.evaluation.summary_records import Headline
from latent_medi.report.page import accuracies, bounds, differences, kid, number, percent, share
from latent_medi.statistics.intervals import Estimate

_NUMBERS = 3
_ANSWERS = {
    "useful": "Yes: a classifier that also learns from {name}’s patches is right more often {gaps} than with any "
    "simpler remedy that was tried.",
    "may be useful": "Perhaps: a classifier that also learns from {name}’s patches was right more often {gaps} than "
    "with any simpler remedy that was tried, but this may be chance.",
    "not shown": "Not shown: a classifier that also learns from {name}’s patches is not clearly more often right "
    "{gaps} than with every simpler remedy that was tried.",
    "not useful": "No: {gaps} a classifier is right more often without {name}’s patches, with a simpler remedy or "
    "none.",
    "no verdict": "Not known: this evaluation cannot say whether {name}’s patches help.",
}


@dataclass(frozen=True)
class KeyNumber:
    """One of the numbers that carry the answer.

    Args:
        title: What it is about.
        value: The number.
        interval: Its interval in words.
        meaning: What it says, in a sentence.
    """

    title: str
    value: str
    interval: str
    meaning: str


@dataclass(frozen=True)
class Answer:
    """The beginning of the page.

    Args:
        question: What the evaluation asks.
        sentence: The answer in plain words.
        kind: Whether the answer is yes, no, or open.
        exact: The verdict or the findings as the evaluation words them.
        numbers: Three numbers at most.
    """

    question: str
    sentence: str
    kind: Literal["yes", "no", "open"]
    exact: list[str]
    numbers: list[KeyNumber]


def answer(metrics: Metrics, first: str = "") -> Answer:
    """The question, the answer and the numbers of an evaluation.

    Args:
        metrics: The evaluation, with its summary.
        first: A sentence that answers before the findings do, where there is no verdict to give.

    Raises:
        ValueError: The evaluation has no summary.
    """
    headline = metrics.headline
    if headline is None:
        raise ValueError("The metrics have no summary.")
    name = label_of(headline.candidate)
    exact = conclusions(metrics, headline)
    if headline.findings:
        question = f"How near are {name}’s synthetic patches to real ones?"
        if first:
            question = "Do synthetic patches help an image classifier?"
        return Answer(question, first or _nearer(metrics, headline), "open", exact, _numbers(metrics, headline))
    question = f"Do {name}’s synthetic patches help a classifier where real training patches are missing?"
    sentence = _ANSWERS[headline.verdict.answer].format(name=name, gaps=_gaps(metrics))
    kinds: dict[str, Literal["yes", "no", "open"]] = {"useful": "yes", "not useful": "no"}
    kind = kinds.get(headline.verdict.answer, "open")
    return Answer(question, sentence, kind, exact, _numbers(metrics, headline))


def _gaps(metrics: Metrics) -> str:
    """Where the accuracy under shift is measured."""
    return (
        "at the hospitals with gaps in the training data" if metrics.dataset.site_field else "where training has gaps"
    )


def _nearer(metrics: Metrics, headline: Headline) -> str:
    """Whether the candidate is nearer than the baseline, in plain words; the first finding where that is unknown."""
    fidelity = metrics.fidelity.get(headline.encoder)
    ratios = [fidelity.unseen.ratio, fidelity.per_class.ratio] if fidelity else []
    interval = next((ratio.interval for ratio in ratios if ratio.value is not None), None)
    name, other = label_of(headline.candidate), label_of(headline.baseline)
    if not isinstance(interval, tuple):
        return conclusions(metrics, headline)[0]
    if interval[1] < 1:
        return f"Nearer than {other}’s: {name}’s patches are more like those of patients that no model has seen."
    if interval[0] > 1:
        return f"Farther than {other}’s: {name}’s patches are less like those of patients that no model has seen."
    return f"It is not shown that {name}’s patches are nearer to real ones than {other}’s, or farther."


def _numbers(metrics: Metrics, headline: Headline) -> list[KeyNumber]:
    found = [
        _gain(metrics, headline),
        _distance(metrics, headline, unseen=True),
        _found(metrics, headline, metrics.dataset.class_field),
        _distance(metrics, headline, unseen=False),
        _found(metrics, headline, metrics.dataset.site_field),
        _copies(metrics, headline),
    ]
    return [each for each in found if each][:_NUMBERS]


def _interval(text: str) -> str:
    """An interval that :func:`bounds` or :func:`share` wrote, or why there is none."""
    return f"95 % interval {text}" if " to " in text else f"interval {text}" if text else ""


def _gain(metrics: Metrics, headline: Headline) -> KeyNumber | None:
    """Accuracy under shift next to the baseline that the verdict names first."""
    gains = differences(metrics, headline.encoder, headline.candidate)
    known = [(kind, gains[kind.name]) for kind in baseline_kinds() if kind.name in gains]
    known = [(kind, gain) for kind, gain in known if gain.value is not None]
    if not known:
        return None
    kind, gain = min(known, key=lambda each: (not each[0].decisive, each[1].value or 0.0))
    scores = accuracies(metrics, headline.encoder)
    points = gain.times(100)
    name = label_of(headline.candidate)
    return KeyNumber(
        "Is the classifier right more often?",
        f"{number(points, 1, sign=True)} points",
        _interval(bounds(points, 1, sign=True)),
        f"{percent(scores.get(headline.candidate), 1)} right with {name}’s patches, "
        f"{percent(scores.get(kind.name), 1)} with {kind.phrase}; mean over classes, {_gaps(metrics)}.",
    )


def _distance(metrics: Metrics, headline: Headline, unseen: bool) -> KeyNumber | None:
    """The ratio, or the distance where there is none."""
    fidelity = metrics.fidelity.get(headline.encoder)
    if fidelity is None:
        return None
    table = fidelity.unseen if unseen else fidelity.per_class
    name, other = label_of(headline.candidate), label_of(headline.baseline)
    of = "combinations that training never showed" if unseen else "each class"
    mean = table.means.get(headline.candidate)
    if table.ratio.value is not None:
        return KeyNumber(
            "Do the patches look real?",
            number(table.ratio, 2),
            _interval(bounds(table.ratio, 2)),
            f"Distance of {name}’s patches to real ones, {of}: 0 is as near as other real patients’ patches, 1 is no "
            f"nearer than {other}’s.",
        )
    if mean is None or mean.value is None:
        return None
    return KeyNumber(
        "Do the patches look real?",
        kid(mean),
        _interval(bounds(mean, None)),
        f"Distance of {name}’s patches to real ones (KID × 10³), {of}: about 0 between real patients.",
    )


def _found(metrics: Metrics, headline: Headline, field: str) -> KeyNumber | None:
    """How often the requested value of a field is found."""
    adherence = metrics.adherence.get(headline.encoder)
    recovery = adherence.fields.get(field) if adherence else None
    found = recovery.synthetic.get(headline.candidate) if recovery else None
    if recovery is None or found is None or found.value is None or not found.conditioned:
        return None
    question = f"Do they show the {field} that was asked for?"
    if recovery.says_nothing:
        return KeyNumber(
            question,
            "not known",
            "",
            f"A linear probe finds the {field} in {percent(recovery.real)} of real patches; guessing finds it in "
            f"{percent(recovery.chance)}. So the probe says nothing of {label_of(headline.candidate)}’s patches.",
        )
    return KeyNumber(
        question,
        percent(found),
        _interval(share(found, 0)),
        f"of {label_of(headline.candidate)}’s patches of combinations that training never showed are recognised as "
        f"that {field}; {_real(recovery.real)} of real patches.",
    )


def _real(estimate: Estimate) -> str:
    return percent(estimate) if estimate.value is not None else "an unknown share"


def _copies(metrics: Metrics, headline: Headline) -> KeyNumber | None:
    memorisation = metrics.memorisation.get(headline.encoder)
    found = memorisation.synthetic.get(headline.candidate) if memorisation else None
    if found is None or found.copy_rate.value is None:
        return None
    return KeyNumber(
        "Are they copies?",
        percent(found.copy_rate, 1),
        _interval(share(found.copy_rate)),
        f"of {label_of(headline.candidate)}’s patches are copies of a training patch.",
    )
