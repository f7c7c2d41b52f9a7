"""TCGA-UT at full size without its pixels: 271,710 patches of 8,726 slides, with random latents (4.4 GB).

    python benchmarks/rehearsal.py --metadata all_slide_metadata.csv --codes tissueSourceSite.tsv
        [--quick] [--folder FOLDER] [--json FILE]

Classes, institutions, site codes, gender, race and age are those of the slide table. Each slide has 31 patches, the
first ones 32. The dataset folder has its index and no pictures, the latent folder has moments of 4 × 32 × 32 drawn at
random: 4.4 GB in ``--folder``, or in a temporary folder, removed afterwards.

Timed as the commands that a user runs: audit, split with held-out combinations, plan. Then the loader: training batches
of 256 from files that are mapped, by one process and by two at the same time. Seconds are wall time; processor seconds
follow, since other programs on the machine change the former.
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from output import options, report
from safetensors.numpy import save_file

from latent_medi.core.files import sha256_file
from latent_medi.latents.info import SCHEMA_VERSION, write_info
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tcga import read_site_codes
from latent_medi.shards.checking.likeness import BLANK
from latent_medi.shards.format.folder import write_folder

PATCHES, SHAPE, PER_SHARD, BATCH = 271_710, (4, 32, 32), 4096, 256
AUDIT = ["fields=[site,race,gender]"]
SPLIT = ["name=main", "hold_out_fields=[class,site]", "hold_out_share=0.2", "fractions={train: 0.8, test: 0.2}"]
PLAN = ["goal=own_sites", "spread=real", "ratio=1", "fields=[class,site]"]


def index_of(metadata: Path, codes: Path, patches: int) -> pd.DataFrame:
    """A row per patch: its class, site, code, gender, race and age, patient and slide."""
    slides = pd.read_csv(metadata, dtype=str, keep_default_na=False)
    institution = read_site_codes(codes)["institution"]
    known = {
        "patient": slides["case_submitter_id"],
        "slide": slides["slide_submitter_id"],
        "class": slides["project_id"],
        "site": slides["tissue_source_site"].map(institution).fillna("unknown"),
        "tss": slides["tissue_source_site"],
        "gender": slides["gender"],
        "race": slides["race"],
    }
    rows = pd.DataFrame({name: ["unknown" if is_missing(v) else v for v in values] for name, values in known.items()})
    rows["age"] = pd.to_numeric(slides["age_at_index"], errors="coerce").to_numpy()
    each, more = divmod(patches, len(rows))
    counts = each + (np.arange(len(rows)) < more)
    rows = rows.iloc[np.repeat(np.arange(len(rows)), counts)].reset_index(drop=True)
    number = rows.groupby("slide", sort=False).cumcount()
    zero = np.zeros(len(rows), np.int64)
    place = {
        "key": rows["slide"] + "/" + number.astype(str),
        "shard": [f"data/part-{i // PER_SHARD:06d}.tar" for i in range(len(rows))],
        **{"offset": zero, "size": zero, "image_crc32": zero.astype(np.uint32), "json_crc32": zero.astype(np.uint32)},
        **{"origin": "real", "patient": rows["patient"], "slide": rows["slide"], "x": number * 256, "y": zero},
        **{"source_mpp": 0.5, "image_fingerprint": BLANK, "shared_picture": -zero - 1},
    }
    fields = ["class", "site", "tss", "gender", "race", "age"]
    return pd.concat([pd.DataFrame(place), rows[fields]], axis=1)


def write_index(folder: Path, index: pd.DataFrame) -> list[dict[str, Any]]:
    """Write a dataset folder without pictures; gives its shards."""
    schema = Schema.from_table(index, "class", ["site", "tss", "gender", "race"], ["age"])
    counts = index.groupby("shard").size()
    shards = [
        {"file": name, "sha256": f"{number:064x}", "bytes": 0, "count": int(count), "made_from": ""}
        for number, (name, count) in enumerate(counts.items())
    ]
    folder.mkdir(parents=True)
    # The search for pictures under several patients is a part of importing: benchmarks/duplicates.py.
    none = ("pictures", "patches", "patients", "same_pixels", "several_classes", "within_patients")
    duplicates = {**dict.fromkeys(none, 0), "by_class": {}, "examples": []}
    about = {"name": "rehearsal", "schema": schema.to_dict(), "patch_size": 256, "mpp": 0.5, "codec": "png"}
    write_folder(
        folder,
        about | {"duplicates": duplicates, "shards": shards, "splits": {}, "provenance": {"source": "rehearsal"}},
        index,
    )
    return shards


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
    info = {"schema_version": SCHEMA_VERSION, "dataset": "rehearsal", "autoencoder": encoder, "shape": list(SHAPE)}
    write_info(folder, info | {"views": 1, "count": count, "shards": records})


def timed(words: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a command, and the peak memory in GiB of the largest child so far."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "latent_medi.cli", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "processor_s": busy, "gib": after.ru_maxrss / 2**20}


_together: list[Any] = []
"""A barrier of the processes that load at the same time."""


def _meet(barrier: Any) -> None:
    _together.append(barrier)


def load(data: Path, latents: Path, rank: int, processes: int, batches: int) -> tuple[float, float, float]:
    """Samples per second of one training process, wall and processor time, and its peak memory in GiB."""
    from latent_medi.diffusion.settings import DropoutSettings
    from latent_medi.training.data import open_data
    from latent_medi.training.settings import TrainSettings

    settings = TrainSettings(
        data=str(data), latents=str(latents), out="", split="main", resident="mmap", balance=["class"]
    )
    rows = open_data(settings, None)
    rows.batch(0, BATCH, 0, 1000, DropoutSettings(), rank, processes)
    _together[0].wait(600)
    start, busy = time.perf_counter(), time.process_time()
    for number in range(1, 1 + batches):
        rows.batch(number, BATCH, 0, 1000, DropoutSettings(), rank, processes)
    mine = batches * BATCH / processes
    rate, processor = mine / (time.perf_counter() - start), mine / (time.process_time() - busy)
    return rate, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def loader(data: Path, latents: Path, processes: int, batches: int) -> dict[str, float]:
    """What each of so many processes loads at the same time, on average."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _meet, (context.Barrier(processes),)) as pool:
        tasks = [pool.submit(load, data, latents, rank, processes, batches) for rank in range(processes)]
        found = np.array([task.result() for task in tasks])
    return {"per_s": found[:, 0].mean(), "per_processor_s": found[:, 1].mean(), "gib": found[:, 2].max()}


