"""TCGA-UT: patches of 128 µm of 32 cancer types, from the Hub's WebDataset tars or the class folders of Zenodo.

    latent-medi shards tcga-ut SOURCE OUT --metadata all_slide_metadata.csv --codes tissueSourceSite.tsv

SOURCE holds either ``data/dataset_internal_train_part*.tar`` (and valid, test, external; keys such as
``TCGA-FS-A1Z7-06Z-00-DX7/0_8_521`` with ``{"label": …}``) or ``<Class>/<scale>/<slide>/<region>_<patch>_<pixels>.jpg``.

The third number of a file's name is the side of the crop in the scanner's own pixels. It gives the scan's resolution
(128 µm ÷ pixels), which reveals some hospitals and even classes. So it is removed from the key and kept as the field
``scan_mpp``: a model can be conditioned on it, and an analysis can stratify by it.

The field ``tss`` is the barcode's site code, a hospital in one study. ``--metadata`` is a clinical table of the GDC (a
row per slide or case), joined by barcode; ``--codes`` is its table of tissue source sites, which gives the field
``site``, the institution. Without them there are no such fields. A table with a row per slide, as MeDi's authors
published it, also gives the split ``medi``: theirs, slide by slide. CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.paths import path_argument
from latent_medi.core.progress import get_logger, progress
from latent_medi.metadata.fields import UNKNOWN_WORD
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_from_table import split_from_table
from latent_medi.metadata.split_schemes import Split
from latent_medi.metadata.table_index import SLIDE_COLUMNS
from latent_medi.metadata.tables import read_table
from latent_medi.metadata.tcga import clinical_fields, fields_by_patient, parse_barcode, read_site_codes, slide_key
from latent_medi.recipes._common import Options, recipe_parser
from latent_medi.shards.checking.duplicates import EVERYBODY, allowed, pictures_in_several_parts
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.codec import decode_image
from latent_medi.shards.format.layout import PICTURE
from latent_medi.shards.importing.convert import Source, convert, scaled
from latent_medi.shards.importing.find_files import find_files
from latent_medi.shards.listing import Listing
from latent_medi.shards.writing.finish import Description, Splits
from latent_medi.shards.writing.patch import Patch

logger = get_logger(__name__)

PATCH_UM = 128.0
"""Edge of every patch at scale 0, µm."""
PATCHES_PER_SHARD = 2048
_MOST_NAMED = 20
_NAME = re.compile(r"(?P<region>[0-9]+)_(?P<patch>[0-9]+)_(?P<pixels>[0-9]+)")
_TAR = re.compile(r"dataset_(?P<scheme>internal|external)_(?P<part>train|valid|test)_part[^.]*\.tar")
_PARTS = {"train": "train", "valid": "val", "test": "test"}


def _described(name: str, label: str, where: str) -> dict[str, str]:
    """Slide, patient, site code, place in the slide and the scan's resolution, from a sample's name."""
    folder, _, stem = name.rpartition("/")
    match = _NAME.fullmatch(stem)
    if match is None or int(match["pixels"]) < 1:
        raise UserError(f"{where}: the name {name!r} is not <slide>/<region>_<patch>_<pixels>.")
    barcode = parse_barcode(folder.rpartition("/")[2])
    slide = slide_key(folder.rpartition("/")[2])
    key, mpp = f"{slide}/{match['region']}_{match['patch']}", f"{PATCH_UM / int(match['pixels']):.4f}"
    known = {"name": name, "class": label, "slide": slide, "patient": barcode.patient, "tss": barcode.tss}
    return known | {"key": key, "scan_mpp": mpp}


def _samples(tar: Path) -> Iterator[dict[str, Any]]:
    import webdataset

    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        image = next((sample[ending] for ending in ("jpg", "jpeg", "png") if ending in sample), None)
        if image is None or "json" not in sample:
            raise UserError(f"{tar}: the sample {sample.get('__key__')!r} has no image or no JSON.")
        yield {"name": sample["__key__"], "image": image, "json": sample["json"]}


def _list_tars(source: Path, scheme: str) -> tuple[list[Path], pd.DataFrame]:
    found = find_files(source, (".tar",))
    if found.left_out:
        path, why = found.left_out[0]
        raise UserError(f"{path} cannot be used: {why}.", "Repair or remove it; nothing is left out silently.")
    named = {tar: match for tar in found.files if (match := _TAR.fullmatch(tar.name))}
    tars = [tar for tar, match in named.items() if match["scheme"] == scheme]
    rows = []
    for tar in progress(tars, desc="listing", unit="tars"):
        part = _PARTS[named[tar]["part"]]
        for sample in _samples(tar):
            row = _described(sample["name"], str(json.loads(sample["json"])["label"]), str(tar))
            rows.append({**row, "file": tar.relative_to(source).as_posix(), "part": part})
    return tars, pd.DataFrame(rows)


def _list_folders(source: Path, scale: int) -> pd.DataFrame:
    rows = []
    for path in sorted(source.glob(f"*/{scale}/TCGA-*/[!.]*.jpg")):  # not the ._ files of macOS
        row = _described(f"{path.parent.name}/{path.stem}", path.parts[-4], str(path))
        rows.append({**row, "file": path.relative_to(source).as_posix(), "part": ""})
    return pd.DataFrame(rows)


def _with_metadata(table: pd.DataFrame, metadata: Path | None, codes: Path | None) -> pd.DataFrame:
    if metadata is not None:
        known = fields_by_patient(clinical_fields(read_table(metadata)))
        for name in ("gender", "race", "age"):
            if name in known:
                table[name] = table["patient"].map(known[name]).fillna(UNKNOWN_WORD)
    if codes is not None:
        sites = read_site_codes(codes)["institution"]
        if gone := sorted(set(table["tss"]) - set(sites.index)):
            raise UserError(f"{codes} lacks the site codes {gone[:10]}.", "Download the newest table.")
        table["site"] = table["tss"].map(sites)
    return table


def _patches(rows: Sequence[dict[str, Any]], source: Path, fields: Sequence[str], patch_size: int) -> Iterator[Patch]:
    """The patches of some rows, all of one tar in its order, or each a file of its own."""
    tar = Path(rows[0]["file"]).suffix == ".tar"
    samples = _samples(source / rows[0]["file"]) if tar else iter(())
    wanted = {row["name"] for row in rows}
    images = (sample["image"] for sample in samples if sample["name"] in wanted)
    for row in rows:
        try:
            image = decode_image(next(images) if tar else (source / row["file"]).read_bytes())
        except UserError as error:
            raise UserError(f"{row['file']}: {row['name']}: {error.message}", "Download it again.") from None
        known = {"key": row["key"], "patient": row["patient"], "slide": row["slide"]}
        known |= {"source_mpp": float(row["scan_mpp"]), "fields": {name: row[name] for name in fields}}
        yield Patch(image=scaled(image, patch_size, row["name"]), x=-1, y=-1, **known)


@dataclass(frozen=True)
class _Found:
    """What a source holds: its tars, a row per patch, the fields, and the patches of each shard."""

    tars: list[Path]
    table: pd.DataFrame
    schema: Schema
    chunks: list[list[dict[str, Any]]]


def _find(source: Path, metadata: Path | None, codes: Path | None, scheme: str, scale: int) -> _Found:
    """List a source; arguments as for :func:`build`.

    Raises:
        UserError: The source has another layout.
    """
    if scale != 0:
        raise UserError(f"The physical size of scale {scale} is not documented.", "Use scale 0, patches of 128 µm.")
    tars, table = _list_tars(source, scheme)
    if not tars:
        table = _list_folders(source, scale)
    if not len(table):
        problem = f"{source} holds neither data/dataset_{scheme}_*_part*.tar nor <Class>/{scale}/<slide>/*.jpg."
        raise UserError(problem, "Give the downloaded folder itself.")
    table = _with_metadata(table, metadata, codes)
    categorical = [name for name in ("site", "tss", "gender", "race") if name in table]
    continuous = [*(["age"] if "age" in table else []), "scan_mpp"]
    units = {"age": "years", "scan_mpp": "µm per pixel"}
    schema = Schema.from_table(table, "class", categorical, continuous, {name: units[name] for name in continuous})
    groups = [rows for _, rows in table.groupby("file", sort=False)] if tars else [table]
    chunks = [
        rows.iloc[i : i + PATCHES_PER_SHARD].to_dict(orient="records")
        for rows in groups
        for i in range(0, len(rows), PATCHES_PER_SHARD)
    ]
    return _Found(tars, table, schema, chunks)


def listing(
    source: Path,
    patch_size: int = 256,
    metadata: Path | None = None,
    codes: Path | None = None,
    scheme: str = "internal",
    scale: int = 0,
    **options: Unpack[Options],
) -> Listing:
    """The patches that :func:`build` will write, from the headers of the source alone; arguments as there."""
    found = _find(Path(source), metadata, codes, scheme, scale)
    index = found.table[["key", "patient", "slide", *found.schema.names]].copy()
    for field in found.schema.fields:
        if field.continuous:
            known = index[field.name].where(index[field.name] != UNKNOWN_WORD)
            index[field.name] = pd.to_numeric(known).astype(float)
    allowed_patients = options.get("allow_duplicates", ())
    splits = _published_split(found.table, scheme, allowed_patients) if found.tars else {}
    for name, (parts, _) in splits.items():
        index[SPLIT_PREFIX + name] = index["patient"].map(parts).fillna("")
    if metadata is not None and (split := _medi_split(index, metadata, allowed_patients)) is not None:
        index[SPLIT_PREFIX + "medi"] = split.column
    return Listing(index, found.schema, [len(chunk) for chunk in found.chunks])


def build(
    source: Path,
    out: Path,
    patch_size: int = 256,
    metadata: Path | None = None,
    codes: Path | None = None,
    scheme: str = "internal",
    scale: int = 0,
    **options: Unpack[Options],
) -> PatchDataset:
    """Write the dataset folder; from tars with the split of their names, ``internal`` or ``external``, if it is one by
    patient; with metadata of slides also with MeDi's split, ``medi``.

    Args:
        source: The Hub's or Zenodo's folder.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 256.
        metadata: Clinical table of the GDC.
        codes: The GDC's table of tissue source sites.
        scheme: Which of the Hub's two arrangements, ``internal`` or ``external`` (by facility).
        scale: Zenodo's scale folder; only 0 (128 µm) is of known size.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout, or a picture is in several parts of a split.
    """
    source = Path(source)
    found = _find(source, metadata, codes, scheme, scale)
    provenance = {"source": "TCGA-UT (Komura & Ishikawa), Zenodo 5889558", "licence": "CC BY-NC-SA 4.0"}
    provenance["recipe"] = "shards/tcga_ut.py"
    table, schema, chunks = found.table, found.schema, found.chunks
    splits = _published_split(table, scheme, options.get("allow_duplicates", ())) if found.tars else {}
    mpp = PATCH_UM / patch_size
    read = partial(_patches, source=source, fields=schema.names, patch_size=patch_size)
    dataset = convert(
        Path(out),
        Source(chunks, read, lambda rows: sorted({source / row["file"] for row in rows})),
        Description("tcga-ut", schema, patch_size, mpp, options.get("codec", "png"), provenance, splits),
        options.get("jobs", 1),
    )
    if metadata is not None:
        _add_medi_split(dataset, metadata, options.get("allow_duplicates", ()))
    return dataset


def _add_medi_split(dataset: PatchDataset, metadata: Path, allow_duplicates: Sequence[str]) -> None:
    """Record MeDi's split, decided by the order of the metadata's rows, unless the folder has it.

    Raises:
        UserError: A picture is in both parts, or the folder has another split of that name.
    """
    split = _medi_split(dataset.index, metadata, allow_duplicates)
    if split is None:
        return
    recorded = dataset.info["splits"].get("medi", {}).get("recipe")
    equal = recorded is not None and dataset.index["split_medi"].tolist() == split.column.tolist()
    if equal and (recorded == split.recipe or not allow_duplicates):  # what it allows was said to `latent-medi split`
        return
    if recorded is not None and not equal and recorded.get("kind") != split.recipe["kind"]:
        raise UserError(
            f"{dataset.folder} has a split 'medi' that is not MeDi's; it is kept.",
            "Make the dataset in another folder, or replace the split: "
            f"`latent-medi split {dataset.folder} name=medi table={metadata} scheme=medi site_field=tss replace=true`.",
        )
    shared = pictures_in_several_parts(dataset.index, split.column, allow_duplicates)
    try:
        dataset.add_split("medi", split.column, split.recipe, replace=True)
    except UserError as error:
        patients = shared.drop_duplicates(PICTURE)["patient"].unique().tolist()
        allow = json.dumps(patients if len(patients) <= _MOST_NAMED else [EVERYBODY])
        raise UserError(
            error.message,
            "Every patch is written. Allow it, and repeat the command, which goes on from here: `latent-medi split "
            f"{dataset.folder} name=medi table={metadata} scheme=medi site_field=tss allow_duplicates='{allow}'`.",
        ) from None


def _medi_split(index: pd.DataFrame, metadata: Path, allow_duplicates: Sequence[str]) -> Split | None:
    """MeDi's split of an index; ``None``, with a warning, where the metadata do not give it."""
    settings = SplitSettings(table=str(metadata), name="medi", scheme="medi", site_field="tss")
    settings.allow_duplicates = list(allow_duplicates)
    columns = read_table(metadata).columns
    if not any(name in columns for name in SLIDE_COLUMNS):
        logger.warning("No split 'medi': it needs a row per slide, in MeDi's order, and %s has none", metadata)
        return None
    try:
        return split_from_table(index, settings)
    except UserError as error:
        logger.warning("No split 'medi': %s", error.message)
        return None


