"""``select``: which synthetic patches are worth keeping, as a column of their dataset. Nothing is deleted.

Criteria look at one field at a time (or at groups of fields that real patches have together), so that they can judge
combinations that no real training patch has: such a patch must look like its class, whatever the site, and like its
site, whatever the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.planning.plan import stable_seed
from latent_medi.selection.criteria import best_per_cell, class_centroids, pixel_identities
from latent_medi.selection.settings import SelectSettings
from latent_medi.selection.task import (
    MIN_PATIENTS_OF_VALUE,
    Task,
    check_settings,
    column,
    joined,
    joined_all,
    make_recipe,
    open_task,
)
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.statistics.additive_effects import Effects, additive_effects
from latent_medi.statistics.linear_probe import ValidatedLinearProbe, fit_validated_linear_probe
from latent_medi.statistics.neighbours import (
    nearest_cosine_distance,
    normalise,
    squared_distances,
    without_near_duplicates,
)
from latent_medi.statistics.subsampling import patients_in_turn

log = get_logger(__name__)

_HELD = 0.05
"""A probe that is not this much above chance is named: it cannot judge."""


def select(settings: SelectSettings, encoder: ImageEncoder | None = None) -> dict[str, Any]:
    """Choose patches of a synthetic dataset, and record the choice as columns of its index.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: Criteria, cells and how many.
        encoder: An encoder that is loaded already, instead of the one that the settings name.

    Returns:
        ``folder``, ``name``, ``column``, ``finished`` (whether an earlier run had done it), ``recipe``, ``cells`` (per
        cell what was asked, passed each criterion, was accepted and chosen), ``total`` (the sums), ``thresholds``
        (cosine distances), ``probes`` by field, ``diversity`` and ``warnings``.

    Raises:
        UserError: A folder of the wrong kind, fields or values that cannot be judged (named with the criterion), too
            few patients, no patch left, or another selection of that name.
    """
    accelerator = make_accelerator(patient=True)
    check_settings(settings)
    with output_lock(settings.data, accelerator):
        return _select(settings, encoder, accelerator)


def _select(settings: SelectSettings, encoder: ImageEncoder | None, accelerator: Accelerator) -> dict[str, Any]:
    with agreed(accelerator) as told:
        check_settings(settings)
        settings = replace(settings, device=settings.device or str(accelerator.device))
        task, real = open_task(settings)
        if encoder is None:
            encoder = load_encoder(settings.encoder, settings.weights or None, settings.device)
            encoder = colour_free(encoder) if settings.colour_free else encoder
        recipe = make_recipe(settings, task, real, encoder)
        done = task.synthetic.selections.get(settings.name)
        finished = done is not None and done["recipe"] == recipe
        if done is not None and not finished and not settings.replace:
            raise UserError(
                f"{settings.data} has a selection {settings.name!r} made in another way.",
                "Give this one another name, or overwrite that one knowingly with replace=true.",
            )
        told.reads("data", settings.data, lambda: recipe["synthetic"])
        told.reads("real", settings.real, lambda: recipe["real"]["sha256"])
        told.does(settings, but=("data", "real", "weights", "device", "workers", "cache"))
        told.does({"encoder": encoder.fingerprint, "finished": finished})
    if done is not None and finished:
        log.info("The selection %r of %s is finished.", settings.name, settings.data)
        return _told(settings, done, finished=True)
    cache = settings.cache or Path(settings.data).parent / "features"
    how = (encoder, cache, settings.batch, settings.device, accelerator)
    features = cached_features(task.synthetic, np.arange(len(task.synthetic)), *how)
    real_features = cached_features(real, task.real_rows, *how)
    if accelerator.is_main_process:
        _choose(settings, task, real, recipe, features, real_features)
    accelerator.wait_for_everyone()
    return _told(settings, PatchDataset.open(settings.data).selections[settings.name], finished=False)


def _choose(
    settings: SelectSettings, task: Task, real: PatchDataset, recipe: dict[str, Any], features: np.ndarray,
    real_features: np.ndarray,
) -> None:  # fmt: skip
    """Judge, choose, and write the columns. Features are changed in place.

    Raises:
        UserError: A criterion that cannot judge, or no patch left.
    """
    passed: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {"thresholds": {}, "probes": {}, "warnings": []}
    ranks: dict[str, np.ndarray] = {}
    if "confidence" in settings.criteria or settings.rank == "confidence":
        passed["confidence"], ranks["confidence"] = _confidence(task, features, real_features, settings, result)
    # In place: hundreds of thousands of features are gigabytes. Probes want them as they were, the rest directions.
    normalise(features)
    normalise(real_features)
    if "centroid" in settings.criteria or settings.rank == "centroid":
        passed["centroid"], ranks["centroid"] = _centroids(task, features, real_features, settings)
    if {"outliers", "copies"} & set(settings.criteria) or settings.rank == "distance":
        ranks["distance"] = nearest_cosine_distance(features, real_features, device=settings.device)
    own, other = _between_patients(task, real_features, settings)
    if "outliers" in settings.criteria:
        limits = {False: _threshold(own, settings.outliers), True: _threshold(other, settings.outliers)}
        result["thresholds"] |= {"outliers": limits[False], "outliers_unseen_cells": limits[True]}
        limit = np.array([limits[bool(u)] if limits[bool(u)] is not None else np.inf for u in task.unseen])
        passed["outliers"] = ranks["distance"] <= limit[task.cell]
    identity: list[bytes] = []
    if {"copies", "duplicates"} & set(settings.criteria):
        identity = pixel_identities(task.synthetic, np.arange(len(task.synthetic)), settings.batch, settings.workers)
    if "copies" in settings.criteria:
        threshold = result["thresholds"]["copies"] = _threshold(own, settings.copies)
        of_real = set(pixel_identities(real, task.real_rows, settings.batch, settings.workers))
        exact = np.array([i in of_real for i in identity])
        result["exact_copies"] = int(exact.sum())
        passed["copies"] = ~exact & (ranks["distance"] >= threshold)
    passed = {name: passed[name] for name in settings.criteria if name in passed}
    accepted = np.logical_and.reduce([np.ones(len(features), bool), *passed.values()])
    scores = np.where(np.isfinite(ranks[settings.rank]), ranks[settings.rank], np.finfo(float).max)
    keys = task.synthetic.index["key"].to_numpy(str)
    if "duplicates" in settings.criteria:
        threshold = result["thresholds"]["duplicates"] = _threshold(own, settings.duplicates)
        passed["duplicates"] = _distinct(features, identity, scores, keys, accepted, threshold, settings.device)
        accepted = accepted & passed["duplicates"]

    asked = np.bincount(task.cell, minlength=len(task.names))
    most = np.ceil(settings.share * asked - 1e-9).astype(np.int64)
    most = np.minimum(most, settings.per_cell) if settings.per_cell else most
    chosen = best_per_cell(np.where(accepted, scores, np.inf), keys, task.cell, most)
    if not chosen.any():
        counts = ", ".join(f"{name} {int(mask.sum())}" for name, mask in passed.items())
        raise UserError(
            f"No patch of {settings.data} is left: of {len(features)}, {counts or 'all'} pass; "
            f"{int(accepted.sum())} pass everything.",
            "Lower confidence, raise outliers, per_cell or share, or leave a criterion out. Nothing was written.",
        )
    columns = {"": chosen, "_score": ranks[settings.rank]}
    if settings.control:
        columns["_control"] = random_per_cell(task, np.bincount(task.cell[chosen], minlength=len(asked)), settings.seed)
    result |= _accounts(task, passed, accepted, columns, most, settings, result["warnings"])
    sets = {"chosen": chosen, "control": columns.get("_control"), "all": np.ones(len(chosen), bool)}
    result["diversity"] = {
        name: _diversity(features, task.cell, mask, settings.device) for name, mask in sets.items() if mask is not None
    }
    # The features took their time: another selection may have been recorded meanwhile.
    PatchDataset.open(settings.data).add_selection(settings.name, columns, recipe, result, settings.replace)
    for text in result["warnings"]:
        log.warning(text)


def _told(settings: SelectSettings, entry: dict[str, Any], finished: bool) -> dict[str, Any]:
    head = {"folder": settings.data, "name": settings.name, "column": SELECTED_PREFIX + settings.name}
    return {**head, "finished": finished, **entry["result"], "recipe": entry["recipe"]}


def _effects(task: Task, real: np.ndarray, settings: SelectSettings) -> Effects | None:
    """What the fields that make a cell, or are judged, do to the features of real patches."""
    fields = list(dict.fromkeys([*task.cells, *task.fields]))
    return additive_effects(real, task.real, fields) if settings.adjust and len(fields) > 1 else None


def _apart(effects: Effects | None, judged: Sequence[str], features: np.ndarray, index: pd.DataFrame) -> np.ndarray:
    """Features without what the fields that are not judged do to them.

    A probe of the class that never saw it at a site takes the site for evidence against it.
    """
    if effects is None:
        return features
    return effects.take_out(features, index, [name for name in effects.values if name not in judged])


def _centroids(
    task: Task, features: np.ndarray, real: np.ndarray, settings: SelectSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the nearest centroid is a patch's own in every group, and the mean squared distance to its own."""
    passes, distances = np.ones(len(features), bool), np.zeros((len(task.groups), len(features)))
    patients = column(task.real, "patient")
    effects = _effects(task, real, settings)
    for distance, group in zip(distances, task.groups, strict=True):
        labels = joined(task.real, group)
        known = np.array([label is not None for label in labels])
        theirs = _apart(effects, group, real[known], task.real[known])
        names, centroids = class_centroids(theirs, labels[known], patients[known])
        codes = {name: i for i, name in enumerate(names)}
        own = np.array([codes.get(label, -1) for label in joined(task.synthetic.index, group)])
        squared = squared_distances(_apart(effects, group, features, task.synthetic.index), centroids)
        passes &= (own < 0) | (squared.argmin(axis=1) == own)  # nothing was asked, nothing is missed
        distance[:] = np.where(own < 0, np.nan, squared[np.arange(len(own)), own])
    return passes, _mean_known(distances)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _confidence(
    task: Task, features: np.ndarray, real: np.ndarray, settings: SelectSettings, result: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a probe finds each value asked for, and minus the mean log probability."""
    patients = column(task.real, "patient")
    effects = _effects(task, real, settings)
    found = np.full((len(task.fields), len(features)), np.nan)
    for logs, name in zip(found, task.fields, strict=True):
        labels, asked = column(task.real, name), column(task.synthetic.index, name)
        usable = pd.Series(labels).map(pd.Series(patients).groupby(labels).nunique()).to_numpy()
        rows = np.flatnonzero((labels != UNKNOWN_WORD) & (usable >= MIN_PATIENTS_OF_VALUE))
        rows = rows[patients_in_turn(patients[rows], settings.most, np.random.default_rng([settings.seed, 11]))]
        theirs = _apart(effects, [name], real[rows], task.real.iloc[rows])
        probe = fit_validated_linear_probe(theirs, labels[rows], patients[rows], settings.regularisation, settings.seed)
        result["probes"][name] = _about(probe)
        if probe.accuracy < 1 / len(probe.values) + _HELD:
            result["warnings"].append(
                f"The probe of {name} finds {probe.accuracy:.0%} of values it did not learn from "
                f"({1 / len(probe.values):.0%} is chance): in this encoder's space {name} cannot be judged."
            )
        stated = asked != UNKNOWN_WORD
        mine = _apart(effects, [name], features[stated], task.synthetic.index[stated])
        logs[stated] = probe.log_probability(mine, asked[stated])
    low = np.log(max(settings.confidence, 1e-300))
    return (np.isnan(found) | (found >= low)).all(axis=0), -_mean_known(found)


def _about(probe: ValidatedLinearProbe) -> dict[str, Any]:
    return {
        "accuracy": probe.accuracy, "chance": 1 / len(probe.values), "regularisation": probe.regularisation,
        "n_patches": probe.n_patches, "n_patients": probe.n_patients, "converged": probe.converged,
    }  # fmt: skip


def _between_patients(task: Task, real: np.ndarray, settings: SelectSettings) -> tuple[np.ndarray, np.ndarray]:
    """Distances of real training patches to the nearest one of another patient, and to the nearest one of another
    patient *and* another cell: what is usual where the training data have nothing of a cell. Each only if it is used.
    """
    needed = {"outliers", "copies", "duplicates"} & set(settings.criteria)
    _, patients = np.unique(column(task.real, "patient"), return_inverse=True)
    rows = patients_in_turn(column(task.real, "patient"), settings.most, np.random.default_rng([settings.seed, 11]))
    none = np.zeros(0)
    own = other = none
    apart = [(patients[rows], patients)]
    if needed:
        own = nearest_cosine_distance(real[rows], real, apart, settings.device, "distances between patients")
    if "outliers" in needed and task.unseen.any():
        _, cells = np.unique(joined_all(task.real, task.cells), return_inverse=True)
        apart = [*apart, (cells[rows], cells)]
        other = nearest_cosine_distance(real[rows], real, apart, settings.device, "distances between cells")
        other = other[np.isfinite(other)]
        if not len(other):
            raise UserError(
                "The criterion outliers cannot judge cells without training patches: all training patches are of one "
                "cell.",
                "Leave outliers out of criteria.",
            )
    return own, other


def _threshold(distances: np.ndarray, quantile: float) -> Any:
    return float(np.quantile(distances, quantile)) if len(distances) else None


def _distinct(
    features: np.ndarray,
    identity: Sequence[bytes],
    scores: np.ndarray,
    keys: np.ndarray,
    accepted: np.ndarray,
    threshold: float,
    device: str,
) -> np.ndarray:
    """Which rows are the best of their kind among those that passed everything else. What did not pass is not asked,
    so that a bad patch never drives out a good one like it."""
    order = np.lexsort((keys, scores))
    order = order[accepted[order]]
    seen: set[bytes] = set()
    fresh = np.zeros(len(order), bool)
    for place, row in enumerate(order.tolist()):
        fresh[place] = identity[row] not in seen
        seen.add(identity[row])
    order = order[fresh]
    result = ~accepted
    result[order[without_near_duplicates(features[order], threshold, device)]] = True
    return result


def random_per_cell(task: Task, counts: np.ndarray, seed: int) -> np.ndarray:
    """As many rows of each cell as ``counts`` says, at random; a cell's draw depends on its keys, not on their order.

    Returns:
        bool [N].
    """
    keys = task.synthetic.index["key"].to_numpy(str)
    chosen = np.zeros(len(keys), bool)
    for code, name in enumerate(task.names):
        rows = np.flatnonzero(task.cell == code)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        chosen[np.random.default_rng(stable_seed(seed, *name)).permutation(rows)[: counts[code]]] = True
    return chosen


def _accounts(
    task: Task,
    passed: dict[str, np.ndarray],
    accepted: np.ndarray,
    columns: dict[str, np.ndarray],
    most: np.ndarray,
    settings: SelectSettings,
    warnings: list[str],
) -> dict[str, Any]:
    """What was asked, passed and chosen, by cell and in all."""
    everything = {**{f"passed_{name}": mask for name, mask in passed.items()}, "accepted": accepted}
    everything |= {"chosen": columns[""]} | ({"control": columns["_control"]} if "_control" in columns else {})
    size = len(task.names)
    counts = {"asked": np.bincount(task.cell, minlength=size)}
    counts |= {name: np.bincount(task.cell[mask], minlength=size) for name, mask in everything.items()}
    cells = [
        {
            "cell": dict(zip(task.cells, name, strict=True)),
            "unseen": bool(task.unseen[code]),
            **{key: int(values[code]) for key, values in counts.items()},
            "acceptance": float(counts["accepted"][code] / counts["asked"][code]),
        }
        for code, name in enumerate(task.names)
    ]
    total: dict[str, Any] = {key: int(values.sum()) for key, values in counts.items()}
    wanted = np.maximum(most, settings.per_cell) if settings.share == 1 else most
    short = np.flatnonzero(counts["chosen"] < wanted)
    if len(short) and (settings.per_cell or settings.share < 1):
        named = "; ".join(f"{' × '.join(task.names[c])}: {counts['chosen'][c]} of {wanted[c]}" for c in short[:5])
        warnings.append(f"{len(short)} of {size} cells have fewer patches than wanted: {named}.")
    elif len(empty := np.flatnonzero(counts["chosen"] == 0)):
        named = "; ".join(" × ".join(task.names[c]) for c in empty[:5])
        warnings.append(f"{len(empty)} of {size} cells have no patch left: {named}.")
    return {"cells": cells, "total": {**total, "acceptance": total["accepted"] / total["asked"]}}


def _diversity(features: np.ndarray, cells: np.ndarray, mask: np.ndarray, device: str) -> dict[str, float | int | None]:
    """How different the patches of a cell are from each other, averaged over the cells that have two.

    ``pairwise``: mean cosine distance of two patches, whatever their number. ``nearest``: to the nearest other one;
    it falls as their number grows, so it compares the choice with its control, which are as many.
    """
    pairwise, closest, count = [], [], 0
    for code in np.unique(cells[mask]):
        mine = features[mask & (cells == code)]
        n = len(mine)
        if n < 2:
            continue
        total = mine.sum(axis=0, dtype=np.float64)
        # Σ over pairs of 1 − cos, from the length of the sum of unit vectors.
        pairwise.append(1.0 - (total @ total - (mine.astype(np.float64) ** 2).sum()) / (n * (n - 1)))
        itself = np.arange(n)
        closest.append(float(nearest_cosine_distance(mine, mine, [(itself, itself)], device).mean()))
        count += 1
    means = [float(np.mean(values)) if values else None for values in (pairwise, closest)]
    return {"pairwise": means[0], "nearest": means[1], "n_cells": count, "n": int(mask.sum())}


def selection_text(result: dict[str, Any], rows: int = 24) -> str:
    """One screen: what was asked, passed and chosen in the cells with the lowest acceptance, and in all."""
    cells = sorted(result["cells"], key=lambda c: (c["acceptance"], *c["cell"].values()))
    keys = [key for key in result["total"] if key != "acceptance"]
    lines = [["patches", *(key.replace("passed_", "passed ") for key in keys), "acceptance"]]
    for cell in cells[:rows]:
        name = " × ".join(cell["cell"].values()) + (" (unseen)" if cell["unseen"] else "")
        lines.append([name, *(str(cell[key]) for key in keys), f"{cell['acceptance']:.0%}"])
    total = result["total"]
    lines.append(["all cells", *(str(total[key]) for key in keys), f"{total['acceptance']:.0%}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            word.ljust(w) if i == 0 else word.rjust(w) for i, (word, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if len(cells) > rows:
        text.insert(-1, f"… and {len(cells) - rows} cells with higher acceptance")
    for name, probe in result["probes"].items():
        text.append(
            f"probe of {name}: {probe['accuracy']:.0%} of patients' patches found ({probe['chance']:.0%} is chance)"
        )
    for name, values in result["diversity"].items():
        if values["pairwise"] is not None:
            text.append(f"diversity, {name}: pairwise {values['pairwise']:.3g}, nearest {values['nearest']:.3g}")
    state = "finished before, kept" if result["finished"] else "written"
    text.append(f"{state}: column {result['column']!r} of {result['folder']}")
    return "\n".join(text)
