"""What the pages share: the template environment and numbers as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

from latent_medi.core.checksums import read_result
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed
from latent_medi.core.progress import duration
from latent_medi.evaluation.summary import distance_text
from latent_medi.report import figures

TWIN = ":haematoxylin"
"""What follows an encoder's name where it saw the haematoxylin channel alone."""
BY_ENCODER = ("fidelity", "downstream", "adherence", "memorisation", "projection")
"""Sections of ``metrics.json`` that have a record per encoder."""
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
        "bounds": bounds,
        "percent": percent,
        "share": share,
        "duration": duration,
        "arm": figures.name_of,
        "encoder": encoder_name,
        "short": figures.short,
        "flat": flat,
    }
    return result


def read_metrics(metrics: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], Path | None]:
    """The content of ``metrics.json``, with empty sections for what an evaluation left out, and where it lies.

    Args:
        metrics: The content, the path of the file, or the folder of a run that has it.

    Raises:
        UserError: These are not an evaluation's.
    """
    file: Path | None = None
    content: Any = metrics
    if not isinstance(metrics, Mapping):
        file = Path(metrics) / "metrics.json" if Path(metrics).is_dir() else Path(metrics)
        content = read_result(file, "Run `latent-medi evaluate` again.")
    if not isinstance(content, Mapping) or not {"dataset", "encoders", "headline", "verdict"} <= content.keys():
        where = f"{file}: these" if file else "The metrics"
        raise UserError(f"{where} are not those of an evaluation.", "Give the metrics.json that `evaluate` wrote.")
    absent: dict[str, Any] = {"run": None, "notes": []}
    absent |= {part: {} for part in ("synthetic", *BY_ENCODER)}
    return absent | dict(content), file


@contextmanager
def foreign(*files: Path) -> Iterator[None]:
    """Tell in one message that files which have no checksum are not what ``evaluate`` wrote, if reading them fails;
    where all have one, the failure is ours and stays as it is.

    Raises:
        UserError: See above.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever an entry of another type leads to
        for file in files:
            if not read_sealed(file, "")[1]:
                raise UserError(
                    f"{file} is damaged or was not written by `latent-medi evaluate`: {error!r}.",
                    "Run `latent-medi evaluate` again.",
                ) from error
        raise


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number (or a measure's value) with fixed decimals and a true minus sign; a dash if it is not available."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return DASH if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def distance(value: Any) -> str:
    """A distance (or a measure of one) with three significant digits and a true minus sign; a dash if not available."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return distance_text(value).replace("-", "−")


def bounds(record: Any, digits: int | None = 3) -> str:
    """A measure's interval in words, with three significant digits where ``digits`` is None; empty if it has none."""
    interval = record.get("interval") if isinstance(record, Mapping) else None
    if interval is None:
        return ""
    if isinstance(interval, str):
        return interval
    low, high = (distance(v) if digits is None else number(v, digits) for v in interval)
    return f"{low} to {high}"


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage; a dash if it is not available."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def share(record: Any, digits: int = 1) -> str:
    """A measure's interval as percentages; empty if it has none."""
    interval = record.get("interval") if isinstance(record, Mapping) else None
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
