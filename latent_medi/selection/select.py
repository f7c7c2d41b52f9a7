"""``select``: choose the synthetic patches that are worth keeping, as a column of their dataset. Nothing is deleted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.core.records import decode, encode
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.planning.plan import stable_seed
from latent_medi.selection.filters import score
from latent_medi.selection.inputs import Inputs, check_settings, make_recipe, open_inputs
from latent_medi.selection.result import CombinationCounts, Counts, Result, Selection, diversity
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.statistics.neighbours import without_near_duplicates

log = get_logger(__name__)


def select(settings: SelectSettings, encoder: ImageEncoder | None = None) -> Selection:
    """Choose patches of a synthetic dataset, and record the choice as columns of its index.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: Filters, combinations and numbers.
        encoder: An encoder that is loaded already, instead of the one that the settings name.

    Raises:
        UserError: A folder of the wrong kind, fields or values that a filter cannot score, too few patients, patches
            far from tissue, no patch left, or another selection of that name.
    """
    accelerator = make_accelerator(patient=True)
    check_settings(settings)
    with output_lock(settings.data, accelerator):
        return _select(settings, encoder, accelerator)


def _select(settings: SelectSettings, encoder: ImageEncoder | None, accelerator: Accelerator) -> Selection:
    with agreed(accelerator) as declared:
        settings = replace(settings, device=settings.device or str(accelerator.device))
        inputs = open_inputs(settings)
        if encoder is None:
            encoder = load_encoder(settings.encoder, settings.weights or None, settings.device)
            encoder = colour_free(encoder) if settings.colour_free else encoder
        recipe = make_recipe(settings, inputs, encoder)
        done = inputs.synthetic.selections.get(settings.name)
        finished = done is not None and done["recipe"] == recipe
        if done is not None and not finished and not settings.replace:
            raise UserError(
                f"{settings.data} has a selection {settings.name!r} that other settings made.",
                "Choose another name, or overwrite it with replace=true.",
            )
        declared.add_input("data", settings.data, lambda: recipe["synthetic"])
        declared.add_input("real", settings.real, lambda: recipe["real"]["sha256"])
        declared.add_settings(settings, without=("data", "real", "weights", "device", "workers", "cache"))
        declared.add_settings({"encoder": encoder.fingerprint, "finished": finished})
    if finished:
        log.info("The selection %r of %s is finished.", settings.name, settings.data)
    else:
        cache = settings.cache or Path(settings.data).parent / "features"
        how = (encoder, cache, settings.batch, settings.device, accelerator)
        features = cached_features(inputs.synthetic, np.arange(len(inputs.synthetic)), *how)
        real_features = cached_features(inputs.real_dataset, inputs.real_rows, *how)
        if accelerator.is_main_process:
            _choose(settings, inputs, recipe, features, real_features)
        accelerator.wait_for_everyone()
        done = PatchDataset.open(settings.data).selections[settings.name]
    assert done is not None
    column = SELECTED_PREFIX + settings.name
    return Selection(settings.data, settings.name, column, finished, decode(Result, done["result"]), done["recipe"])


def _choose(
    settings: SelectSettings, inputs: Inputs, recipe: dict[str, Any], features: np.ndarray, real_features: np.ndarray
) -> None:
    """Score, choose, and write the columns. Features are changed in place.

    Raises:
        UserError: A filter that cannot be applied, patches far from tissue, or no patch left.
    """
    scored = score(inputs, features, real_features, settings)
    passed = {name: scored.passed[name] for name in settings.filters if name in scored.passed}
    accepted = np.logical_and.reduce([np.ones(len(features), bool), *passed.values()])
    rank = scored.scores[settings.rank]
    order_by = np.where(np.isfinite(rank), rank, np.finfo(float).max)
    keys = inputs.synthetic.index["key"].to_numpy(str)
    if "duplicates" in settings.filters:
        threshold = scored.thresholds["duplicates"]
        assert threshold is not None
        passed["duplicates"] = _without_duplicates(
            features, scored.identities, order_by, keys, accepted, threshold, settings.device
        )
        accepted = accepted & passed["duplicates"]
    asked = np.bincount(inputs.cell, minlength=len(inputs.names))
    most = np.ceil(settings.share * asked - 1e-9).astype(np.int64)
    wanted = wanted_per_combination(inputs, settings)
    most = most if wanted is None else np.minimum(most, wanted)
    chosen = best_per_combination(np.where(accepted, order_by, np.inf), keys, inputs.cell, most)
    if not chosen.any():
        counts = ", ".join(f"{name} {int(mask.sum())}" for name, mask in passed.items())
        raise UserError(
            f"No patch of {settings.data} is left: of {len(features)}, {counts or 'all'} pass; "
            f"{int(accepted.sum())} pass everything.",
            "Lower confidence, raise outliers, per_cell or share, or leave a filter out. Nothing was written.",
        )
    columns = {"": chosen, "_score": rank}
    if settings.control:
        size = np.bincount(inputs.cell[chosen], minlength=len(asked))
        columns["_control"] = random_per_combination(inputs, size, settings.seed)
    masks = {**{f"passed_{name}": mask for name, mask in passed.items()}, "accepted": accepted, "chosen": chosen}
    masks |= {"control": columns["_control"]} if settings.control else {}
    cells, total = _counts(inputs, masks, wanted)
    few = _few_warning(inputs, cells, most if wanted is None or settings.share < 1 else wanted, settings)
    compared = {"chosen": chosen, "control": columns.get("_control"), "all": np.ones(len(chosen), bool)}
    result = Result(
        cells,
        total,
        scored.thresholds,
        scored.probes,
        {
            name: diversity(features, inputs.cell, mask, settings.device)
            for name, mask in compared.items()
            if mask is not None
        },
        [*scored.warnings, *few],
        scored.exact_copies,
        scored.distance_ratio,
    )
    # Opened again: another selection may have been recorded while features were computed.
    PatchDataset.open(settings.data).add_selection(settings.name, columns, recipe, encode(result), settings.replace)
    for text in result.warnings:
        log.warning(text)


def wanted_per_combination(inputs: Inputs, settings: SelectSettings) -> np.ndarray | None:
    """Patches that the settings ask for of each combination, whatever there are, int64 [combinations]; ``None`` if they
    name no number.
    """
    if not settings.per_cell and not settings.percent:
        return None
    wanted = np.full(len(inputs.names), settings.per_cell or np.iinfo(np.int64).max)
    if settings.percent:
        real = Counter(map(tuple, inputs.real[inputs.cells].astype(str).to_numpy()))
        counts = np.array([real[name] for name in inputs.names])
        wanted = np.minimum(wanted, np.ceil(settings.percent / 100 * counts - 1e-9).astype(np.int64))
    return wanted


def best_per_combination(
    scores: np.ndarray, keys: np.ndarray, combinations: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """Which rows are the best of their combination, bool [N].

    Args:
        scores: The lower the better, [N]; infinity for rows that are never chosen. Equal ones are ordered by key.
        keys: A different string per row, [N].
        combinations: Code of each row's combination, int from 0, [N].
        most: Rows to choose at most, by code.
    """
    order = np.lexsort((keys, scores, combinations))
    ordered = combinations[order]
    starts = np.searchsorted(ordered, np.arange(len(most)))
    place = np.arange(len(order)) - starts[ordered]
    chosen = np.zeros(len(order), bool)
    chosen[order] = (place < most[ordered]) & np.isfinite(scores[order])
    return chosen


def random_per_combination(inputs: Inputs, counts: np.ndarray, seed: int) -> np.ndarray:
    """As many random rows of each combination as ``counts`` says, bool [N]. The draw depends on the keys of a
    combination, not on their order."""
    keys = inputs.synthetic.index["key"].to_numpy(str)
    chosen = np.zeros(len(keys), bool)
    for code, name in enumerate(inputs.names):
        rows = np.flatnonzero(inputs.cell == code)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        chosen[np.random.default_rng(stable_seed(seed, *name)).permutation(rows)[: counts[code]]] = True
    return chosen


def _without_duplicates(
    features: np.ndarray,
    identities: Sequence[bytes],
    scores: np.ndarray,
    keys: np.ndarray,
    accepted: np.ndarray,
    threshold: float,
    device: str,
) -> np.ndarray:
    """Which rows are no duplicates of a better accepted one, bool [N]. Rows that are not accepted pass, so that a bad
    patch never removes a good one like it."""
    order = np.lexsort((keys, scores))
    order = order[accepted[order]]
    _, first = np.unique(np.array(identities)[order], return_index=True)
    order = order[np.sort(first)]
    result = ~accepted
    result[order[without_near_duplicates(features[order], threshold, device)]] = True
    return result


def _counts(
    inputs: Inputs, masks: dict[str, np.ndarray], wanted: np.ndarray | None
) -> tuple[list[CombinationCounts], Counts]:
    """Patches in each mask, by combination and in all."""
    size = len(inputs.names)
    counts = {"asked": np.bincount(inputs.cell, minlength=size)}
    counts |= {name: np.bincount(inputs.cell[mask], minlength=size) for name, mask in masks.items()}
    acceptance = counts["accepted"] / counts["asked"]
    cells = [
        CombinationCounts(
            cell=dict(zip(inputs.cells, name, strict=True)),
            unseen=bool(inputs.unseen[code]),
            acceptance=float(acceptance[code]),
            wanted=None if wanted is None else int(wanted[code]),
            **{key: int(values[code]) for key, values in counts.items()},
        )
        for code, name in enumerate(inputs.names)
    ]
    total = {key: int(values.sum()) for key, values in counts.items()}
    return cells, Counts(acceptance=total["accepted"] / total["asked"], **total)


def _few_warning(
    inputs: Inputs, cells: list[CombinationCounts], most: np.ndarray, settings: SelectSettings
) -> list[str]:
    """A warning if combinations have fewer chosen patches than wanted."""
    named = [(" × ".join(name), counts.chosen, w) for name, counts, w in zip(inputs.names, cells, most, strict=True)]
    short = [f"{name}: {chosen} of {w}" for name, chosen, w in named if chosen < w]
    if short and (settings.per_cell or settings.percent or settings.share < 1):
        return [f"{len(short)} of {len(cells)} combinations have fewer patches than wanted: {'; '.join(short[:5])}."]
    if empty := [name for name, chosen, _ in named if not chosen]:
        return [f"{len(empty)} of {len(cells)} combinations have no patch left: {'; '.join(empty[:5])}."]
    return []
