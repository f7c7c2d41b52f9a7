"""What an experiment will cost, as records and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latent_medi.core.hub import Weights

GB = 10**9
_HOUR, _DAY = 3600, 24 * 3600


@dataclass(frozen=True)
class StageCost:
    """What one stage takes, for one model or for all.

    Args:
        stage: Name of the stage.
        model: The model; empty for a stage on the dataset.
        images: Patches encoded, images trained on, samples made; null where that is known once the dataset exists.
        bytes: What the stage leaves on the disk; null where that is not known before.
        exact: Whether ``bytes`` are exact, but for small text files. Otherwise samples are assumed to compress like
            real patches, and of an evaluation the features alone are counted.
        seconds: How long it takes; null where that was not measured.
        measured: What the rate is from: "here", the name of a GPU on which training was measured, "estimate" for one
            from the card's operations per second, or empty.
        finished: Whether an earlier run made it; then nothing of it is left to do.
    """

    stage: str
    model: str = ""
    images: int | None = None
    bytes: int | None = None
    exact: bool = True
    seconds: float | None = None
    measured: str = ""
    finished: bool = False


@dataclass(frozen=True)
class ExperimentCost:
    """What an experiment takes from now on.

    Args:
        machine: What it runs on, in words.
        gpus: GPUs of this machine.
        stages: The rows of the table.
        training_patches: Patches of the split's part "train"; null before the dataset exists.
        seconds: All that is left and whose rate is known, models that run at the same time counted once.
        not_measured: Stages that take long and have no rate.
        weights: Weights that it needs, and whether they are on this machine.
        missing: What is absent and must be there, as sentences.
        notes: What a reader should know besides.
    """

    machine: str
    gpus: int
    stages: list[StageCost]
    training_patches: int | None
    seconds: float
    not_measured: list[str]
    weights: list[Weights] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of everything that is yet to be written and whose size is known."""
        return sum(row.bytes or 0 for row in self.stages if not row.finished)

    @property
    def planned(self) -> dict[str, int]:
        """Images to generate by model, where they are known."""
        return {row.model: row.images for row in self.stages if row.stage == "sample" and row.images is not None}


def cost_text(cost: ExperimentCost) -> str:
    """The table, and below it what it needs."""
    lines = [f"What this takes, on {cost.machine}:", ""]
    table = [("stage", "model", "images", "GB", "hours", "")]
    table += [_row(row) for row in cost.stages]
    total = f"{cost.bytes / GB:.2f}", hours(cost.seconds) if cost.seconds else ""
    table.append(("in all", "", "", *total, f"without {', '.join(cost.not_measured)}" if cost.not_measured else ""))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    for row in table:
        cells = [
            text.rjust(w) if i > 1 else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    lines.append("")
    lines += [f"weights: {weights.text}" for weights in cost.weights if weights.hub_id or not weights.found]
    lines += [f"missing: {text}" for text in cost.missing]
    lines += cost.notes
    return "\n".join(lines).rstrip()


def _row(row: StageCost) -> tuple[str, str, str, str, str, str]:
    images = "" if row.images is None else f"{row.images:,}"
    size = "" if row.bytes is None else f"{'' if row.exact else '~'}{row.bytes / GB:.2f}"
    if row.finished:
        return row.stage, row.model, images, size, "", "finished"
    took = "" if row.seconds is None else hours(row.seconds)
    return row.stage, row.model, images, size, took, _origin(row)


def _origin(row: StageCost) -> str:
    words = {"": "", "here": "measured here", "estimate": "estimated from the card's speed, not measured"}
    if row.seconds is None:
        return "not measured" if row.stage in LONG_STAGES else ""
    return words.get(row.measured, f"as measured on {row.measured}")


LONG_STAGES = (
    *("shards", "autoencoder", "encode", "train", "classifier", "sample"),
    *("real_classifier", "select", "image_classifier", "evaluate"),
)
"""Stages whose time depends on the number of images; the others take seconds or minutes."""


def hours(seconds: float) -> str:
    """Seconds as hours with three digits at most, such as 0.02, 3.4 or 480."""
    value = seconds / _HOUR
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def days(seconds: float) -> str:
    """Seconds as a phrase in days or, below one and a half, in hours."""
    return f"{hours(seconds)} hours" if seconds < 1.5 * _DAY else f"{seconds / _DAY:,.0f} days"


def listed(words: Sequence[str]) -> str:
    """Words with commas and a last "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))
