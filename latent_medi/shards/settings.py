"""Settings of importing images and slides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.paths import PathText
from latent_medi.core.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Settings,
    UnitInterval,
)

Codec = Literal["png", "jpg", "webp"]
"""Formats of stored patches; png is lossless."""


@dataclass
class ImportSettings(Settings):
    """A table or a folder of images, and the dataset to make from it.

    Args:
        table: CSV, TSV or Parquet file with a row per image.
        folder: Instead of a table: folder that is searched for images.
        pattern: With folder: regular expression that every path (relative to it, with '/') matches as a whole; its
            named groups become columns, one of them patient. Empty takes every path, where an image is a patient.
        out: Dataset folder to write.
        root: Folder that the image paths are relative to; empty for the table's folder.
        name: The dataset's name; empty for the name of the output folder.
        image_column: Column of image paths.
        patient_column: Column of patients, the unit that never crosses splits.
        patient_is: What that column holds. Where patients are not known, "slide", "group" (such as the tiles of a
            region) or "image" stands for them, and every result says so. With "image" the column is not read: each
            image is a patient of its own, and split together with its near-duplicates.
        slide_column: Column of slides; empty if slides are not known, then the patient stands for it.
        key_column: Column of unique keys; empty to use the image path without its ending, dots replaced by '-'.
        x_column: Column of left edges in level-0 pixels; empty if not known.
        y_column: Column of top edges in level-0 pixels; empty if not known.
        class_field: Class column; empty if there is none.
        categorical: Categorical columns.
        continuous: Continuous columns.
        units: Unit by continuous column, such as {age: years}.
        extra: Further columns to keep as text; they are no fields.
        split_column: Column with the part (train, test and, if there are, val and probe) of each image in a split that
            exists already; it becomes the split main. An empty cell is in no part.
        allow_duplicates: Patients whose pictures may be in several parts of that split under different patients; ["*"]
            for all. Otherwise such a split is refused.
        patch_size: Edge of a stored patch, in pixels; no image is smaller.
        source_mpp: Resolution of the images, in µm per pixel; it is never assumed.
        source_mpp_column: Column of resolutions, where images differ; replaces source_mpp.
        mpp: Resolution of the stored patches, in µm per pixel; 0 to store each image whole.
        tile: With mpp: cut as many patches as fit next to each other, instead of the middle one.
        codec: png (lossless), jpg or webp.
        patches_per_shard: Patches per tar.
        jobs: Processes.
        dask: Address of a Dask scheduler that images are sent to instead, such as tcp://host:8786.
        max_bad: Largest share of images that may be rejected, 0 to 1; with more the import fails.
    """

    COMMON: ClassVar = (
        "table folder pattern out class_field categorical patient_column patch_size source_mpp mpp split_column jobs"
    )
    EXAMPLES: ClassVar = (
        "latent-medi shards images table=patches.csv --categorical site gender patch_size=256 out=my/data",
        "latent-medi shards images folder=images pattern='(?P<class>\\w+)/(?P<patient>\\w+)_\\d+\\.png' out=my/data",
    )

    table: PathText = ""
    folder: PathText = ""
    pattern: str = ""
    out: PathText = ""
    root: PathText = ""
    name: str = ""
    image_column: str = "image"
    patient_column: str = "patient"
    patient_is: Literal["patient", "slide", "image", "group"] = "patient"
    slide_column: str = ""
    key_column: str = ""
    x_column: str = ""
    y_column: str = ""
    class_field: str = "class"
    categorical: list[str] = field(default_factory=list)
    continuous: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    split_column: str = ""
    allow_duplicates: list[str] = field(default_factory=list)
    patch_size: PositiveInt = 256
    source_mpp: NonNegativeFloat = 0.0
    source_mpp_column: str = ""
    mpp: NonNegativeFloat = 0.0
    tile: bool = False
    codec: Codec = "png"
    patches_per_shard: PositiveInt = 512
    jobs: int = 1
    dask: str = ""
    max_bad: UnitInterval = 0.01


@dataclass
class SlideSettings(Settings):
    """Whole slides, and how patches are cut from them.

    Args:
        source: Folder that is searched for slides, through links too; or the folder that the table's slide paths are
            relative to.
        table: CSV, TSV or Parquet file with a row per slide; empty to take every slide in source, without fields.
        out: Dataset folder to write.
        name: The dataset's name; empty for the name of the output folder.
        slide_column: Column of the table with the slides' files, with or without folder and ending.
        key_column: Column of unique names that the patches' keys begin with; empty for the name of the slide's file,
            with its folder where two have the same name.
        patient_column: Column of patients, the unit that never crosses splits. Without a table the patient is that of
            the TCGA barcode in the file's name, or the slide itself.
        class_field: Class column; empty if there is none.
        categorical: Categorical columns.
        continuous: Continuous columns.
        units: Unit by continuous column, such as {age: years}.
        extra: Further columns to keep as text; they are no fields.
        mpp_table: CSV with columns slide and mpp (µm per pixel of level 0), which replaces that of the files.
        patch_size: Edge of a patch, in pixels.
        mpp: Resolution of the patches, in µm per pixel; a slide that is coarser is skipped, never enlarged.
        overlap: Share of a patch that its neighbour covers too, 0 to below 1.
        min_tissue: Least share of tissue in a patch, 0 to 1.
        max_patches: Most patches per slide, chosen at random; 0 for all.
        max_white: Largest share of a patch that may be near-white, 0 to 1.
        max_black: Largest share of a patch that may be near-black, 0 to 1.
        min_sharpness: Least variance of the Laplacian of the brightness (0 to 255); 0 keeps blurred patches.
        icc: "ignore" stores pixels as the scanner delivered them; "srgb" converts them by the embedded profile.
        codec: png (lossless), jpg or webp.
        seed: Seed of the choice of patches.
        jobs: Slides that are read at the same time.
        dask: Address of a Dask scheduler that slides are sent to instead, such as tcp://host:8786.
        timeout: Seconds after which a slide's process is killed and the slide quarantined.
        memory: GiB of memory that a slide's process may use.
        max_unreadable: Largest share of a slide's patches that may be unreadable, 0 to 1; beyond it the slide is
            quarantined.
        dry_run: Only count, and estimate bytes and time.
        contact_sheets: Whether to write a thumbnail with the patch grid for each slide.
    """

    COMMON: ClassVar = "source table out class_field categorical patch_size mpp min_tissue max_patches jobs dry_run"
    EXAMPLES: ClassVar = (
        "latent-medi shards slides source=slides table=slides.csv class_field=class out=my/data jobs=8",
        "latent-medi shards slides source=slides mpp=0.5 patch_size=256 out=my/data dry_run=true",
    )

    source: PathText = ""
    table: PathText = ""
    out: PathText = ""
    name: str = ""
    slide_column: str = "slide"
    key_column: str = ""
    patient_column: str = "patient"
    class_field: str = ""
    categorical: list[str] = field(default_factory=list)
    continuous: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    mpp_table: PathText = ""
    patch_size: PositiveInt = 256
    mpp: float = 0.5
    overlap: Annotated[float, Range(0, 1, below=True)] = 0.0
    min_tissue: UnitInterval = 0.5
    max_patches: NonNegativeInt = 0
    max_white: UnitInterval = 0.8
    max_black: UnitInterval = 0.3
    min_sharpness: NonNegativeFloat = 0.0
    icc: Literal["ignore", "srgb"] = "ignore"
    codec: Codec = "png"
    seed: int = 0
    jobs: PositiveInt = 1
    dask: str = ""
    timeout: PositiveFloat = 1800.0
    memory: NonNegativeFloat = 4.0
    max_unreadable: UnitInterval = 0.1
    dry_run: bool = False
    contact_sheets: bool = True


def field_columns(settings: ImportSettings | SlideSettings) -> list[str]:
    """Columns of the fields: the class first, if there is one, then the categorical and the continuous ones."""
    return [*([settings.class_field] if settings.class_field else []), *settings.categorical, *settings.continuous]


@dataclass
class ExportSettings(Settings):
    """A dataset folder, and the form to write it in.

    Args:
        data: Dataset folder.
        out: New folder to write.
        split: Named split whose parts are written separately; empty for all patches together.
        parts: Parts to write; none for every part.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them. Fields that are not named
            keep all.
        selected: Column of a selection, such as selected_best: only the patches that it selected; empty for all.
        format: "webdataset" (tars) or "folder" (images by class, and a CSV); both with the Hub's README.
        patches_per_shard: Patches per tar.
    """

    COMMON: ClassVar = "data out split parts format"
    EXAMPLES: ClassVar = (
        "latent-medi export my/data split=main out=hub",
        "latent-medi export my/samples format=folder selected=selected_best out=images",
    )

    data: PathText = ""
    out: PathText = ""
    split: str = ""
    parts: list[str] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=dict)
    selected: str = ""
    format: Literal["webdataset", "folder"] = "webdataset"
    patches_per_shard: PositiveInt = 2048


@dataclass
class JoinSettings(Settings):
    """Dataset folders, and the one that holds the patches of all of them; also as `shards join OUT FOLDER FOLDER …`.

    Args:
        out: Dataset folder to write.
        folders: Dataset folders, two or more (one with ``without``), of one patch size, resolution and codec.
        name: The dataset's name; empty for the name of the output folder.
        names: Name of each folder, which `mixture` and ``patients=separate`` use; empty for the folders' own names.
        patients: What patients of the same name in several folders are. "refuse" stops at them. "same": one person.
            "separate": different persons; every patient, slide and key then begins with its folder's name, as in
            north/12.
        slides: What slides of the same name of such a patient are. "refuse" stops at them. "same": one slide, of which
            the folders hold different patches.
        without: Dataset folders whose patients are not to be trained on, such as the labelled ones that a pre-trained
            model is adapted to and tested on. The split "corpus" then has all other patients in its part "train";
            patients with one of their names, or with one of their pictures, are in no part.
        unlabelled: Split and part of the ``without`` folders whose patients may be trained on after all, such as {main:
            unlabelled}. Of a folder that is also joined, these patients alone are.
        any_mpp: Join folders of different resolutions, for a model that is to draw any tissue. The joined folder has
            that of the first ``without`` folder, whose patches the model is adapted to draw, or else the first one's;
            ``source_mpp`` of a patch stays its own.
    """

    COMMON: ClassVar = "out folders patients without name"
    EXAMPLES: ClassVar = (
        "latent-medi shards join both north south",
        "latent-medi shards join corpus tcga own patients=separate --without own",
    )

    out: PathText = ""
    folders: list[PathText] = field(default_factory=list)
    name: str = ""
    names: list[str] = field(default_factory=list)
    patients: Literal["refuse", "same", "separate"] = "refuse"
    slides: Literal["refuse", "same"] = "refuse"
    without: list[PathText] = field(default_factory=list)
    unlabelled: dict[str, str] = field(default_factory=dict)
    any_mpp: bool = False


@dataclass
class InfoSettings(Settings):
    """A dataset folder whose patches are counted.

    Args:
        data: Dataset folder.
        unit: What to count: "patches", "slides" or "patients".
        figures: Folder for a heat map of every pair of fields; empty for none.
    """

    COMMON: ClassVar = "data unit figures"
    EXAMPLES: ClassVar = (
        "latent-medi shards info runs/demo/data",
        "latent-medi shards info my/data unit=patients figures=figures",
    )

    data: PathText = ""
    unit: Literal["patches", "slides", "patients"] = "patches"
    figures: PathText = ""


@dataclass
class VerifySettings(Settings):
    """A folder whose every file is read; damaged, missing and inconsistent files are named.

    Args:
        data: Dataset folder; or latents, a model, an adapter, a latent classifier or the run that made one.
        seal: Also write the checksums that a folder of an earlier version lacks, if nothing is wrong with it.
    """

    COMMON: ClassVar = "data seal"
    EXAMPLES: ClassVar = (
        "latent-medi shards verify runs/demo/data",
        "latent-medi shards verify my/run/model",
    )

    data: PathText = ""
    seal: bool = False
