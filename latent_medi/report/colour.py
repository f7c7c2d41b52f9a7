"""Numbers in colour and on the haematoxylin channel alone: which part of a gain survives without colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_medi.evaluation.downstream.registry import REAL, TrainingSetKind, baseline_kinds, label_of, summarised
from latent_medi.evaluation.results import Metrics
from latent_medi.report.page import TWIN, differences, number
from latent_medi.statistics.intervals import Estimate


@dataclass(frozen=True)
class ColourRow:
    """One number.

    Args:
        name: What it is.
        kind: How it is written.
        colour, without: The number in colour and without; ``None`` where it has no value.
    """

    name: str
    kind: Literal["number", "signed", "percent"]
    colour: Estimate | None
    without: Estimate | None


@dataclass(frozen=True)
class ColourTable:
    """Numbers of one encoder.

    Args:
        encoder: Its name.
        rows: The numbers.
        sentence: What of the gains is left without colour; empty where the verdict says of no gain.
    """

    encoder: str
    rows: list[ColourRow]
    sentence: str


def colour_table(metrics: Metrics) -> ColourTable | None:
    """Numbers of the first encoder that was also used on the haematoxylin channel alone; ``None`` if there is none."""
    plain = next((n for n in metrics.encoders if n + TWIN in metrics.encoders), None)
    if plain is None:
        return None
    candidate = label_of(metrics.roles.candidate)
    baselines = summarised(baseline_kinds())
    gains = {f"accuracy under shift: {candidate} − {k.phrase}": _gain(metrics, plain, k) for k in baselines}
    rows = [
        ColourRow(
            f"unseen combinations: ratio (0 real, 1 as {label_of(metrics.roles.baseline)})",
            "number",
            *_ratio(metrics, plain, "unseen"),
        ),
        ColourRow("per class: ratio", "number", *_ratio(metrics, plain, "per_class")),
        ColourRow("per site: ratio", "number", *_ratio(metrics, plain, "per_site")),
        *(ColourRow(name, "signed", *pair) for name, pair in gains.items()),
        ColourRow("site found in samples", "percent", *_found(metrics, plain, metrics.dataset.site_field)),
        ColourRow("class found in samples", "percent", *_found(metrics, plain, metrics.dataset.class_field)),
    ]
    rows = [row for row in rows if row.colour or row.without]
    first = next((kind for kind in baselines if _gain(metrics, plain, kind)[0]), REAL)
    gained = metrics.headline is not None and metrics.headline.verdict.answer in ("useful", "may be useful")
    return ColourTable(plain, rows, sentence(metrics, plain, first) if gained else "") if rows else None


def sentence(metrics: Metrics, encoder: str, baseline: TrainingSetKind) -> str:
    """What of the gain in fidelity and of that in accuracy is left without colour."""
    candidate, other = label_of(metrics.roles.candidate), label_of(metrics.roles.baseline)
    parts = []
    colour, without = _ratio(metrics, encoder, "unseen")
    if colour and without and colour.value is not None and without.value is not None:
        gain, left = 1 - colour.value, 1 - without.value
        parts.append(
            f"on unseen combinations {candidate} closes {number(100 * gain, 0)} % of the distance between {other} and "
            f"real patches in colour and {number(100 * left, 0)} % without: {_in_words(gain, left)}"
        )
    colour, without = _gain(metrics, encoder, baseline)
    if colour and without and colour.value is not None and without.value is not None:
        parts.append(
            f"in accuracy under shift {candidate}'s difference from {baseline.phrase} is "
            f"{number(colour, sign=True)} in colour and {number(without, sign=True)} without: "
            f"{_in_words(colour.value, without.value)}"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _in_words(gain: float, left: float) -> str:
    if gain <= 0:
        return "no gain in colour that could be lost" if left <= 0 else "a gain only without colour"
    if left <= 0:
        return "none of the gain survives"
    return "all of the gain survives" if left >= gain else f"{100 * left / gain:.0f} % of the gain survives"


Pair = tuple[Estimate | None, Estimate | None]


def _pair(colour: Estimate | None, without: Estimate | None) -> Pair:
    return tuple(e if e is not None and e.value is not None else None for e in (colour, without))  # type: ignore[return-value]


def _ratio(metrics: Metrics, encoder: str, table: Literal["unseen", "per_class", "per_site"]) -> Pair:
    found = [metrics.fidelity.get(name) for name in (encoder, encoder + TWIN)]
    ratios = [None if fidelity is None else getattr(fidelity, table).ratio for fidelity in found]
    return _pair(*ratios)


def _gain(metrics: Metrics, encoder: str, baseline: TrainingSetKind) -> Pair:
    found = [differences(metrics, name, metrics.roles.candidate) for name in (encoder, encoder + TWIN)]
    return _pair(*(gains.get(baseline.name) for gains in found))


def _found(metrics: Metrics, encoder: str, field: str) -> Pair:
    records = [metrics.adherence.get(name) for name in (encoder, encoder + TWIN)]
    fields = [None if record is None else record.fields.get(field) for record in records]
    return _pair(*(None if found is None else found.synthetic.get(metrics.roles.candidate) for found in fields))
