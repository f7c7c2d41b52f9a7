"""TCGA's projects and the cancers of TCGA-UT: two names of the same 32 classes.

The GDC's tables name a project (``TCGA-LUAD``), TCGA-UT's folders and labels a cancer (``Lung_adenocarcinoma``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger

logger = get_logger(__name__)

CANCERS = {
    "ACC": "Adrenocortical_carcinoma",
    "BLCA": "Bladder_Urothelial_Carcinoma",
    "BRCA": "Breast_invasive_carcinoma",
    "CESC": "Cervical_squamous_cell_carcinoma_and_endocervical_adenocarcinoma",
    "CHOL": "Cholangiocarcinoma",
    "COAD": "Colon_adenocarcinoma",
    "DLBC": "Lymphoid_Neoplasm_Diffuse_Large_B-cell_Lymphoma",
    "ESCA": "Esophageal_carcinoma",
    "GBM": "Glioblastoma_multiforme",
    "HNSC": "Head_and_Neck_squamous_cell_carcinoma",
    "KICH": "Kidney_Chromophobe",
    "KIRC": "Kidney_renal_clear_cell_carcinoma",
    "KIRP": "Kidney_renal_papillary_cell_carcinoma",
    "LGG": "Brain_Lower_Grade_Glioma",
    "LIHC": "Liver_hepatocellular_carcinoma",
    "LUAD": "Lung_adenocarcinoma",
    "LUSC": "Lung_squamous_cell_carcinoma",
    "MESO": "Mesothelioma",
    "OV": "Ovarian_serous_cystadenocarcinoma",
    "PAAD": "Pancreatic_adenocarcinoma",
    "PCPG": "Pheochromocytoma_and_Paraganglioma",
    "PRAD": "Prostate_adenocarcinoma",
    "READ": "Rectum_adenocarcinoma",
    "SARC": "Sarcoma",
    "SKCM": "Skin_Cutaneous_Melanoma",
    "STAD": "Stomach_adenocarcinoma",
    "TGCT": "Testicular_Germ_Cell_Tumors",
    "THCA": "Thyroid_carcinoma",
    "THYM": "Thymoma",
    "UCEC": "Uterine_Corpus_Endometrial_Carcinoma",
    "UCS": "Uterine_Carcinosarcoma",
    "UVM": "Uveal_Melanoma",
}
"""The cancer by project, without the "TCGA-" before it."""

_PROJECTS = {cancer: f"TCGA-{project}" for project, cancer in CANCERS.items()}


def cancer_of(project: str) -> str:
    """The cancer of a project, as TCGA-UT names it: ``TCGA-LUAD`` or ``LUAD``, in any case, is Lung_adenocarcinoma.

    Raises:
        UserError: It is none of the 32 projects.
    """
    cancer = CANCERS.get(project.strip().upper().removeprefix("TCGA-"))
    if cancer is None:
        known = sorted(_PROJECTS.values())
        raise UserError(
            f"{project!r} is none of the 32 projects of TCGA-UT; {nearest(project, known)}.",
            "Leave those rows out, or name the column of classes with class_field=….",
        )
    return cancer


def project_of(cancer: str) -> str:
    """The project of one of TCGA-UT's cancers: Lung_adenocarcinoma is ``TCGA-LUAD``.

    Raises:
        UserError: It is none of the 32 cancers.
    """
    project = _PROJECTS.get(cancer.strip())
    if project is None:
        raise UserError(f"{cancer!r} is none of the 32 cancers of TCGA-UT; {nearest(cancer, sorted(_PROJECTS))}.")
    return project


def other_names(values: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The known name of each value that is not known itself but by its other name, project or cancer.

    Args:
        values: Classes, such as those of a plan.
        known: Classes, such as those of a model.
    """
    found = {}
    for value in dict.fromkeys(values):
        if value in known:
            continue
        other = CANCERS.get(value.upper().removeprefix("TCGA-")) or _PROJECTS.get(value)
        names = [other, *([other.removeprefix("TCGA-")] if value in _PROJECTS else [])] if other else []
        if name := next((name for name in names if name in known), None):
            found[value] = name
    return found


def with_known_names(column: pd.Series, known: Collection[str], where: str) -> pd.Series:
    """A column of classes with those that are known by their other name alone under that name; the log says so.

    Args:
        column: Classes, as text.
        known: Classes of a model.
        where: The table, for the log.
    """
    names = other_names(column.unique(), known)
    if not names:
        return column
    first, name = next(iter(names.items()))
    logger.info("%s: %d classes are known by TCGA's other name, such as %s as %s", where, len(names), first, name)
    return column.replace(names)