def main() -> None:
    parser = options(__doc__, "a tenth of the patches")
    parser.add_argument("--metadata", type=Path, required=True, help="table of TCGA's slides")
    parser.add_argument("--codes", type=Path, required=True, help="GDC's table of tissue source sites")
    parser.add_argument("--folder", type=Path, help="where to put 4.4 GB for a while")
    arguments = parser.parse_args()
    patches, batches = (PATCHES // 10, 20) if arguments.quick else (PATCHES, 200)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        data, latents, plan = Path(name) / "data", Path(name) / "latents", Path(name) / "plan.csv"
        shards = write_index(data, index_of(arguments.metadata, arguments.codes, patches))
        steps = {
            "audit": timed(["audit", str(data), *AUDIT]),
            "split": timed(["split", str(data), *SPLIT]),
            "plan": timed(["plan", str(data), f"out={plan}", *PLAN]),
        }
        write_latents(latents, shards)
        loaders = {count: loader(data, latents, count, batches) for count in (1, 2)}
    result: dict[str, Any] = {"patches": patches, "latents_gb": patches * int(np.prod(SHAPE)) * 4 / 1e9}
    for name, step in steps.items():
        result |= {f"{name}_s": step["seconds"], f"{name}_processor_s": step["processor_s"]}
    result["audit_split_plan_s"] = sum(step["seconds"] for step in steps.values())
    result["audit_split_plan_processor_s"] = sum(step["processor_s"] for step in steps.values())
    result["audit_split_plan_peak_gib"] = max(step["gib"] for step in steps.values())
    for count, step in loaders.items():
        result |= {f"loader_{count}_processes_samples_per_s_each": step["per_s"]}
        result |= {f"loader_{count}_processes_samples_per_processor_s": step["per_processor_s"]}
        result |= {f"loader_{count}_processes_peak_gib": step["gib"]}
    report(result, arguments.json)


if __name__ == "__main__":
    main()
