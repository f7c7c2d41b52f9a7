"""Settings of the report; imports no torch."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.paths import PathText
from latent_medi.core.settings import PositiveInt, Range, Settings

Section = Literal[
    "headline",
    "classifiers",
    "colour",
    "cohort",
    "fidelity",
    "patches",
    "downstream",
    "adherence",
    "memorisation",
    "projection",
    "provenance",
]
SECTIONS: tuple[Section, ...] = typing.get_args(Section)
"""Parts of the page after the verdict, in order."""


@dataclass
class ReportSettings(Settings):
    """What goes on the page.

    Args:
        metrics: The ``metrics.json`` of an evaluation, or the folder of a run that has one.
        compare: Instead of one evaluation, two or more to compare; each a ``metrics.json`` or the folder of a run. The
            differences are to the first.
        out: The HTML file to write; empty means ``report.html`` in the folder of the metrics, or ``comparison.html`` in
            that of the first run.
        title: Heading of the page; empty means the dataset's name.
        real: Folder of the real dataset; empty means the one that was evaluated.
        synthetic: Folder of each synthetic set by its name; those not given are the ones that were evaluated.
        classifiers: Folder of a comparison of image classifiers to show; empty means ``image_classifiers`` in the
            folder of the metrics, where there is one.
        sections: Parts to show.
        patches_per_cell: Patches in each image of the grids.
        rows_per_class: Rows of the image grid of a class, held-out combinations first.
        seed: Seed of the choice of patches.
    """

    COMMON: ClassVar = "metrics compare out title sections"
    EXAMPLES: ClassVar = (
        "latent-medi report metrics=runs/demo/metrics.json",
        "latent-medi report --compare runs/seed0 runs/seed1 out=seeds.html",
    )

    metrics: PathText = ""
    compare: list[PathText] = field(default_factory=list)
    out: PathText = ""
    title: str = ""
    real: PathText = ""
    synthetic: dict[str, PathText] = field(default_factory=dict)
    classifiers: PathText = ""
    sections: list[Section] = field(default_factory=lambda: list(SECTIONS))
    patches_per_cell: PositiveInt = 4
    rows_per_class: PositiveInt = 8
    seed: int = 0


@dataclass
class ReadingSheetSettings(Settings):
    """A blinded sheet on which a pathologist marks which patches are real, or the score of the answers.

    Args:
        data: Folder of the real dataset; its test patches are shown.
        synthetic: Folder of the synthetic dataset.
        out: The HTML file to write. It holds the pictures in random order and nothing of their origin.
        key: The file with the origin of each picture, to be written, or read with ``score``; empty means ``out`` with
            the ending ``.key.csv``. Do not send it to readers.
        n: Pictures on the sheet, half real and half synthetic, equally many of each combination.
        fields: Fields whose combinations are balanced; empty means the class and the site.
        site_field: Field that names the hospital.
        split: Name of the split column of the real dataset, without "split_".
        split_value: Split value of the real patches to show: patients that no model saw.
        selected: Column of a selection of the synthetic dataset, such as selected_best: only its choice is shown.
        seed: Seed of the choice and the order. Whoever knows it and has the data can find the origins.
        confidence: Also ask how sure the reader is.
        score: Answers to score instead, one CSV file or several; nothing is written but ``out``, if it is given with
            the ending ``.csv``: the score of each reader.
    """

    COMMON: ClassVar = "data synthetic out n fields confidence score"
    EXAMPLES: ClassVar = (
        "latent-medi reading-sheet data=my/data synthetic=my/samples n=60 out=sheet.html",
        "latent-medi reading-sheet --score reader1.csv reader2.csv key=sheet.key.csv",
    )

    data: PathText = ""
    synthetic: PathText = ""
    out: PathText = ""
    key: PathText = ""
    n: Annotated[int, Range(2)] = 60
    fields: list[str] = field(default_factory=list)
    site_field: str = "site"
    split: str = "main"
    split_value: str = "test"
    selected: str = ""
    seed: int = 0
    confidence: bool = True
    score: list[PathText] = field(default_factory=list)
