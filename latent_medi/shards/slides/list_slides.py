"""The slides of a folder or a table, each with its key, patient and resolution.

A slide that has no usable name or file is left out with its reason, before any work starts; the others stay.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.metadata.field_names import check_new_names
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tables import read_table, require_columns, say_what_is_left, settings_of_columns
from latent_medi.metadata.tcga import is_tcga, parse_barcode, slide_key
from latent_medi.shards.importing.find_files import find_files, without_copies
from latent_medi.shards.importing.resolution import MPP_RANGE, check_mpp
from latent_medi.shards.settings import SlideSettings, field_columns
from latent_medi.shards.writing.patch import check_key

logger = get_logger(__name__)

EXTENSIONS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi")
"""Endings of slides that a folder is searched for. Not ``.dcm``: a DICOM slide is many files, each of which opens the
whole slide; name one of them in a table.
"""
_MOST_BYTES = 155  # of a key: what a tar's header holds before the last slash
_SHORTENED_BYTES = 110
_MOST_OF_ONE_PERSON = 20  # slides whose names differ at the end only; more are a study's rather than a person's
_MOST_NAMED = 5
_COLUMN_SETTINGS = (
    *("slide_column", "patient_column", "key_column"),
    *("class_field", "categorical", "continuous", "extra"),
)


@dataclass
class ListedSlide:
    """One slide.

    Args:
        path: Its file.
        name: The user's name for it: the table's cell, or the path below the folder.
        stem: Its name without folder and ending.
        row: Its row of the table; empty without one.
        key: Prefix of its patches' keys, unique.
        patient: Its patient.
        mpp: µm per pixel of level 0, or ``None`` to ask the file.
        fault: Why it is left out; ``""`` if it is not.
    """

    path: Path
    name: str
    stem: str = ""
    row: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    patient: str = ""
    mpp: float | None = None
    fault: str = ""


def list_slides(settings: SlideSettings) -> tuple[list[ListedSlide], Schema]:
    """The slides, in the order of the table or of their paths, and the schema of their fields.

    Raises:
        UserError: There is no slide; a table lacks what the settings name; two slides have the same key by its key
            column, or are the same file; a slide has no patient; ``mpp_table`` cannot be followed.
    """
    root = Path(settings.source) if settings.source else Path(settings.table).parent
    columns = [*field_columns(settings), *settings.extra, *([settings.key_column] if settings.key_column else [])]
    if settings.table:
        slides, schema = _of_table(root, columns, settings)
    elif columns:
        raise UserError(f"The columns {columns} need a table, and none is given.", "table=…")
    else:
        slides, schema = _of_folder(root), Schema()
    for slide in (slide for slide in slides if not slide.fault):
        _set_key(slide, settings)
    good = [slide for slide in slides if not slide.fault]
    if settings.key_column:
        _refuse_equal_keys(good, settings)
    else:
        _make_keys_unique(good, root)
    for slide in good:
        _set_patient(slide, settings)
    if not settings.table:
        _warn_of_patients([slide for slide in good if not slide.fault])
    if settings.mpp_table:
        _set_resolutions(slides, settings.mpp_table)
    return slides, schema


def _of_folder(root: Path) -> list[ListedSlide]:
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.", "Give a folder of slides, or a table that names them.")
    found = find_files(root, EXTENSIONS)
    if not found.files and not found.left_out:
        raise UserError(f"{root} holds no slide ({', '.join(EXTENSIONS)}).")
    files = without_copies(found.files, root)  # a copy would become a second patient
    slides = [ListedSlide(path, path.relative_to(root).as_posix(), path.stem) for path in files]
    slides += [
        ListedSlide(path, Path(os.path.relpath(path, root)).as_posix(), fault=why) for path, why in found.left_out
    ]
    return sorted(slides, key=lambda slide: slide.path)


def _of_table(root: Path, columns: list[str], settings: SlideSettings) -> tuple[list[ListedSlide], Schema]:
    check_new_names(field_columns(settings), settings.extra, settings.continuous)
    table = read_table(settings.table)
    where = f"The table of slides {settings.table}"
    named = settings_of_columns(settings, *_COLUMN_SETTINGS)
    require_columns(table, [settings.slide_column, settings.patient_column, *columns], where, named)
    if not len(table):
        raise UserError(f"{where} has no row.")
    taken = [getattr(settings, name) for name in ("slide_column", "patient_column", "key_column")]
    say_what_is_left(table, [*taken, *columns], where)
    finder = _Finder(root)
    slides = []
    numbers: dict[str, int] = {}
    for number, row in enumerate(table.astype(str).to_dict(orient="records"), start=1):
        slides.append(slide := finder.find(row, settings.slide_column, number))
        first = number if slide.fault else numbers.setdefault(os.path.realpath(slide.path), number)
        if first != number:
            rows = f"Rows {first} and {number} of {settings.table}, not counting its header,"
            raise UserError(f"{rows} name the same slide: {slide.path}.", "Keep one of them.")
    fields = (settings.class_field or None, settings.categorical, settings.continuous, settings.units)
    return slides, Schema.from_table(table, *fields)


class _Finder:
    """Finds the file that a table's cell names by its path, or by the end of its path, with or without the ending."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[tuple[str, Path]]] | None = None

    def find(self, row: Mapping[str, str], column: str, number: int) -> ListedSlide:
        cell = row[column]
        if is_missing(cell) or re.search(r"[\x00-\x1f\x7f]", cell):
            fault = f"row {number} of the table, not counting its header, names no slide: {cell!r}"
            return ListedSlide(self.root, cell or f"row {number}", row=row, fault=fault)
        path = self.root / cell
        if os.path.lexists(path) and not os.path.isdir(path):  # a MIRAX slide has a folder of its name
            return ListedSlide(path, cell, path.stem, row)
        fits = self._below(cell)
        if len(fits) == 1:
            return ListedSlide(fits[0], cell, fits[0].stem, row)
        if fits:
            names = ", ".join(str(path.relative_to(self.root)) for path in fits[:_MOST_NAMED])
            fault = f"ambiguous: {len(fits)} files are meant ({names}); write the path below source"
            return ListedSlide(path, cell, row=row, fault=fault)
        # It may be out of reach for the moment; its key stays the same.
        ending = path.suffix.lower() in (*EXTENSIONS, ".dcm")
        return ListedSlide(path, cell, path.stem if ending else path.name, row)

    def _below(self, cell: str) -> list[Path]:
        if self._by_name is None:
            self._by_name = defaultdict(list)
            try:
                files = find_files(self.root, EXTENSIONS).files
            except UserError:  # out of reach: what was cut before is kept
                files = []
            for path in files:
                for name in {path.name, path.stem}:
                    shown = path.relative_to(self.root).with_name(name).as_posix()
                    self._by_name[_normal(name)].append(("/" + _normal(shown), path))
        wanted = _normal(cell.replace("\\", "/"))
        listed = self._by_name.get(wanted.rsplit("/", 1)[-1], [])
        fits = [path for shown, path in listed if shown.endswith("/" + wanted)]
        return sorted({os.path.realpath(path): path for path in reversed(fits)}.values())


