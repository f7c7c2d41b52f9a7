"""Settings of the report; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

SECTIONS = ("headline", "cohort", "fidelity", "patches", "downstream", "adherence", "provenance")
"""Parts of the page after the verdict, in order."""


@dataclass
class ReportSettings:
    """What goes on the page.

    Args:
        metrics: The ``metrics.json`` of an evaluation.
        out: The HTML file to write; empty means ``report.html`` beside the metrics.
        title: Heading of the page; empty means the dataset's name.
        real: Folder of the real dataset; empty means the one that was evaluated.
        synthetic: Folder of each arm's dataset by its name; those not given are the ones that were evaluated.
        sections: Parts to show.
        patches_per_cell: Patches beside each other in the image grids.
        rows_per_class: Rows of the image grid of a class, held-out combinations first.
        seed: Seed of the choice of patches.
    """

    metrics: str = ""
    out: str = ""
    title: str = ""
    real: str = ""
    synthetic: dict[str, str] = field(default_factory=dict)
    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    patches_per_cell: int = 4
    rows_per_class: int = 8
    seed: int = 0
