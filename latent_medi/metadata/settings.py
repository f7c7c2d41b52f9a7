"""Settings of the audit and of splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeInt, Range, Settings, UnitInterval


@dataclass
class AuditSettings(Settings):
    """Count the combinations of class, site and other fields in a dataset, and report which ones it lacks.

    Args:
        data: Dataset folder, or a CSV, TSV or Parquet table with a row per slide or patch.
        split: Split of a dataset folder to audit; empty for all rows.
        split_value: Part of that split, such as train.
        only: Values by field, such as {class: [LUAD, LUSC]}: only rows with one of them are counted. Fields that are
            not named keep all.
        class_field: Class column of a table. A dataset folder names its own.
        site_field: Field of the hospital; its association with the class is reported.
        fields: Further categorical columns of a table, such as [gender, race].
        continuous: Continuous columns of a table, such as [age].
        patient_field: Patient column of a table; empty for patient, case_submitter_id or the TCGA barcode.
        slide_field: Slide column of a table; empty for slide or slide_submitter_id, else each row is a slide.
        tss_table: GDC's table of TCGA tissue source sites, to replace the site's codes by institutions.
        thin_patients: A combination with fewer patients is thin; without a patch, one that rests on fewer effective
            patients (those who would tell as much of it if they had it).
        requested: Combinations to give a verdict on, each a value by field; empty for all combinations of class and
            categorical fields.
        figure: PNG to write, a heat map of patients by class and site.
        duplicates: Report pictures that several patients of a dataset folder share. For a folder of an earlier version
            this reads all patches.
    """

    COMMON: ClassVar = "data split site_field fields only tss_table figure"
    EXAMPLES: ClassVar = (
        "latent-medi audit runs/demo/data figure=combinations.png",
        "latent-medi audit slides.csv class_field=diagnosis site_field=hospital --fields gender race",
    )

    data: PathText = ""
    split: str = ""
    split_value: str = "train"
    only: dict[str, list[str]] = field(default_factory=dict)
    class_field: str = "class"
    site_field: str = "site"
    fields: list[str] = field(default_factory=list)
    continuous: list[str] = field(default_factory=list)
    patient_field: str = ""
    slide_field: str = ""
    tss_table: PathText = ""
    thin_patients: NonNegativeInt = 10
    requested: list[dict[str, str]] = field(default_factory=list)
    figure: PathText = ""
    duplicates: bool = True


@dataclass
class SplitSettings(Settings):
    """Split the patients of a dataset into parts. Held-out sites and combinations go to one part; other patients are
    divided at random. Other schemes are those that MeDi was published with.

    Args:
        data: Dataset folder, whose index gets the split as a column; or a CSV, TSV or Parquet table.
        out: Table to write, with the split as a column; only if data is a table.
        table: Table with a row per slide or patient whose split a dataset folder is to have: its column split_NAME or
            split or, with scheme "medi" or another published one, the split that the scheme makes of its rows. Slides
            are found by name, or patients if the table has no slides; slides that it lacks are in no part.
        name: Name of the split; its column is split_NAME.
        replace: Overwrite another split of that name.
        only: Values by field, such as {class: [LUAD, LUSC]}: other rows are in no part. Fields that are not named keep
            all. The scheme "hold_out" divides the patients who are left; a published scheme and the split of a table
            are decided by all rows, and stay what they were for those that are left.
        scheme: "hold_out"; "medi" for the complex split that MeDi was published with; or a simpler rule of MeDi's code:
            "every_fourth_patient", or "every_fourth_site" of each class. The order of rows decides in "medi" and
            "every_fourth_patient", so that a dataset folder needs the table.
        fractions: Share of the patients that are not held out, by part; the shares add up to 1.
        seed: Seed of all random choices.
        allow_duplicates: Patients of a dataset folder who share pictures and may nevertheless be in different parts;
            ["*"] for all. Other patients who share a picture are kept in one part.
        stratify: Fields whose combinations are spread evenly over the parts.
        hold_out: Combinations to hold out, each a value by field.
        hold_out_fields: Two or more fields, such as [site, race], to hold out random combinations of.
        hold_out_share: Share of the combinations of hold_out_fields to hold out.
        sites: Sites to hold out, as an external test.
        site_share: Hold out random sites that have this share of the patients; 0 for none.
        hold_out_part: The part of held-out patients.
        hold_out_fractions: Shares by part to divide held-out patients over, instead of hold_out_part. With
            {probe: 0.4, test: 0.6} an evaluation can train its oracle and its linear probes on real patients of the
            held-out combinations who are not test patients. Each combination is divided.
        thin_patients: Patients of each value that hold_out_fields does not hold out, at least.
        class_field: Class column.
        site_field: Site column.
        medi_fields: Scheme "medi": columns whose combinations with the site are divided.
        medi_share: Scheme "medi": share of combinations for training.
        patient_field: Patient column of a table; empty for patient, case_submitter_id or the TCGA barcode.
        slide_field: Slide column of a table; empty for slide or slide_submitter_id, else each row is a slide.
    """

    COMMON: ClassVar = "data name fractions hold_out hold_out_fields sites seed out replace"
    EXAMPLES: ClassVar = (
        "latent-medi split my/data hold_out='[{class: gleason4, site: north}]'",
        "latent-medi split slides.csv --sites north south out=split.csv",
    )

    data: PathText = ""
    out: PathText = ""
    table: PathText = ""
    name: str = "main"
    replace: bool = False
    only: dict[str, list[str]] = field(default_factory=dict)
    scheme: Literal["hold_out", "medi", "every_fourth_patient", "every_fourth_site"] = "hold_out"
    fractions: dict[str, UnitInterval] = field(default_factory=lambda: {"train": 0.7, "test": 0.3})
    seed: int = 0
    allow_duplicates: list[str] = field(default_factory=list)
    stratify: list[str] = field(default_factory=list)
    hold_out: list[dict[str, str]] = field(default_factory=list)
    hold_out_fields: list[str] = field(default_factory=list)
    hold_out_share: UnitInterval = 0.3
    sites: list[str] = field(default_factory=list)
    site_share: Annotated[float, Range(0, 1, below=True)] = 0.0
    hold_out_part: str = "test"
    hold_out_fractions: dict[str, UnitInterval] = field(default_factory=dict)
    thin_patients: NonNegativeInt = 10
    class_field: str = "class"
    site_field: str = "site"
    medi_fields: list[str] = field(default_factory=lambda: ["gender", "race"])
    medi_share: UnitInterval = 0.7
    patient_field: str = ""
    slide_field: str = ""
