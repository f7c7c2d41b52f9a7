"""Settings of ``explore``; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeInt, Range, Settings


@dataclass
class ExploreSettings(Settings):
    """Browse the patches of a dataset or an experiment in a page on this machine, and draw samples of any combination.
    Ctrl-C ends it.

    Args:
        data: Dataset folder, or folder of an experiment, which has its dataset, samples and models itself.
        synthetic: Synthetic dataset folders by name, which are shown next to it, as in synthetic.medi=PATH.
        model: Model folder, or hub id, that samples are drawn from.
        fields: Class and categorical fields of the combination that a patch's verdict is about; empty means all.
        split: Split of the dataset that verdicts rest on; a dataset without any split is taken whole.
        split_value: The part of that split.
        thin_patients: A combination with fewer patients, or effective patients, is thin.
        host: Address to listen on. Any other than 127.0.0.1 shows the patches to whoever can reach it.
        port: Port to listen on; 0 means a free one.
    """

    COMMON: ClassVar = "data synthetic model split fields"
    EXAMPLES: ClassVar = (
        "latent-medi explore runs/demo",
        "latent-medi explore data=my/data synthetic.medi=my/samples model=my/run/model",
    )

    data: PathText = ""
    synthetic: dict[str, PathText] = field(default_factory=dict)
    model: PathText = ""
    fields: list[str] = field(default_factory=list)
    split: str = "main"
    split_value: str = "train"
    thin_patients: NonNegativeInt = 10
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 7860
