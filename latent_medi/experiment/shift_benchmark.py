"""``benchmark-shift``: how classification suffers as class and site become associated in training, and what helps.

The association rises from level to level, in training sets of one size. At each level models are trained, patches
generated, and classifiers evaluated on real patients of every combination, the targets included. What a level runs is
an experiment like any other, which is handed in: this file makes the splits and reads the results.
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
from latent_medi.core.records import encode
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.downstream.registry import KINDS, names_of
from latent_medi.evaluation.results import read_metrics
from latent_medi.experiment.shift_result import loss, mean, write_result
from latent_medi.experiment.shift_settings import ShiftSettings
from latent_medi.metadata.association_levels import association, patients_by_level, rotating_targets
from latent_medi.metadata.row_filter import only_mask
from latent_medi.shards.checking.duplicates import allowed
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

log = get_logger(__name__)

RunLevel = Callable[[dict[str, Any]], Any]


def benchmark_shift(settings: ShiftSettings, run_level: RunLevel) -> dict[str, Any]:
    """Run every level that is not finished, and write ``shift.json``, ``shift.csv`` and ``shift.png``.

    Args:
        settings: The dataset, the levels and what each runs.
        run_level: Runs one experiment, given changes to the settings' experiment (``out``, ``data``, ``latents``,
            ``split``, ``held_out``, ``seed``, ``models``, ``evaluate``); it returns at once if that is finished.

    Returns:
        The content of ``shift.json``: ``settings``, ``targets``, and ``levels``, each with ``level``, ``tie`` (Cramér's
        V of class and site over training patients), ``n_patients``, ``n_patches``, ``arms`` (by training set
        ``accuracy_shift`` with its ``interval``, ``recall`` and ``false_positive_rate`` of the targets), ``distance``,
        ``recovery``, the ``verdict`` on the candidate and the ``encoder`` of all these; ``loss`` by training set, see
        :func:`latent_medi.experiment.shift_result.loss`.

    Raises:
        UserError: Settings that cannot be followed, or another benchmark in that folder, finished or running.
    """
    with output_lock(settings.out):
        return _benchmark(settings, run_level)


def _benchmark(settings: ShiftSettings, run_level: RunLevel) -> dict[str, Any]:
    dataset = PatchDataset.open(settings.data)
    column = _pool(dataset, settings)
    if dict(settings.changes.get("evaluate") or {}).get("downstream") is False:
        raise UserError("changes.evaluate.downstream is false: the curve is of downstream accuracies.", "Remove it.")
    out = Path(settings.out)
    record_file = out / "settings.json"
    left_out = {"mean", "replace"} | {name for name in ("models", "only") if not getattr(settings, name)}
    given = {key: value for key, value in asdict(settings).items() if key not in left_out}
    if record_file.is_file() and read_sealed(record_file, f"Remove {record_file}.")[0] != given:
        raise UserError(f"{out} holds another benchmark.", "Choose another folder, or remove this one first.")
    pool = dataset.index[column == "train"]
    levels = sorted(set(map(float, settings.levels)))
    if settings.models and levels != [1.0]:
        raise UserError(
            f"Models that are trained already cannot be of the levels {levels}.",
            "levels='[1]' evaluates them on targets that they did not see; other levels train their own.",
        )
    targets = settings.held_out or rotating_targets(
        pool, settings.class_field, settings.site_field, settings.rotation, settings.per_site
    )
    chosen = patients_by_level(pool, settings.class_field, settings.site_field, targets, levels, settings.seed)
    write_sealed(record_file, given)
    splits = _add_splits(settings, column, targets, levels, chosen)
    records = []
    for level, patients, split in zip(levels, chosen, splits, strict=True):
        folder = out / f"level-{level:.3f}"
        log.info("Level %.2f: %d training patients", level, len(patients))
        run_level(
            {
                "out": str(folder),
                "data": settings.data,
                "latents": settings.latents or str(out / "latents"),
                "split": split,
                "held_out": targets,
                "seed": settings.seed,
                "site_field": settings.site_field,
                "replace": settings.replace,
                "models": {name: {"folder": model} for name, model in settings.models.items()},
                "evaluate": {"unseen": level == 1.0},
            }
            | ({"only": settings.only} if settings.only else {})
        )
        training = pool[pool["patient"].isin(patients)]
        v = association(training, settings.class_field, settings.site_field)
        of_level = {"level": level, "tie": v, "n_patients": len(patients), "n_patches": len(training)}
        records.append(of_level | _result(folder))
    result = {"settings": given, "targets": targets, "levels": records, "loss": loss(records)}
    write_result(result, out)
    return result


def _add_splits(
    settings: ShiftSettings,
    column: np.ndarray,
    targets: list[dict[str, str]],
    levels: list[float],
    chosen: list[set[str]],
) -> list[str]:
    """Give the dataset a split per level, if it lacks one; returns their names.

    Args:
        settings: The benchmark.
        column: The split that levels draw from, by row.
        targets: The combinations that training lacks more and more.
        levels: The levels.
        chosen: The training patients of each level.
    """
    # The name differs where another choice of patients would: how many there are depends on all levels.
    key: tuple[Any, ...] = (settings.split, settings.seed, settings.class_field, settings.site_field, targets, levels)
    key += (settings.only,) if settings.only else ()
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:6]
    names = [f"shift_{round(1000 * level):04d}_{digest}" for level in levels]
    if not set(names) - set(PatchDataset.open(settings.data).splits):
        return names
    with output_lock(settings.data):  # all at once, since the dataset may gain others while levels run
        dataset = PatchDataset.open(settings.data)
        source = allowed(dataset.info["splits"][settings.split]["recipe"].get("allow_duplicates", ()))
        for level, patients, name in zip(levels, chosen, names, strict=True):
            recipe = {
                "kind": "class and site tied",
                "level": level,
                "targets": targets,
                "pool": settings.split,
                "seed": settings.seed,
            } | ({"only": settings.only} if settings.only else {})
            if name not in dataset.splits:
                part = np.where((column == "train") & ~dataset.index["patient"].isin(patients), "", column)
                dataset.add_split(name, part.tolist(), recipe | source)
    return names


def _pool(dataset: PatchDataset, settings: ShiftSettings) -> np.ndarray:
    """Each row's value in the split that levels draw from."""
    if settings.split not in dataset.splits:
        raise UserError(
            f"{settings.data} has no split {settings.split!r}; {nearest(settings.split, dataset.splits)}.",
            "Levels draw from its training part; `latent-medi split` makes one.",
        )
    kept = only_mask(dataset.index, settings.only, settings.data)
    column = np.where(kept, dataset.index[SPLIT_PREFIX + settings.split].to_numpy(str), "")
    for part in ("train", "test"):
        if not (column == part).any():
            raise UserError(f"Split {settings.split!r} of {settings.data} has no {part!r} patches.")
    for name in (settings.class_field, settings.site_field):
        if name not in dataset.schema.names:
            raise UserError(f"{settings.data} has no field {name!r}; {nearest(name, dataset.schema.names)}.")
    return column


