"""Settings of the audit and of splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latent_medi.core.paths import PathText


@dataclass
class AuditSettings:
    """What to look for in a dataset folder or a bare table.

    Args:
        data: Dataset folder, or a CSV, TSV or Parquet table with a row per slide or patch.
        split: Named split of a dataset folder to look at; empty for all rows.
        split_value: The part of that split, such as train.
        class_field: Class column of a table; a dataset folder says itself.
        site_field: The field whose graph with the class is examined.
        fields: Further categorical columns of a table, such as [gender, race].
        continuous: Columns of numbers of a table, such as [age].
        patient_field: Patient column of a table; empty for patient or case_submitter_id, or the TCGA barcode's.
        slide_field: Slide column of a table; empty for slide or slide_submitter_id, or each row by itself.
        tss_table: GDC's table of TCGA tissue source sites; the site column's codes become institutions.
        thin_patients: A combination with fewer patients than this is thin.
        requested: Combinations to judge, each a value by field; none for the whole product of class and categorical
            fields.
        figure: PNG to write: patients by class and site.
        duplicates: Whether to tell of pictures that lie under several patients of a dataset folder. One that an earlier
            version wrote is read whole for it.
    """

    data: PathText = ""
    split: str = ""
    split_value: str = "train"
    class_field: str = "class"
    site_field: str = "site"
    fields: list[str] = field(default_factory=list)
    continuous: list[str] = field(default_factory=list)
    patient_field: str = ""
    slide_field: str = ""
    tss_table: PathText = ""
    thin_patients: int = 10
    requested: list[dict[str, str]] = field(default_factory=list)
    figure: PathText = ""
    duplicates: bool = True


@dataclass
class SplitSettings:
    """How to split patients. What is held out (sites, combinations) goes to one part, all other patients are divided
    at random; or MeDi's own scheme.

    Args:
        data: Dataset folder, where the split becomes a column of the index; or a CSV, TSV or Parquet table.
        out: Table to write, with the split as a further column; only for a table.
        name: Name of the split; its column is split_NAME.
        replace: Whether another split of that name may be overwritten.
        scheme: "hold_out", or "medi" for the complex split that MeDi was published with.
        fractions: Share of the patients that are not held out by part; they add up to 1.
        seed: Seed.
        allow_duplicates: Patients of a dataset folder whose pictures may lie in several parts under different patients;
            ["*"] for all. Otherwise patients who share a picture go to one part together.
        stratify: Fields whose combinations are spread evenly over the parts.
        hold_out: Combinations to hold out, each a value by field.
        hold_out_fields: Two or more fields whose combinations are held out at random, such as [site, race].
        hold_out_share: Share of the combinations of hold_out_fields that are held out, 0 to 1.
        sites: Sites to hold out whole (external test).
        site_share: Share of the patients whose sites, chosen at random, are held out whole, 0 to 1; 0 for none.
        hold_out_part: The part that what is held out goes to.
        hold_out_fractions: Shares of what is held out by part, instead of all of it to hold_out_part: with
            {probe: 0.4, test: 0.6} an evaluation has real patients of the held-out combinations to learn from (its
            oracle and probes) that it is not judged on. Each combination is divided.
        thin_patients: Patients that each value of a combination held out at random must keep outside of what is held
            out; the fractions then divide them.
        class_field: Class column.
        site_field: Site column.
        medi_fields: Scheme "medi": columns whose combinations with the site are divided.
        medi_share: Scheme "medi": share of combinations to train on.
        patient_field: Patient column of a table; empty for patient or case_submitter_id, or the TCGA barcode's.
        slide_field: Slide column of a table; empty for slide or slide_submitter_id, or each row by itself.
    """

    data: PathText = ""
    out: PathText = ""
    name: str = "main"
    replace: bool = False
    scheme: Literal["hold_out", "medi"] = "hold_out"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "test": 0.3})
    seed: int = 0
    allow_duplicates: list[str] = field(default_factory=list)
    stratify: list[str] = field(default_factory=list)
    hold_out: list[dict[str, str]] = field(default_factory=list)
    hold_out_fields: list[str] = field(default_factory=list)
    hold_out_share: float = 0.3
    sites: list[str] = field(default_factory=list)
    site_share: float = 0.0
    hold_out_part: str = "test"
    hold_out_fractions: dict[str, float] = field(default_factory=dict)
    thin_patients: int = 10
    class_field: str = "class"
    site_field: str = "site"
    medi_fields: list[str] = field(default_factory=lambda: ["gender", "race"])
    medi_share: float = 0.7
    patient_field: str = ""
    slide_field: str = ""