def _normal(text: str) -> str:
    """Text in one Unicode form: file names of macOS and of some archives hold ü as u and two dots, tables do not."""
    return unicodedata.normalize("NFC", text)


def _set_key(slide: ListedSlide, settings: SlideSettings) -> None:
    """Set the slide's key, or its fault."""
    if settings.key_column:
        slide.key = slide.row[settings.key_column]
        remedy = f"mend it in the column {settings.key_column!r}"
    else:
        slide.key, remedy = _key(slide), "rename the file, or name it by key_column"
    try:
        check_key(slide.key)
    except UserError:
        slide.fault = f"{slide.key!r} cannot be its key: a control character, backslash, dot, blank at an end; {remedy}"
        return
    if settings.key_column and ("/" in slide.key or len(slide.key.encode()) > _MOST_BYTES or is_missing(slide.key)):
        slide.fault = f"{slide.key!r} cannot be its key: a slash, over {_MOST_BYTES} bytes, or empty; {remedy}"
    elif not settings.key_column and len(slide.key.encode()) > _MOST_BYTES:
        slide.key = _shortened(slide.key, slide.key)
        logger.info("%s has a long name: its key is %s", slide.path, slide.key)


def _key(slide: ListedSlide) -> str:
    if is_tcga([slide.path.name]):
        try:
            return slide_key(slide.path.name)
        except UserError:  # such as a patient's barcode: a name like any other
            pass
    return slide.stem.replace(".", "-")


def _shortened(key: str, what: str) -> str:
    short = key.encode()[:_SHORTENED_BYTES].decode(errors="ignore").rstrip()
    return f"{short}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def _refuse_equal_keys(slides: list[ListedSlide], settings: SlideSettings) -> None:
    seen: dict[str, ListedSlide] = {}
    for slide in slides:
        if (first := seen.setdefault(slide.key, slide)) is not slide:
            raise UserError(
                f"{slide.name} and {first.name} have the same {settings.key_column}, {slide.key!r}.",
                f"Make the column {settings.key_column!r} of {settings.table} unique.",
            )


