"""What the pages share: the template environment and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from latent_medi.core.progress import duration
from latent_medi.evaluation.class_distances import distance_text
from latent_medi.evaluation.downstream.protocol_tables import score_text
from latent_medi.evaluation.downstream.registry import label_of
from latent_medi.evaluation.results import Metrics
from latent_medi.report import figures
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.kernel_distance import kid_text

TWIN = ":haematoxylin"
"""Suffix of an encoder's name on the haematoxylin channel alone."""
DASH = "–"


def environment() -> jinja2.Environment:
    """Templates with autoescape: whatever comes from data is text on the page, never markup."""
    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.globals["shade"] = shade
    result.filters |= {
        "number": number,
        "distance": distance,
        "kid": kid,
        "bounds": bounds,
        "percent": percent,
        "share": share,
        "duration": duration,
        "label": label_of,
        "source": figures.source_name,
        "encoder": encoder_name,
        "short": figures.short,
        "flat": flat,
        "score": score_text,
    }
    return result


class Contents:
    """The sections of a page in order, and the running numbers of its figures and tables.

    Attributes:
        sections: Id and title of each section.
    """

    def __init__(self) -> None:
        self.sections: list[tuple[str, str]] = []
        self._figures = self._tables = 0

    def section(self, name: str, title: str) -> Markup:
        """The beginning of a section, which the list of contents then has."""
        self.sections.append((name, title))
        return Markup('<section id="{}"><h2>{}</h2>').format(name, title)

    def figure(self) -> Markup:
        """The label of the next figure."""
        self._figures += 1
        return Markup("<b>Figure {}.</b>").format(self._figures)

    def table(self) -> str:
        """The label of the next table."""
        self._tables += 1
        return f"Table {self._tables}."


def accuracies(metrics: Metrics, encoder: str) -> dict[str, Estimate]:
    """Accuracy under shift by training set, in one encoder's features."""
    downstream = metrics.downstream.get(encoder)
    return {name: r.accuracy_shift for name, r in downstream.training_sets.items()} if downstream else {}


def differences(metrics: Metrics, encoder: str, name: str) -> dict[str, Estimate]:
    """Paired differences in accuracy under shift of one training set from others, in one encoder's features."""
    downstream = metrics.downstream.get(encoder)
    found = downstream.differences.get(name, {}) if downstream else {}
    return {other: difference.accuracy_shift for other, difference in found.items()}


def value_of(record: Any) -> float | None:
    """A number, or that of an estimate; ``None`` if it is not available."""
    if isinstance(record, Mapping):
        return record.get("value")
    return getattr(record, "value", record)


def interval_of(record: Any) -> Any:
    """The interval of an estimate."""
    return record.get("interval") if isinstance(record, Mapping) else getattr(record, "interval", None)


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number, or that of an estimate, with fixed decimals and a true minus sign; a dash if it is not available."""
    value = value_of(value)
    return DASH if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def kid(value: Any) -> str:
    """A kernel distance, or that of an estimate, in thousandths with three significant digits and a true minus sign; a
    dash if not available.
    """
    return kid_text(value_of(value)).replace("-", "−")


def distance(value: Any) -> str:
    """A Fréchet distance, or that of an estimate, with three significant digits and a true minus sign; a dash if not
    available."""
    return distance_text(value_of(value)).replace("-", "−")


def bounds(record: Any, digits: int | None = 3, sign: bool = False) -> str:
    """An estimate's interval in words, as a kernel distance in thousandths where ``digits`` is None; empty if it has
    none.
    """
    interval = interval_of(record)
    if interval is None:
        return ""
    if isinstance(interval, str):
        return interval
    low, high = (kid(v) if digits is None else number(v, digits, sign) for v in interval)
    return f"{low} to {high}"


def percent(value: Any, digits: int = 0) -> str:
    """A share, or that of an estimate, as a percentage; a dash if it is not available."""
    value = value_of(value)
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def share(record: Any, digits: int = 1) -> str:
    """An estimate's interval as percentages; empty if it has none."""
    interval = interval_of(record)
    if interval is None or isinstance(interval, str):
        return interval or ""
    return f"{percent(interval[0], digits)} to {percent(interval[1], digits)}"


def encoder_name(name: str) -> str:
    """An encoder's name for people."""
    return name.removesuffix(TWIN) + " on the haematoxylin channel alone" if name.endswith(TWIN) else name


def shade(value: float) -> str:
    """White to deep blue for 0 to 1."""
    low, high = (255, 255, 255), (8, 81, 140)
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(low, high, strict=True))


def flat(value: Any, prefix: str = "", longest: int = 8, mappings: bool = True) -> dict[str, str]:
    """A nested mapping as dotted names and short text; a list longer than ``longest`` is only counted, and one of
    mappings as well unless ``mappings``.
    """
    if isinstance(value, Mapping):
        result: dict[str, str] = {}
        for key, inner in value.items():
            result |= flat(inner, f"{prefix}.{key}" if prefix else str(key), longest, mappings)
        return result
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(v, Mapping) for v in value)
        if len(value) > longest or (nested and not mappings):
            text = f"{len(value)} entries"
        elif nested:
            text = "; ".join(
                " × ".join(str(x) for x in v.values()) if isinstance(v, Mapping) else str(v) for v in value
            )
        else:
            text = ", ".join(str(v) for v in value)
        return {prefix: text or DASH}
    return {prefix: DASH if value is None or value == "" else str(value)}
