"""A blinded sheet on which a pathologist marks which patches are real: one HTML file, and a key in another file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from latent_medi.core.errors import UserError
from latent_medi.core.files import HTML, check_file, sha256_bytes, write_text
from latent_medi.core.progress import get_logger
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.tables import write_for_people
from latent_medi.report.figures import image_uri
from latent_medi.report.page import environment
from latent_medi.report.settings import ReadingSheetSettings
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)

KEY_COLUMNS = ("sheet", "image", "number", "origin", "key")
"""Columns of the key file before those of the fields."""
FIELD = "field:"
"""Prefix of the columns of fields in the key file: a dataset may give its fields any name."""
_SCRIPT = Path(__file__).parent / "templates" / "sheet.js"


def make_sheet(settings: ReadingSheetSettings) -> dict[str, Any]:
    """Write a sheet and its key.

    The sheet holds pixels in random order under names that are hashes of the pixels: no key, field or origin. Real and
    synthetic pictures take one path, from the decoded patch to a PNG without metadata. Each combination has equally
    many of both, and real ones come from as many patients as possible.

    Returns:
        ``sheet`` and ``key`` (paths), ``n``, ``patients`` (of the real ones) and ``cells`` (pairs of each combination).

    Raises:
        UserError: A folder that is no dataset, patches of different size, or no combination that both datasets have.
    """
    if not settings.data or not settings.synthetic or not settings.out:
        raise UserError(
            "A reading sheet takes data, synthetic and out.",
            "latent-medi reading-sheet data=runs/demo/data synthetic=runs/demo/synthetic/medi out=sheet.html",
        )
    real, synthetic = PatchDataset.open(settings.data), PatchDataset.open(settings.synthetic)
    _check_alike(real, synthetic)
    fields = _fields(settings, real, synthetic)
    rows = {
        "real": real.rows({f"split_{settings.split}": settings.split_value, "origin": "real"}),
        "synthetic": synthetic.rows({"origin": "synthetic"} | ({settings.selected: True} if settings.selected else {})),
    }
    for origin, folder in (("real", settings.data), ("synthetic", settings.synthetic)):
        if not len(rows[origin]):
            raise UserError(
                f"{folder} has no {origin} patch to show.", "Check the folder, the split and the selection."
            )
    sources = {"real": real, "synthetic": synthetic}
    chosen, cells = _choose(settings, sources, rows, fields)
    table, uris = _pictures(sources, chosen, fields)
    order = np.random.default_rng([settings.seed, 31]).permutation(len(table))
    table, uris = table.iloc[order].reset_index(drop=True), [uris[i] for i in order]
    sheet = sha256_bytes("".join(table["image"]).encode())[:12]
    table.insert(0, "sheet", sheet)
    table.insert(2, "number", range(1, len(table) + 1))

    out = check_file(settings.out, "page", HTML)
    key = check_file(key_file(settings), "key of a reading sheet", rb"sheet,")
    write_text(out, _page(sheet, list(table["image"]), uris, settings.confidence))
    write_for_people(table, key)
    patients = real.index["patient"].iloc[chosen["real"]].nunique()
    log.info("%d pictures in %s; the key, not to be sent: %s", len(table), out, key)
    return {"sheet": str(out), "key": str(key), "n": len(table), "patients": int(patients), "cells": cells}


def key_file(settings: ReadingSheetSettings) -> Path:
    """The file with the origin of each picture."""
    return Path(settings.key) if settings.key else Path(settings.out).with_suffix(".key.csv")


def _check_alike(real: PatchDataset, synthetic: PatchDataset) -> None:
    """Refuse, or warn of, differences that reveal the origin of a patch without its tissue."""
    if real.patch_size != synthetic.patch_size:
        raise UserError(
            f"Real patches have {real.patch_size} px and synthetic ones {synthetic.patch_size} px: the size would "
            "reveal the origin.",
            "Cut both at one size.",
        )
    codecs = [d.info.get("codec") for d in (real, synthetic)]
    if codecs[0] != codecs[1]:
        log.warning("Real patches are stored as %s, synthetic ones as %s: traces of it may reveal the origin.", *codecs)


def _fields(settings: ReadingSheetSettings, real: PatchDataset, synthetic: PatchDataset) -> list[str]:
    """Fields whose combinations are balanced: those of the settings, or class and site if both datasets have values."""
    if settings.fields:
        for name in settings.fields:
            real.schema.field(name)
            synthetic.schema.field(name)
        return list(settings.fields)
    wanted = [f.name for f in real.schema.fields if f.kind == "class"] + [settings.site_field]
    unknown = {UNKNOWN_WORD, "null", ""}
    return [
        name
        for name in wanted
        if all(name in d.schema.names and not set(d.index[name].astype(str)) <= unknown for d in (real, synthetic))
    ]


def _choose(
    settings: ReadingSheetSettings, sources: dict[str, PatchDataset], rows: dict[str, np.ndarray], fields: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Rows of both datasets, equally many of each combination, and how many pairs each combination has."""
    rng = np.random.default_rng([settings.seed, 29])
    pools: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for origin, dataset in sources.items():
        mixed = rng.permutation(rows[origin])
        index = dataset.index.iloc[mixed]
        # Each patient's first patches before anyone's second.
        turn = index.groupby("patient", sort=False).cumcount().to_numpy() if origin == "real" else np.zeros(len(index))
        mixed = mixed[np.argsort(turn, kind="stable")]
        values = dataset.index.iloc[mixed][list(fields)].astype(str).to_numpy().tolist()
        pools[origin] = {}
        for row, combination in zip(mixed.tolist(), values, strict=True):
            pools[origin].setdefault(tuple(combination), []).append(row)
    cells = sorted(set(pools["real"]) & set(pools["synthetic"]))
    if not cells:
        raise UserError(
            f"No combination of {', '.join(fields) or 'fields'} has both real patches "
            f"(split {settings.split}: {settings.split_value}) and synthetic ones.",
            "Choose other fields, or another split.",
        )
    most = {c: min(len(pools["real"][c]), len(pools["synthetic"][c])) for c in cells}
    pairs = dict.fromkeys(cells, 0)
    wanted = settings.n // 2
    while sum(pairs.values()) < wanted and (left := [c for c in cells if pairs[c] < most[c]]):
        for i in rng.permutation(len(left))[: wanted - sum(pairs.values())]:
            pairs[left[i]] += 1
    if sum(pairs.values()) < wanted:
        log.warning("There are patches for %d pictures only, not %d.", 2 * sum(pairs.values()), settings.n)
    chosen = {
        origin: np.array([row for c in cells for row in pools[origin][c][: pairs[c]]], np.int64) for origin in sources
    }
    return chosen, [{"combination": dict(zip(fields, c, strict=True)), "pairs": pairs[c]} for c in cells]


