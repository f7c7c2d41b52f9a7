"""``benchmark-shift``: the direct test of "unseen".

Class and site are tied together more and more, in training sets of one size; at each level models are trained, patches
generated, and classifiers judged on the real patients of every combination, those of the targets among them. What a
level runs is an experiment like any other, which is handed in: this file makes the splits and reads the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.results import read_metrics
from latent_medi.experiment.shift_result import SHOWN, loss, mean, write_result
from latent_medi.experiment.shift_settings import ShiftSettings
from latent_medi.metadata.association_levels import association, patients_by_level, rotating_targets
from latent_medi.shards.checking.duplicates import allowed
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

log = get_logger(__name__)

RunLevel = Callable[[dict[str, Any]], Any]


def benchmark_shift(settings: ShiftSettings, run_level: RunLevel) -> dict[str, Any]:
    """Run every level that is not finished, and write ``shift.json``, ``shift.csv`` and ``shift.png``.

    Args:
        settings: The dataset, the levels and what each runs.
        run_level: Runs one experiment, given changes to the settings' experiment (``out``, ``data``, ``latents``,
            ``split``, ``held_out``, ``seed``, ``evaluate``); it returns at once if that is finished.

    Returns:
        The content of ``shift.json``: ``settings``, ``targets``, and ``levels``, each with ``level``, ``tie`` (Cramér's
        V of class and site over training patients), ``n_patients``, ``n_patches``, ``arms`` (``accuracy_shift``
        with its ``interval``, ``recall`` and ``false_positive_rate`` of the targets), ``distance``, ``recovery`` and
        the ``encoder`` that judged; ``loss`` by arm: the mean over levels above the lowest of accuracy over the real
        patches' accuracy at the lowest, less 1.

    Raises:
        UserError: Settings that cannot be followed, or another benchmark in that folder, done or at work.
    """
    with output_lock(settings.out):
        return _benchmark(settings, run_level)


def _benchmark(settings: ShiftSettings, run_level: RunLevel) -> dict[str, Any]:
    dataset = PatchDataset.open(settings.data)
    column = _pool(dataset, settings)
    if dict(settings.changes.get("evaluate") or {}).get("downstream") is False:
        raise UserError(
            "changes.evaluate.downstream=false leaves nothing to draw a curve of: it is of downstream accuracies.",
            "Leave it out.",
        )
    out = Path(settings.out)
    record_file = out / "settings.json"
    left_out = {"mean", "replace"} | (set() if settings.models else {"models"})
    asked = {key: value for key, value in asdict(settings).items() if key not in left_out}
    if record_file.is_file() and read_sealed(record_file, f"Remove {record_file}.")[0] != asked:
        raise UserError(f"{out} holds another benchmark.", "Choose another folder, or remove this one first.")
    pool = dataset.index[column == "train"]
    levels = sorted(set(map(float, settings.levels)))
    if settings.models and levels != [1.0]:
        raise UserError(
            f"Models that are trained already cannot be of the levels {levels}.",
            "levels='[1]' holds them against targets that they did not see; other levels train their own.",
        )
    targets = settings.held_out or rotating_targets(
        pool, settings.class_field, settings.site_field, settings.rotation, settings.per_site
    )
    chosen = patients_by_level(pool, settings.class_field, settings.site_field, targets, levels, settings.seed)
    write_sealed(record_file, asked)
    names = [f"shift_{round(1000 * level):04d}_{_short(settings, targets, levels)}" for level in levels]
    if set(names) - set(dataset.splits):  # all at once, since the dataset may gain others while levels run
        with output_lock(settings.data):
            dataset = PatchDataset.open(settings.data)
            for level, patients, name in zip(levels, chosen, names, strict=True):
                part = np.where((column == "train") & ~dataset.index["patient"].isin(patients), "", column)
                recipe = {"kind": "class and site tied", "level": level, "targets": targets, "pool": settings.split,
                          "seed": settings.seed}  # fmt: skip
                recipe |= allowed(dataset.info["splits"][settings.split]["recipe"].get("allow_duplicates", ()))
                if name not in dataset.splits:
                    dataset.add_split(name, part.tolist(), recipe)
    records = []
    for level, patients, name in zip(levels, chosen, names, strict=True):
        folder = out / f"level-{level:.3f}"
        log.info("Level %.2f: %d training patients", level, len(patients))
        run_level(
            {"out": str(folder), "data": settings.data, "latents": settings.latents or str(out / "latents"),
             "split": name, "held_out": targets, "seed": settings.seed, "site_field": settings.site_field,
             "replace": settings.replace,
             **({"models": settings.models} if settings.models else {}), "evaluate": {"unseen": level == 1.0}}
        )  # fmt: skip
        training = pool[pool["patient"].isin(patients)]
        records.append(
            {"level": level, "tie": association(training, settings.class_field, settings.site_field),
             "n_patients": len(patients), "n_patches": len(training), **_result(folder)}
        )  # fmt: skip
    result = {"settings": asked, "targets": targets, "levels": records, "loss": loss(records)}
    write_result(result, out)
    return result


def _pool(dataset: PatchDataset, settings: ShiftSettings) -> np.ndarray:
    """The part of each row in the split that levels draw from."""
    if settings.split not in dataset.splits:
        raise UserError(
            f"{settings.data} has no split {settings.split!r}; {nearest(settings.split, dataset.splits)}.",
            "Its training part is what levels draw from: `latent-medi split` makes one.",
        )
    column = dataset.index[SPLIT_PREFIX + settings.split].to_numpy(str)
    for part in ("train", "test"):
        if not (column == part).any():
            raise UserError(f"Split {settings.split!r} of {settings.data} has no {part!r} patches.")
    for name in (settings.class_field, settings.site_field):
        if name not in dataset.schema.names:
            raise UserError(f"{settings.data} has no field {name!r}; {nearest(name, dataset.schema.names)}.")
    return column


def _short(settings: ShiftSettings, targets: list[dict[str, str]], levels: list[float]) -> str:
    """A few letters that differ where another choice of patients would: how many there are depends on all levels."""
    text = repr((settings.split, settings.seed, settings.class_field, settings.site_field, targets, levels))
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _result(folder: Path) -> dict[str, Any]:
    """What one level's experiment found, with its first encoder."""
    metrics = read_metrics(folder)
    encoder = next(iter(metrics.downstream))
    compared = metrics.downstream[encoder]["arms"]
    arms = {}
    for name in SHOWN:
        if name not in compared:
            continue
        entry = compared[name]
        cells = entry["cells"]
        arms[name] = {
            "accuracy_shift": entry["accuracy_shift"]["value"],
            "interval": entry["accuracy_shift"]["interval"],
            **{what: mean(cell[what]["value"] for cell in cells) for what in ("recall", "false_positive_rate")},
        }
    # The kernel distance at every level, though the Fréchet distance is the metric where there are samples enough.
    means = metrics.fidelity[encoder].unseen.means
    keys = {"medi": "medi", "cls": "cls", "floor": REAL}
    distance = {key: means[source].kid for key, source in keys.items() if source in means}
    fields = metrics.adherence[encoder].fields
    names = {"class": metrics.dataset.class_field, "site": metrics.dataset.site_field}
    recovery = {
        what: {source: found.value for source, found in fields[name].synthetic.items()}
        for what, name in names.items()
        if name in fields
    }
    return {"encoder": encoder, "arms": arms, "distance": {"metric": "kid", **distance}, "recovery": recovery}
