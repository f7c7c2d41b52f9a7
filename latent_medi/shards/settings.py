"""Settings of importing images."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ImportSettings:
    """A table of patch images, and what to make of it.

    Args:
        table: CSV, TSV or Parquet file with a row per image.
        out: Dataset folder to write.
        root: Folder that the image paths are relative to; empty for the table's folder.
        name: The dataset's name; empty for the name of the output folder.
        image_column: Column of image paths.
        patient_column: Column of patients, the unit that never crosses splits.
        slide_column: Column of slides; empty if slides are not known, then the patient stands for it.
        key_column: Column of unique keys; empty to use the image path without its ending, dots replaced by '-'.
        x_column: Column of left edges in level-0 pixels; empty if not known.
        y_column: Column of top edges in level-0 pixels; empty if not known.
        class_field: Class column; empty if there is none.
        categorical: Categorical columns.
        continuous: Continuous columns.
        units: Unit by continuous column, such as {age: years}.
        extra: Columns that are carried along as text without being fields.
        patch_size: Edge of a stored patch, in pixels.
        source_mpp: Resolution of the images, in µm per pixel; it is never assumed.
        source_mpp_column: Column of resolutions, where images differ; replaces source_mpp.
        mpp: Resolution of the stored patches, in µm per pixel; 0 to store each image whole.
        codec: png (lossless) or jpg.
        patches_per_shard: Patches per tar.
        jobs: Processes.
        max_bad: Largest share of images that may be rejected, 0 to 1; beyond it nothing is finished.
    """

    table: str = ""
    out: str = ""
    root: str = ""
    name: str = ""
    image_column: str = "image"
    patient_column: str = "patient"
    slide_column: str = ""
    key_column: str = ""
    x_column: str = ""
    y_column: str = ""
    class_field: str = "class"
    categorical: list[str] = field(default_factory=list)
    continuous: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    patch_size: int = 256
    source_mpp: float = 0.0
    source_mpp_column: str = ""
    mpp: float = 0.0
    codec: str = "png"
    patches_per_shard: int = 512
    jobs: int = 1
    max_bad: float = 0.01
