"""TCGA's names: barcodes, tissue source sites mapped to institutions, and the clinical fields of the GDC.

A tissue-source-site code stands for a *(hospital, study)* pair. No code occurs in two cancer types, so a model that is
conditioned on codes is conditioned on the class. Institutions are shared between cancer types: a "site" is an
institution. The code table is not part of this package: download "Tissue Source Site Codes" from
https://gdc.cancer.gov/resources-tcga-users/tcga-code-tables as a tab-separated file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.metadata.fields import UNKNOWN_WORD, is_missing
from latent_medi.metadata.tables import read_table, require_columns

logger = get_logger(__name__)

CODE_TABLE_SOURCE = "https://gdc.cancer.gov/resources-tcga-users/tcga-code-tables/tissue-source-site-codes"
INSTITUTIONS = Path(__file__).with_name("tcga_institutions.csv")
"""Table of source sites with their institution and kind (hospital, network, broker, none); a source site that is not
listed is its own institution."""

_SLIDE_UUID = re.compile(r"\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)
_BARCODE = re.compile(
    r"TCGA-(?P<tss>[A-Z0-9]{2})-(?P<participant>[A-Z0-9]{4})"
    r"(?:-(?P<sample>[0-9]{2})(?P<vial>[A-Z])?"
    r"(?:-(?P<portion>[0-9]{2})"
    r"(?:-(?P<slide>(?:DX|TS|BS|MS)[A-Z0-9]{1,3})"
    r"|(?P<analyte>[A-Z])(?:-(?P<plate>[A-Z0-9]{4})(?:-(?P<center>[0-9]{2}))?)?)?)?)?"
)


@dataclass(frozen=True)
class Barcode:
    """The parts of a TCGA barcode in upper case; parts that it does not have are ``""``.

    Args:
        tss: Tissue source site, two characters; ``"NA"`` and ``"01"`` are codes.
        participant: Four characters.
        sample: Sample type, two digits: 01–09 tumour, 10–19 normal.
        vial: One letter.
        portion: Two digits.
        analyte: One letter; aliquots only.
        plate: Four characters; aliquots only.
        center: Two digits; aliquots only.
        slide: Such as ``DX1`` (diagnostic, FFPE) or ``TS1``, ``BS1``, ``MS1`` (frozen); slides only.
    """

    tss: str
    participant: str
    sample: str = ""
    vial: str = ""
    portion: str = ""
    analyte: str = ""
    plate: str = ""
    center: str = ""
    slide: str = ""

    @property
    def patient(self) -> str:
        """The first 12 characters, which name the patient."""
        return f"TCGA-{self.tss}-{self.participant}"

    @property
    def tumour(self) -> bool | None:
        """Whether the sample is tumour tissue; ``None`` if the barcode has no sample."""
        return 1 <= int(self.sample) <= 9 if self.sample else None

    @property
    def frozen(self) -> bool | None:
        """Whether the slide is a frozen section; ``None`` if the barcode has no slide."""
        return not self.slide.startswith("DX") if self.slide else None

    def __str__(self) -> str:
        parts = [self.patient, self.sample + self.vial, self.portion + self.analyte, self.slide or self.plate]
        return "-".join(part for part in [*parts, self.center] if part)


def parse_barcode(text: str) -> Barcode:
    """The barcode in a name such as ``TCGA-3L-AA1B-01Z-00-DX1.8923A151-….svs``, in any case.

    The folder, the file ending and the UUID of the slide are ignored.

    Raises:
        UserError: The name is no barcode.
    """
    name = str(text).replace("\\", "/").rsplit("/", 1)[-1].strip()
    stem = name if re.fullmatch(_BARCODE, name.upper()) else re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name)
    stem = _SLIDE_UUID.sub("", stem)
    match = _BARCODE.fullmatch(stem.upper())
    if match is None:
        raise UserError(f"{text!r} is no TCGA barcode.", "Examples: TCGA-02-0001, TCGA-02-0001-01Z-00-DX1.")
    return Barcode(**{part: value or "" for part, value in match.groupdict().items()})


def slide_key(text: str) -> str:
    """The barcode of a slide without folder, UUID and ending, as a key: keys of a WebDataset have no dots.

    Raises:
        UserError: The name is no barcode of a slide.
    """
    barcode = parse_barcode(text)
    if not barcode.slide:
        raise UserError(
            f"{text!r} is a TCGA barcode, but not of a slide.", "Barcodes of slides end with DX1, TS1 or similar."
        )
    return str(barcode)


def _normal(name: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", name.casefold()).split())


@lru_cache(maxsize=4)
def _institutions(path: Path) -> dict[str, tuple[str, str]]:
    table = read_table(path)
    require_columns(table, ["source_site", "institution", "kind"], str(path))
    listed = {
        _normal(site): (name, kind)
        for site, name, kind in zip(table["source_site"], table["institution"], table["kind"], strict=True)
    }
    # The name of an institution is also an alias of it.
    return {_normal(name): (name, kind) for name, kind in listed.values()} | listed


def institution(source_site: str, aliases: str | Path = INSTITUTIONS) -> tuple[str, str]:
    """The institution of a source site, and its kind.

    Args:
        source_site: Name in the code table; case, blanks and punctuation are ignored.
        aliases: CSV with columns source_site, institution, kind.

    Returns:
        The institution's name, and ``hospital`` (or university, institute), ``network`` (a trial group or biobank of
        several hospitals), ``broker`` (a supplier of specimens collected elsewhere), ``none`` (not a place) or
        ``unlisted``.
    """
    return _institutions(Path(aliases)).get(_normal(source_site), (source_site.strip(), "unlisted"))


def read_site_codes(path: str | Path, aliases: str | Path = INSTITUTIONS) -> pd.DataFrame:
    """Read GDC's table of tissue source sites, and add institutions.

    Args:
        path: The downloaded file (.tsv, or .csv), with the columns ``TSS Code``, ``Source Site`` and ``Study Name``.
        aliases: As for :func:`institution`.

    Returns:
        A row per code: index ``code``; columns ``source_site`` (as written), ``study``, ``institution`` and ``kind``.

    Raises:
        UserError: A column is absent, or a code is listed twice.
    """
    table = read_table(path, strip=False)
    require_columns(table, ["TSS Code", "Source Site", "Study Name"], f"The table of site codes {path}")
    # Every code has two characters; spreadsheets turn 01 into 1.
    codes = table["TSS Code"].str.strip().str.upper().str.zfill(2)
    if (twice := codes[codes.duplicated()]).size:
        raise UserError(f"{path} lists the code {twice.iloc[0]!r} twice.", f"Download it again: {CODE_TABLE_SOURCE}")
    mapped = [institution(name, aliases) for name in table["Source Site"]]
    return pd.DataFrame(
        {
            "source_site": table["Source Site"].to_numpy(),
            "study": table["Study Name"].to_numpy(),
            "institution": [name for name, _ in mapped],
            "kind": [kind for _, kind in mapped],
        },
        index=pd.Index(codes, name="code"),
    )


def site_codes(barcodes: Sequence[str] | pd.Series, column: Sequence[str] | pd.Series | None = None) -> list[str]:
    """The site code of each barcode, checked against a column of codes if there is one.

    Blank cells (a program read the code ``NA`` as missing) and lost leading zeros in the column are ignored.

    Args:
        barcodes: Barcodes of patients, slides or files.
        column: The codes of the same rows in a table.

    Raises:
        UserError: A barcode cannot be read, or contradicts its code.
    """
    found = [_code_of(str(text)) for text in barcodes]
    for text, code, cell in zip(barcodes, found, column if column is not None else found, strict=True):
        listed = str(cell).strip().upper()
        if not is_missing(listed) and listed.zfill(2) != code:
            raise UserError(f"{text!r} is of site {code!r}, but the table says {listed!r}.", "Correct the table.")
    return found


@lru_cache(maxsize=1 << 16)
def _code_of(text: str) -> str:
    return parse_barcode(text).tss


def is_tcga(names: Iterable[str]) -> bool:
    """Whether there are names and all start like TCGA barcodes."""
    names = list(names)
    return bool(names) and all(str(name).strip().upper().startswith("TCGA-") for name in names)


CLINICAL = {
    "patient": ("case_submitter_id", "cases.submitter_id", "submitter_id", "case"),
    "project": ("project_id", "project.project_id", "cases.project.project_id"),
    "gender": ("gender", "demographic.gender", "sex_at_birth", "demographic.sex_at_birth"),
    "race": ("race", "demographic.race"),
    "ethnicity": ("ethnicity", "demographic.ethnicity"),
    "age": ("age_at_index", "demographic.age_at_index"),
}
"""Names of each field in downloads of the GDC, newest last."""

# Further values of the GDC that mean missing.
_NO_ANSWER = {"not allowed to collect", "unspecified", "not specified", "unknown or not reported"}


def clinical_fields(table: pd.DataFrame) -> pd.DataFrame:
    """Patient, project, gender, race, ethnicity and age of a clinical table of the GDC, as far as it has them.

    Args:
        table: A row per slide or case, cells as text.

    Returns:
        The same rows; categorical fields in lower case; ``"unknown"`` for all markers of missing data; age in years
        as text; patient in upper case.

    Raises:
        UserError: There is no patient, or an age is not a number from 0 to 130.
    """
    result = pd.DataFrame(index=table.index)
    for name, aliases in CLINICAL.items():
        column = next((alias for alias in aliases if alias in table.columns), None)
        if column is None:
            continue
        cells = table[column].astype(str).str.strip()
        if name == "patient":
            result[name] = [parse_barcode(cell).patient if is_tcga([cell]) else cell for cell in cells]
        elif name == "age":
            result[name] = [_age(cell) for cell in cells]
        else:
            cells = cells if name == "project" else cells.str.lower()
            gone = cells.map(lambda cell: is_missing(cell) or cell.lower() in _NO_ANSWER)
            result[name] = cells.mask(gone, UNKNOWN_WORD)
    if "patient" not in result:
        raise UserError(
            f"The clinical table has no patient: none of {', '.join(CLINICAL['patient'])}; "
            f"{nearest('case_submitter_id', [str(c) for c in table.columns])}."
        )
    return result


def fields_by_patient(known: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`clinical_fields` merged to one per patient; a patient may have one row per treatment.

    Args:
        known: Rows with ``patient`` and categorical fields; an unknown value is filled from other rows of the patient.

    Returns:
        Index ``patient``; the same columns without ``project``, which may differ between rows.

    Raises:
        UserError: The rows of a patient contradict each other.
    """
    names = [name for name in known.columns if name not in ("patient", "project")]
    result = pd.DataFrame(index=pd.Index(sorted(known["patient"].unique()), name="patient"))
    for name in names:
        pairs = known.loc[known[name] != UNKNOWN_WORD, ["patient", name]].drop_duplicates()
        if (twice := pairs["patient"].duplicated(keep=False)).any():
            patients = pairs.loc[twice, "patient"].unique()
            values = sorted(pairs.loc[pairs["patient"] == patients[0], name])
            raise UserError(
                f"The clinical table contradicts itself: patient {patients[0]!r} has {name} {' and '.join(values)} "
                f"({len(patients)} such patients).",
                "Correct the table.",
            )
        result[name] = pairs.set_index("patient")[name].reindex(result.index).fillna(UNKNOWN_WORD)
    return result