def _published_split(table: pd.DataFrame, scheme: str, allow_duplicates: Sequence[str]) -> Splits:
    """The split of the tars' names; none, with a warning, if it puts patches of a patient in several parts."""
    by_patient = table.groupby("patient")["part"].agg(set)
    if len(both := by_patient[by_patient.map(len) > 1]):
        text = "No split %r: %d patients are in several parts of it, such as %s. `latent-medi split` makes another one"
        logger.warning(text, scheme, len(both), both.index[0])
        return {}
    parts = {str(patient): next(iter(found)) for patient, found in by_patient.items()}
    return {scheme: (parts, {"kind": f"as published, {scheme}"} | allowed(allow_duplicates))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = recipe_parser("tcga-ut", __doc__, "the Hub's or Zenodo's folder", 256, "threads")
    parser.add_argument("--metadata", type=path_argument, help="clinical table of the GDC: gender, race, age, split")
    parser.add_argument("--codes", type=path_argument, help="the GDC's table of tissue source sites: institutions")
    parser.add_argument("--scheme", choices=("internal", "external"), default="internal", help="the Hub's arrangement")
    dataset = build(**vars(parser.parse_args(argv)))
    splits = {name: split["counts"] for name, split in dataset.info["splits"].items()}
    print(", ".join(f"{count} {unit}" for unit, count in dataset.info["counts"].items()))
    return {"folder": str(dataset.folder), "patches": len(dataset), "splits": splits}
