"""The folders of the rehearsal: patches of every slide of TCGA-UT's table, latents and samples, all without a source.

Sixteen pictures stand for all of a dataset's: its shards are links to one tar, and its index names their places there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from latent_medi.core.files import sha256_file
from latent_medi.demo.tissue import random_shape, random_stain, render
from latent_medi.latents.info import SCHEMA_VERSION, write_info
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.metadata.tcga import read_site_codes
from latent_medi.metadata.tcga_cancers import cancer_of
from latent_medi.shards.checking.likeness import BLANK
from latent_medi.shards.format.folder import write_folder
from latent_medi.shards.writing.writer import Patch, write_dataset

SHAPE, PER_SHARD = (4, 32, 32), 4096
SIZE, PICTURES = 256, 16
_PLACE = ["offset", "size", "image_crc32", "json_crc32"]


def index_of(metadata: Path, codes: Path, patches: int) -> pd.DataFrame:
    """A row per patch, in the order of the slides: its class, institution, code, gender, race and age."""
    slides = pd.read_csv(metadata, dtype=str, keep_default_na=False)
    institution = read_site_codes(codes)["institution"]
    known = {
        "patient": slides["case_submitter_id"],
        "slide": slides["slide_submitter_id"],
        "class": slides["project_id"].map(cancer_of),
        "site": slides["tissue_source_site"].map(institution).fillna("unknown"),
        "tss": slides["tissue_source_site"],
        "gender": slides["gender"],
        "race": slides["race"],
    }
    rows = pd.DataFrame({name: [UNKNOWN_WORD if is_missing(v) else v for v in of] for name, of in known.items()})
    rows["age"] = pd.to_numeric(slides["age_at_index"], errors="coerce").to_numpy()
    each, more = divmod(patches, len(rows))
    counts = each + (np.arange(len(rows)) < more)
    rows = rows.iloc[np.repeat(np.arange(len(rows)), counts)].reset_index(drop=True)
    rows["number"] = rows.groupby("slide", sort=False).cumcount()
    return rows


def write_real(folder: Path, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The real dataset's folder; gives its shards.

    Args:
        folder: The folder.
        rows: From :func:`index_of`.
    """
    schema = Schema.from_table(rows, "class", ["site", "tss", "gender", "race"], ["age"])
    place = rows[["patient", "slide"]].assign(
        key=rows["slide"] + "/" + rows["number"].astype(str),
        origin="real",
        x=rows["number"] * SIZE,
        y=0,
        image_fingerprint=BLANK,
    )
    return _write(folder, pd.concat([place, rows[list(schema.names)]], axis=1), schema, {"source": "rehearsal"})


def write_samples(folder: Path, plan: pd.DataFrame, schema: Schema) -> None:
    """The folder of a synthetic dataset with the patches of a plan.

    Args:
        folder: The folder.
        plan: Class and code of each row, as far as the model knows them, and how many patches.
        schema: Of the real dataset.
    """
    row = np.repeat(np.arange(len(plan)), plan["count"].to_numpy(np.int64))
    fields: dict[str, Any] = {}
    for field in schema.fields:
        known = field.name in plan.columns and not field.continuous
        fields[field.name] = plan[field.name].to_numpy()[row] if known else np.nan if field.continuous else UNKNOWN_WORD
    name = np.char.add(f"synthetic:{folder.name}:", row.astype(str))
    place = {"key": np.char.add(f"{folder.name}-", np.arange(len(row)).astype(str)), "origin": "synthetic"}
    place |= {"patient": name, "slide": name, "x": -1, "y": -1, "image_fingerprint": ""}
    _write(folder, pd.DataFrame(place | fields), schema, {"kind": "synthetic"})


def _write(folder: Path, rows: pd.DataFrame, schema: Schema, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """A dataset folder whose patches share the pictures of one tar; gives its shards."""
    origin = str(rows["origin"].iloc[0])
    pictures = write_dataset(
        folder.with_name(f"{folder.name}-pictures"), _pictures(origin), "pictures", Schema(()), SIZE, 0.5
    )
    number = np.arange(len(rows))
    shown = pictures.index.iloc[number % PICTURES].reset_index(drop=True)
    index = rows.assign(
        shard=[f"data/part-{i // PER_SHARD:06d}.tar" for i in number],
        source_mpp=0.5,
        shared_picture=-1,
        **{name: shown[name] for name in _PLACE},
    )
    (folder / "data").mkdir(parents=True)
    tar = pictures.folder.resolve() / pictures.index["shard"].iloc[0]
    shards = []
    for i, (name, count) in enumerate(index.groupby("shard").size().items()):
        (folder / str(name)).symlink_to(tar)
        size = tar.stat().st_size
        shards.append({"file": str(name), "sha256": f"{i:064x}", "bytes": size, "count": int(count), "made_from": ""})
    # The search for pictures under several patients is a part of importing: benchmarks/duplicates.py.
    none = ("pictures", "patches", "patients", "same_pixels", "several_classes", "within_patients")
    about = {"name": folder.name, "schema": schema.to_dict(), "patch_size": SIZE, "mpp": 0.5, "codec": "png"}
    about |= {"duplicates": {**dict.fromkeys(none, 0), "by_class": {}, "examples": []}}
    write_folder(folder, about | {"shards": shards, "splits": {}, "provenance": provenance}, index)
    return shards


def _pictures(origin: str) -> Iterable[Patch]:
    """Procedural tissue, each picture of 4 × 4 patches of the demo's."""
    draw = np.random.default_rng(["real", "synthetic"].index(origin))
    for i in range(PICTURES):
        shape, stain = random_shape(draw), random_stain(draw)
        lines = [np.concatenate([render(shape, stain, draw) for _ in range(4)], axis=1) for _ in range(4)]
        yield Patch(f"{origin}{i}", np.concatenate(lines), f"p{i}", f"p{i}", -1, -1, 0.5, {}, origin=origin)


def write_latents(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Random moments of every patch, a file per shard."""
    (folder / "data").mkdir(parents=True)
    draw = np.random.default_rng(0)
    records = []
    for shard in shards:
        shape = (shard["count"], *SHAPE)
        path = folder / "data" / f"{Path(shard['file']).stem}.safetensors"
        mean = draw.standard_normal(shape, np.float32).astype(np.float16)
        save_file({"mean": mean, "std": np.abs(mean[::-1]) + np.float16(0.1)}, path)
        source = {"source": shard["file"], "source_sha256": shard["sha256"], "count": shard["count"]}
        records.append({"file": f"data/{path.name}", "sha256": sha256_file(path), **source})
    encoder = {"source": "random", "hash": "0" * 64, "deterministic": False}
    count = sum(shard["count"] for shard in shards)
    info = {"schema_version": SCHEMA_VERSION, "dataset": "real", "autoencoder": encoder, "shape": list(SHAPE)}
    write_info(folder, info | {"views": 1, "count": count, "shards": records})