def _make_keys_unique(slides: list[ListedSlide], root: Path) -> None:
    """Add the folder to the keys of slides with equal names, or a hash of the path where that is not enough."""
    alike: dict[str, list[ListedSlide]] = defaultdict(list)
    for slide in slides:
        alike[slide.key].append(slide)
    groups = [group for group in alike.values() if len(group) > 1]
    taken = {key for key, group in alike.items() if len(group) == 1}
    wanted: list[tuple[str, str, ListedSlide]] = []
    for slide in (slide for group in groups for slide in group):
        shown = Path(os.path.relpath(slide.path, root)).as_posix()
        folders = [part.strip().replace(".", "-") for part in shown.split("/")[:-1] if part != ".."]
        wanted.append(("-".join([*folders, slide.key]), shown, slide))
    longer = [key for key, _, _ in wanted]
    for key, shown, slide in wanted:
        alone = longer.count(key) == 1 and key not in taken and len(key.encode()) <= _MOST_BYTES
        slide.key = key if alone and key == key.strip() and "\\" not in key else _shortened(slide.key, shown)
    if groups:
        keys = ", ".join(f"{slide.name}: {slide.key}" for _, _, slide in wanted[:_MOST_NAMED])
        logger.info("%d slides have the name of another; their keys differ: %s", len(wanted), keys)


def _set_patient(slide: ListedSlide, settings: SlideSettings) -> None:
    if settings.table:
        slide.patient = slide.row[settings.patient_column]
        if is_missing(slide.patient):  # never the slide's name: two slides of one person would become two people
            raise UserError(f"{slide.path} has no patient.", "Fill the column: splits are by patient.")
        return
    slide.patient = slide.key
    if is_tcga([slide.path.name]):
        try:
            slide.patient = parse_barcode(slide.path.name).patient
        except UserError:
            slide.fault = "its name begins like a TCGA barcode and is none: rename it, or give its patient (table=…)"


def _warn_of_patients(slides: list[ListedSlide]) -> None:
    """Warn of slides that count as a patient each, and of those among them that may be of one person."""
    own = [slide for slide in slides if slide.patient == slide.key]
    if len(own) < 2:
        return
    text = "%d of %d slides count as a patient each, since their names hold no TCGA barcode: if a patient has several, "
    text += "a split may divide them. Give a table with the columns slide and patient (table=…)"
    logger.warning(text, len(own), len(slides))
    people: dict[str, list[str]] = defaultdict(list)
    for slide in own:
        people[f"{slide.path.parent}/{_key(slide)}"].append(slide.key)  # perhaps one scan in two formats
        # C3L-00001-21, 12345_2, case 7 B: a number, and one more short part.
        if match := re.fullmatch(r"(.*\d.*?)[-_ ]+(?:\d{1,3}|[A-Za-z]{1,2}\d{0,2})", slide.key):
            people[match[1]].append(slide.key)
    several = [keys for keys in people.values() if 1 < len(keys) <= _MOST_OF_ONE_PERSON]
    if several:
        groups = "; ".join(", ".join(keys[:_MOST_NAMED]) for keys in several[:_MOST_NAMED])
        logger.warning("These slides may be of one person (%d such groups): %s", len(several), groups)


def _set_resolutions(slides: list[ListedSlide], path: str) -> None:
    """Set the µm per pixel of slides from a table.

    Raises:
        UserError: The table has no number, names an unknown slide or one of several, or has two values for one.
    """
    table = read_table(path)
    require_columns(table, ["slide", "mpp"], f"The table of resolutions {path}")
    by_name: dict[str, list[ListedSlide]] = defaultdict(list)
    for slide in slides:
        for name in {slide.name, slide.key, slide.path.name, slide.path.stem} - {""}:
            by_name[name].append(slide)
    unused: list[str] = []
    for name, text in zip(table["slide"], table["mpp"], strict=True):
        try:
            value = float(text)
        except ValueError:
            limits = f"it is a number of µm per pixel, from {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}"
            problem = f"{path}: the resolution of {name!r} is {text!r}; {limits}."
            raise UserError(problem, "Write a point for a decimal comma.") from None
        check_mpp(value, f"{path}: the resolution of {name!r}")
        # The key or the path below the folder first: several may have the same name.
        fits = [slide for slide in by_name[name] if name in (slide.key, slide.name)] or by_name[name]
        if len(fits) > 1:
            choices = " or ".join(slide.name for slide in fits[:_MOST_NAMED])
            raise UserError(f"{path} names {name!r}, which may be {choices}.", "Write the path below the folder.")
        unused += [] if fits else [name]
        for slide in fits:
            if slide.mpp not in (None, value):
                raise UserError(f"{path} gives {slide.name} two resolutions: {slide.mpp:g} and {value:g}.", "Keep one.")
            slide.mpp = value
    if unused:
        raise UserError(f"{path} names unknown slides: {sorted(unused)[:5]}.", "Correct the names.")
