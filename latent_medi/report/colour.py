"""Which part of a gain survives without colour: each number beside its twin on the haematoxylin channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latent_medi.evaluation.summary import RIVALS
from latent_medi.report.page import TWIN, number

Rows = list[dict[str, Any]]


def side_by_side(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of (name, kind, with colour, without) and one sentence; empty if there is no colour-free twin.

    Args:
        metrics: Content of ``metrics.json``; the first encoder that has a twin is shown.
    """
    plain = next((n for n in metrics["encoders"] if n + TWIN in metrics["encoders"]), None)
    if plain is None:
        return {}
    lead = next((r for r in RIVALS if _pair(metrics, plain, *_gain(r))[0]), "real")
    wanted = [
        ("unseen combinations: ratio (0 real, 1 as class alone)", "number", _ratio("unseen")),
        ("per class: ratio", "number", _ratio("per_class")),
        ("per site: ratio", "number", _ratio("per_site")),
        *((f"accuracy under shift: MeDi − {RIVALS[r]}", "signed", _gain(r)) for r in RIVALS),
        ("site found in samples", "percent", _found(metrics, "site_field", "arms", "medi")),
        ("class found in samples", "percent", _found(metrics, "class_field", "arms", "medi")),
    ]
    rows: Rows = []
    for name, kind, path in wanted:
        colour, without = _pair(metrics, plain, *path)
        if colour or without:
            rows.append({"name": name, "kind": kind, "colour": colour, "without": without})
    return {"encoder": plain, "rows": rows, "sentence": sentence(metrics, plain, lead)} if rows else {}


def sentence(metrics: Mapping[str, Any], encoder: str, rival: str) -> str:
    """What of the gain in fidelity and of that in accuracy is left without colour."""
    parts = []
    ratio, twin = (_value(r) for r in _pair(metrics, encoder, *_ratio("unseen")))
    if ratio is not None and twin is not None:
        parts.append(
            f"on unseen combinations MeDi closes {number(100 * (1 - ratio), 0)} % of the distance between a class-only "
            f"model and real patches in colour and {number(100 * (1 - twin), 0)} % without: "
            f"{_verdict(1 - ratio, 1 - twin)}"
        )
    colour, without = (_value(r) for r in _pair(metrics, encoder, *_gain(rival)))
    if colour is not None and without is not None:
        parts.append(
            f"in accuracy under shift MeDi's difference to {RIVALS[rival]} is {number(colour, sign=True)} in colour "
            f"and {number(without, sign=True)} without: {_verdict(colour, without)}"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _verdict(gain: float, left: float) -> str:
    if gain <= 0:
        return "no gain in colour that could be lost" if left <= 0 else "a gain only without colour"
    if left <= 0:
        return "none of the gain survives"
    return "all of the gain survives" if left >= gain else f"{100 * left / gain:.0f} % of the gain survives"


def _ratio(part: str) -> tuple[str, ...]:
    return ("fidelity", part, "summary", "ratio")


def _gain(rival: str) -> tuple[str, ...]:
    return ("downstream", "differences", f"medi - {rival}", "accuracy_shift")


def _found(metrics: Mapping[str, Any], field: str, *path: str) -> tuple[str, ...]:
    return ("adherence", "fields", metrics["dataset"][field], *path)


def _pair(metrics: Mapping[str, Any], encoder: str, section: str, *path: str) -> tuple[Any, Any]:
    """The record at a path in a section, of an encoder and of its twin; None where it has no value."""
    found = []
    for name in (encoder, encoder + TWIN):
        record: Any = metrics.get(section, {}).get(name, {})
        for key in path:
            record = record.get(key) if isinstance(record, Mapping) else None
        found.append(record if _value(record) is not None else None)
    return found[0], found[1]


def _value(record: Any) -> float | None:
    return record.get("value") if isinstance(record, Mapping) else None