def warn_of_contradictions(patients: pd.Series, table: pd.DataFrame, fields: Iterable[str], where: str) -> None:
    """Log which patients have several values of gender, race or ethnicity.

    Args:
        patients: The patient of each row.
        table: The rows.
        fields: Columns to check; other fields than these three are ignored.
        where: The table, for the message.
    """
    of_a_person = {alias for name in ("gender", "race", "ethnicity") for alias in CLINICAL[name]}
    for name in of_a_person.intersection(fields):
        rows = pd.DataFrame({"patient": patients.to_numpy(), "value": table[name].to_numpy()})
        rows = rows[~rows["value"].map(is_missing)].drop_duplicates()
        several = rows[rows["patient"].duplicated(keep=False)]
        if len(several):
            first = several["patient"].iloc[0]
            values = ", ".join(sorted(several.loc[several["patient"] == first, "value"]))
            count = several["patient"].nunique()
            logger.warning(
                "%s: %d patients have several values of %s, such as %s: %s", where, count, name, first, values
            )


def _age(cell: str) -> str:
    if is_missing(cell) or cell.lower() in _NO_ANSWER:
        return UNKNOWN_WORD
    try:
        years = float(cell)
    except ValueError:
        raise UserError(f"The age {cell!r} is not a number of years.", "Write a point for the decimal comma.") from None
    if not 0 <= years <= 130:
        raise UserError(f"The age {cell!r} is not a number of years from 0 to 130.", "Is it in days?")
    return f"{years:g}"