def _pictures(
    sources: dict[str, PatchDataset], chosen: dict[str, np.ndarray], fields: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """A row of the key per picture, and its data URI."""
    records: list[dict[str, str]] = []
    uris: list[str] = []
    for origin, dataset in sources.items():
        images = dataset.read(chosen[origin])
        for image, row in zip(images, chosen[origin].tolist(), strict=True):
            entry = dataset.index.iloc[row]
            name = sha256_bytes(np.ascontiguousarray(image).tobytes())[:12]
            records.append({"image": name, "origin": origin, "key": str(entry["key"])})
            records[-1] |= {FIELD + field: str(entry[field]) for field in fields}
            uris.append(image_uri(image))
    table = pd.DataFrame(records)
    if (twice := table[table["image"].duplicated(keep=False)]).size:
        keys = ", ".join(f"{o} {k}" for o, k in zip(twice["origin"], twice["key"], strict=True))
        raise UserError(f"These patches are the same picture: {keys}.", "Remove one of them, or take another seed.")
    return table, uris


def _page(sheet: str, names: Sequence[str], uris: Sequence[str], confidence: bool) -> str:
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("sheet.html")
        .render(
            sheet=sheet,
            pictures=list(zip(names, uris, strict=True)),
            confidence=confidence,
            script=Markup(script),  # our own file; everything else is escaped
            digest=digest,
        )
    )