def _result(folder: Path) -> dict[str, Any]:
    """Results of one level's experiment, with its first encoder."""
    metrics = read_metrics(folder)
    encoder, downstream = next(iter(metrics.downstream.items()))
    roles = metrics.roles
    results = {}
    for name in names_of((kind for kind in KINDS if kind.plotted), roles):
        if name in downstream.training_sets:
            found = downstream.training_sets[name]
            results[name] = {
                "accuracy_shift": found.accuracy_shift.value,
                "interval": encode(found.accuracy_shift.interval),
                "recall": mean(scores.recall.value for scores in found.combinations),
                "false_positive_rate": mean(scores.false_positive_rate.value for scores in found.combinations),
            }
    means = metrics.fidelity[encoder].unseen.means
    distance = {name: means[name].value for name in reversed(roles.names) if name in means}
    if REAL in means:
        distance[REAL] = means[REAL].value
    fields = metrics.adherence[encoder].fields
    keys = {"class": metrics.dataset.class_field, "site": metrics.dataset.site_field}
    recovery = {
        what: {synthetic: found.value for synthetic, found in fields[name].synthetic.items()}
        for what, name in keys.items()
        if name in fields
    }
    return {
        "encoder": encoder,
        "arms": results,
        "distance": {"metric": "kid", **distance},
        "recovery": recovery,
        "verdict": encode(metrics.headline.verdict) if metrics.headline else None,
    }
