"""The fields of a TCGA-UT folder in a table of the GDC, which has them under other names."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from latent_medi.core.progress import get_logger
from latent_medi.metadata.tcga import CLINICAL, clinical_fields, site_codes
from latent_medi.metadata.tcga_cancers import cancer_of

logger = get_logger(__name__)

CLASS, SITE_CODE = "class", "tss"
"""Names of the class and of the site code in a TCGA-UT folder."""
SITE_CODE_COLUMNS = ("tissue_source_site", "tss", "tss_code")
"""Names of columns of site codes."""
_PERSONAL = ("gender", "race", "ethnicity", "age")
_said: set[str] = set()


def with_folder_fields(
    table: pd.DataFrame, names: Sequence[str], barcodes: str, where: str, code_field: str = ""
) -> pd.DataFrame:
    """A table with those of some columns that it lacks and that follow from the GDC's: a plan or a split made from the
    table then has the names and values of a TCGA-UT folder.

    ``class`` is the cancer of the project, ``tss`` the site code in the barcode, and gender, race, ethnicity and age
    are the GDC's columns with all words for missing data as ``"unknown"``. What is added is logged once per table.

    Args:
        table: Cells as text.
        names: The columns that are wanted; one that does not follow from the table stays absent.
        barcodes: The column of TCGA barcodes; ``""`` if there is none: nothing is added then.
        where: The table, for messages.
        code_field: A field of institutions that are to be found by their codes; it gets the codes.

    Raises:
        UserError: A project, an age or a barcode cannot be read.
    """
    columns: dict[str, list[str]] = {}
    from_columns: list[str] = []
    for name in dict.fromkeys(names):
        if not barcodes or name in table.columns:
            continue
        source = next(
            (column for column in CLINICAL.get("project" if name == CLASS else name, ()) if column in table), ""
        )
        if name in (SITE_CODE, code_field):
            listed = next((column for column in SITE_CODE_COLUMNS if column in table), None)
            columns[name] = site_codes(table[barcodes], table[listed] if listed else None)
            from_columns.append(f"{name} is the site code in {barcodes}")
        elif name == CLASS and source:
            cancers = {project: cancer_of(project) for project in table[source].unique()}
            columns[name] = table[source].map(cancers).tolist()
            first, cancer = next(iter(cancers.items()))
            from_columns.append(f"{name} is the cancer of {source} ({first} is {cancer})")
        elif name in _PERSONAL and source:
            columns[name] = clinical_fields(table)[name].tolist()
            from_columns.append(f"{name} is {source}")
    if from_columns and (note := f"{where} has the GDC's columns: {', '.join(from_columns)}.") not in _said:
        _said.add(note)
        logger.info("%s", note)
    return table.assign(**columns)
