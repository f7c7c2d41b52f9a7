"""Settings of selection; import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.kinds import Range
from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings, UnitInterval

Filter = Literal["centroid", "confidence", "outliers", "copies", "duplicates"]
Score = Literal["confidence", "centroid", "distance"]


@dataclass
class SelectSettings(Settings):
    """Which patches of a synthetic dataset to keep, by comparison with real training patches.

    Args:
        data: Folder of the synthetic dataset. It gains columns, and loses nothing.
        real: Folder of the real dataset.
        name: Name of the selection: the columns are selected_NAME, selected_NAME_control and selected_NAME_score.
        split: Named split of the real dataset.
        split_value: Its part to learn from, a training part.
        only: Values by field, such as {class: [LUAD, LUSC]}: only real patches with one of them are learned from.
            Fields that are not named keep all.
        cells: Fields whose combinations patches are chosen from; empty means every class and categorical field that the
            synthetic patches state.
        fields: Fields that centroids and confidence score; empty means the class, or, if cells does not name the class,
            the fields in cells. A field that hardly shows in real patches adds noise.
        filters: What a patch must pass. "centroid": in each group of fields, the nearest centroid of real patches is
            that of its own values. "confidence": a linear probe of each field finds the stated value probable.
            "outliers": a real patch is near enough. "copies": no real patch is too near, or has the same pixels, also
            rotated or mirrored. "duplicates": no better synthetic patch is too near, or has the same pixels.
        centroids: Groups of fields; each combination of a group's values has a centroid. Empty means each of fields by
            itself. Every combination of a group needs real training patches.
        adjust: Subtract the effects of the other fields from the features (least squares over real training patches)
            before a field is scored. Without it, combinations that training lacks are rejected for being rare: a probe
            of the class that never saw the class at a site takes the site for evidence against it.
        confidence: Least probability of each stated value, 0 to 1, for the filter of that name.
        outliers: Quantile, 0 to 1, of the distances of real patches to the nearest one of another patient. A patch
            farther from the nearest real one is an outlier. For a combination without real patches, the nearest one of
            another combination counts.
        copies: Quantile of the distances between patients: a patch nearer to a real one is a copy.
        duplicates: Quantile of the distances between patients: of two synthetic patches nearer to each other, the worse
            one is a duplicate.
        farthest: Largest distance (KID) of all patches to real ones, over the largest between real combinations, or
            patients, and the others: beyond it the dataset is refused, and where fewer than half as many patches pass
            the filter "outliers" as real ones do. 0 refuses none.
        rank: Score that orders patches, lower is better: "confidence" (minus the mean log probability over fields),
            "centroid" (mean squared distance to the own centroids) or "distance" (to the nearest real patch).
            selected_NAME_score holds it.
        per_cell: Patches to choose per combination at most; 0 for no such bound.
        percent: Patches to choose per combination at most, per 100 real training patches that have it; 0 for no such
            bound. A combination that training lacks gets none.
        share: Share of a combination's patches, above 0 to 1, to choose at most, rounded up.
        control: Also choose as many per combination at random, from all of its patches.
        encoder: Name of an encoder (docs/verbs/evaluate.md lists them), a folder with one, or ``module:callable``.
        weights: Weight file or folder for encoders that need one; empty means the hub's cache.
        colour_free: Use the haematoxylin channel alone.
        regularisation: C of the linear probes (inverse strength, standardised features); 0 chooses it by
            cross-validation over patients.
        most: Real patches that train a linear probe, and whose distances give the quantiles, at most; patients in turn.
        seed: Seed of the control and of every subsample.
        batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda"; empty takes a GPU if there is one.
        workers: Threads that decode patches to compare pixels; 0 decodes in the main thread.
        cache: Folder of the feature cache; empty means "features" in the parent folder of the dataset.
        replace: Whether another selection of that name may be overwritten.
    """

    COMMON: ClassVar = "data real name encoder share per_cell filters weights replace"
    EXAMPLES: ClassVar = (
        "latent-medi select my/samples real=my/data name=best share=0.5 encoder=phikon-v2",
        "latent-medi select my/samples real=my/data name=best per_cell=100 encoder=uni weights=uni.bin",
    )

    RENAMED: ClassVar = {"criteria": "filters"}

    data: PathText = ""
    real: PathText = ""
    name: str = "best"
    split: str = "main"
    split_value: str = "train"
    only: dict[str, list[str]] = field(default_factory=dict)
    cells: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    filters: list[Filter] = field(default_factory=lambda: ["outliers", "copies", "duplicates"])
    centroids: list[list[str]] = field(default_factory=list)
    adjust: bool = True
    confidence: UnitInterval = 0.5
    outliers: UnitInterval = 0.99
    copies: UnitInterval = 0.001
    duplicates: UnitInterval = 0.001
    farthest: NonNegativeFloat = 1.3
    rank: Score = "confidence"
    per_cell: NonNegativeInt = 0
    percent: NonNegativeFloat = 0.0
    share: Annotated[float, Range(0, 1, above=True)] = 0.5
    control: bool = True
    encoder: PathText = "phikon-v2"
    weights: PathText = ""
    colour_free: bool = False
    regularisation: NonNegativeFloat = 0.0
    most: Annotated[int, Range(100)] = 10_000
    seed: int = 0
    batch: PositiveInt = 128
    device: str = ""
    workers: NonNegativeInt = 2
    cache: PathText = ""
    replace: bool = False
