"""`latent-medi run` on real biopsies at 256 px: as many updates as fit the time, and pictures of every combination."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from gpu_parts import records
from gpu_parts.child import Context, NotHere
from latent_medi.core import config
from latent_medi.core.processes import environment, python_words
from latent_medi.sampling.grids import contact_sheet, save_sheet
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

SEEN, UNSEEN = 200, 300  # samples per combination
RESERVE = 110.0  # seconds for all of `run` that is neither training nor sampling, with a budget of 540
SHARE = 0.85  # of the time left that training is given: a rate measured for seconds does not hold for minutes
FORWARDS = 7  # training images per sample: 20 evaluations, where an update's image takes three


def command(context: Context, words: list[str], log: str) -> None:
    """Run a verb of `latent-medi`, and log its messages next to the record of the row.

    Raises:
        RuntimeError: It ended with an error.
    """
    context.command = "latent-medi " + " ".join(words)
    file = context.pictures / log
    with file.open("ab") as output:
        code = subprocess.run(
            python_words("latent_medi.cli", *words),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        last = [line for line in file.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise RuntimeError(f"exit code {code} of latent-medi {words[0]}: {' / '.join(last)}")


def _few(table: pd.DataFrame) -> np.ndarray:
    """Positions of six patches of each of the first four patients of a combination."""
    chosen: list[int] = []
    numbered = table.reset_index(drop=True)
    for _, cell in numbered.groupby(["class", "site"], sort=True):
        for patient in sorted(cell["patient"].unique())[:4]:
            chosen += cell.index[cell["patient"] == patient][:6].tolist()
    return np.array(sorted(chosen))


def _reduced(source: PatchDataset, out: Path, size: int) -> None:
    """A few patches of a dataset folder, scaled down, with its split."""
    rows = _few(source.index)
    part = source.index.iloc[rows]
    fields = source.schema.names
    images = (
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)) for image in source.read(rows)
    )
    patches = (
        Patch(row["key"], image, row["patient"], row["slide"], -1, -1, 4.0, {name: row[name] for name in fields})
        for row, image in zip(part.to_dict("records"), images, strict=True)
    )
    split = dict(zip(part["patient"], part["split_main"], strict=True))
    write_dataset(out, patches, "few", source.schema, size, 4.0, splits={"main": (split, {"kind": "as the source's"})})


def pack_patches(context: Context) -> None:
    """The dataset folder: cut from the folder of images, or the given one if it is a dataset folder already."""
    real, data = context.real, context.work / "data"
    if not real.is_dir():
        raise NotHere(f"no folder {real} (--real DIR names it)")
    packed = (real / INFO_FILE).is_file()
    if not packed and not (real / "manifest.csv").is_file():
        raise NotHere(f"{real} holds neither {INFO_FILE} nor manifest.csv")
    if packed and not context.quick:
        data = real
    elif packed:
        shutil.rmtree(data, ignore_errors=True)
        _reduced(PatchDataset.open(real), data, 64)
    else:
        source = real
        if context.quick:
            source = context.work / "few"
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir(parents=True)
            table = pd.read_csv(real / "manifest.csv", dtype=str)
            table.iloc[_few(table)].to_csv(source / "manifest.csv", index=False)
            (source / "images").symlink_to(real / "images")
        words = ["shards", "prostate", str(source), str(data), "--patch-size", "64" if context.quick else "256"]
        command(context, [*words, "--jobs", str(os.cpu_count() or 1)], "shards.log")
    made = PatchDataset.open(data)
    context.figures(data=str(data))
    context.show(patches=len(made), combinations=len(made.index.groupby(["class", "site"]).size()))


def real_data(context: Context) -> Path:
    """The dataset folder of biopsies that :func:`pack_patches` made."""
    record = json.loads((context.out / context.part / "patches.json").read_text(encoding="utf-8"))
    return Path(record["figures"]["data"])


def images_per_second(context: Context, config_name: str) -> tuple[float, int]:
    """Images per second of real updates with a packaged configuration, and its batch."""
    from latent_medi.training.estimate.report import measure, stand_in_schema
    from latent_medi.training.settings import EstimateSettings

    name = "demo/medi" if context.quick else config_name
    words = ["--config", name, "data=", "latents=", "max_steps=1"]
    words += ["global_batch=8", "measure_steps=2"] if context.quick else ["precision=bf16", "measure_steps=20"]
    settings = config.parse(EstimateSettings, words)
    shape, batch = ((4, 16, 16), 8) if context.quick else ((32, 32, 32), settings.global_batch)
    return measure(settings, shape, stand_in_schema(None, 2, 3), batch, context.device)["steps_per_s"] * batch, batch


def _rate(context: Context) -> None:
    """Images per second of real updates, and how many updates fit the time that is left."""
    rate, batch = images_per_second(context, "prostate/medi_256px")
    if context.quick:
        steps, seen, unseen = 6, 4, 6
    else:
        seen, unseen = SEEN, UNSEEN
        made = 2 * (4 * seen + 2 * unseen)
        left = context.seconds_left() - RESERVE * context.scale - made * FORWARDS / rate
        steps = max(100, round(SHARE * left * rate / 2 / batch))
    chosen = {"max_steps": steps, "batch": batch, "seen": seen, "unseen": unseen}
    (context.work / "chosen.json").write_text(json.dumps(chosen))
    context.show(images_per_s=rate, updates_per_model=steps, images_per_model=steps * batch)


def words_of(context: Context, chosen: Mapping[str, Any]) -> list[str]:
    """The words of `latent-medi run`."""
    weights = context.models / "squeezenet"
    weights = weights if weights.exists() else context.models / "squeezenet1_0_imagenet.safetensors"
    autoencoder = context.models / "taef2"
    words = ["run", "--config", f"prostate/{64 if context.quick else 256}px", f"data={real_data(context)}"]
    words += [f"out={context.work / 'run'}", f"seen_per_cell={chosen['seen']}", f"unseen_per_cell={chosen['unseen']}"]
    # Real patches and samples can be compared only if both were compressed alike.
    words.append(f"generate.codec={PatchDataset.open(real_data(context)).info['codec']}")
    words += [
        f"train.max_steps={chosen['max_steps']}",
        f"train.checkpoint_every_images={16 if context.quick else 64 * 250}",
    ]
    if weights.exists():
        words.append(f"weights.squeezenet={weights}")
    elif context.quick:
        words.append("encoders=[demo]")
    else:
        raise NotHere(f"no weights of squeezenet in {context.models} (--models DIR names their folder)")
    if context.quick:
        words += ["autoencoder=demo", "train.global_batch=8", "train.model.block_out_channels=[32,64]"]
        words += ["train.log_every_images=8", "generate.sampler.steps=4", "generate.device_batch=16"]
        return [*words, "evaluate.repeats=1", "evaluate.real_splits=0"]
    if not autoencoder.is_dir():
        raise NotHere(f"no autoencoder {autoencoder} (--models DIR names the folder)")
    return [*words, f"autoencoder={autoencoder}", "evaluate.repeats=2"]


def _run(context: Context) -> None:
    """encode → train both models → plan → sample → evaluate → report; an interrupted run continues."""
    chosen = json.loads((context.work / "chosen.json").read_text())
    run = context.work / "run"
    begun = run.exists()
    command(context, words_of(context, chosen), "run.log")
    headline = json.loads((run / "headline.json").read_text(encoding="utf-8"))
    for name in ("headline.json", "metrics.json", "report.html", "audit.txt"):
        shutil.copy(run / name, context.pictures / name)
    context.figures(headline=headline, went_on=begun, **chosen)
    stages = {file.stem: json.loads(file.read_text()).get("seconds") for file in (run / "stages").glob("*.json")}
    context.figures(stages={name: seconds for name, seconds in stages.items() if seconds is not None})
    for key in ("distance_unseen", "distance_unseen_colour_free"):
        sides = [headline.get(key, {}).get(side) for side in ("medi", "cls", "real")]
        if any(value is not None for value in sides):  # few patches give no distance
            context.show(**{f"{key} MeDi/CLS/real": " / ".join(map(records.short, sides))})
    context.show(updates=chosen["max_steps"])


def _pictures(context: Context) -> None:
    """All combinations of class and hospital: real patches, MeDi's and CLS's."""
    run, n = context.work / "run", 3
    sets = {"real": PatchDataset.open(real_data(context))}
    sets |= {name: PatchDataset.open(run / "synthetic" / name) for name in ("medi", "cls")}
    index = sets["real"].index
    size = sets["real"].patch_size
    lines, labels, counts = [], [], {}
    for grade in sorted(index["class"].unique()):
        for site in sorted(index["site"].unique()):
            line: list[np.ndarray] = []
            for name, dataset in sets.items():
                known = dataset.index
                wanted = known["class"] == grade
                if "site" in known and name != "cls":
                    wanted &= known["site"] == site
                rows = np.flatnonzero(wanted)
                counts[f"{name}: {grade} × {site}"] = len(rows)
                rows = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)] if len(rows) else rows
                images = list(dataset.read(rows)) if len(rows) else []
                line += images + [np.full((size, size, 3), 255, np.uint8)] * (n - len(images))
            lines.append(line)
            labels.append(f"{grade} × {site}")
    columns = [word for name in ("real", "MeDi", "CLS") for word in (name, *[""] * (n - 1))]
    save_sheet(contact_sheet(lines, labels, columns), context.pictures / "cells.png")
    context.figures(patches=counts)
    least = min(count for name, count in counts.items() if name.startswith("medi"))
    context.show(combinations=len(lines), fewest_samples=least)
    context.require(len(lines) == 6, f"{len(lines)} combinations of class and hospital, not 6")
    context.require(least >= (1 if context.quick else SEEN), f"only {least} samples of a combination")


ROWS: dict[str, Callable[[Context], None]] = {
    "patches": pack_patches,
    "rate": _rate,
    "run": _run,
    "pictures": _pictures,
}
