"""What is known of an experiment's data before it runs: rows, fields, and how many images its plans ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.evaluation.cohort.open_study import evaluated_of_split
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import TrainingRows, make_plans, wanted_split, with_filter
from latent_medi.experiment.models import training_data
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.schema import Schema
from latent_medi.planning.plan import read_plan
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import INFO_FILE, SPLIT_PREFIX, PatchDataset
from latent_medi.shards.split import split_of, split_of_index


@dataclass(frozen=True)
class Known:
    """A dataset, as a folder or as a recipe lists it.

    Args:
        index: A row per patch, with patients, fields and splits.
        schema: Its fields.
        patch_size: Edge of a patch in pixels.
        counts: Patches of each shard.
        stored: Bytes of its shards; 0 if it is only listed.
        training_patches: Patches of the split in the part "train" that the filter leaves.
        dataset: The folder, opened; ``None`` if it is only listed.
        kept: Which patches the experiment's filter leaves, bool by row.
        recipe: How the split will be made, if the run makes it; else ``None``.
    """

    index: pd.DataFrame
    schema: Schema
    patch_size: int
    counts: list[int]
    stored: int
    training_patches: int
    dataset: PatchDataset | None
    kept: np.ndarray
    recipe: Mapping[str, Any] | None = None

    @property
    def kept_counts(self) -> list[int]:
        """Patches of each shard that the filter leaves, of shards that have any."""
        shard_of_row = np.repeat(np.arange(len(self.counts)), self.counts)
        left = np.bincount(shard_of_row[self.kept], minlength=len(self.counts)).tolist()
        return self.counts if self.kept.all() else [count for count in left if count]

    def evaluated(self, settings: EvaluateSettings) -> int:
        """Patches that an evaluation embeds: those of a known class in one of its parts."""
        column, known = SPLIT_PREFIX + settings.split, self.schema.class_field
        if column not in self.index or known is None:
            return int(self.kept.sum())
        parts = (settings.train_value, settings.probe_value, settings.test_value)
        embedded = self.index[column].isin(parts) & self.index[known.name].isin(known.values)
        return int((embedded & self.kept).sum())


def known_data(e: Experiment, model: str = "") -> Known | None:
    """What is known of the experiment's dataset, or of that which a model is trained on; ``None`` before it exists.

    Raises:
        UserError: The split that the run is to make, or its filter, does not fit the patches.
    """
    entry = e.models[model].entry if model else None
    data, part = training_data(e.settings, entry) if entry else (str(e.data), "")
    folder = Path(data)
    if (folder / INFO_FILE).is_file():
        dataset = PatchDataset.open(folder)
        shards = dataset.info["shards"]
        counts, stored = [shard["count"] for shard in shards], sum(shard["bytes"] for shard in shards)
        own = (dataset.schema, dataset.patch_size, counts, stored)
        if entry:
            return Known(dataset.index, *own, _training(dataset.index, part), dataset, _all(dataset.index))
        wanted, recipe = wanted_split(e), None
        if wanted is not None and wanted.name not in dataset.splits:
            split = split_of(dataset, wanted)
            dataset.index, recipe = dataset.index.assign(**{SPLIT_PREFIX + wanted.name: split.column}), split.recipe
        return _known(e, dataset.index, *own, dataset, recipe)
    return None if entry or e.settings.data else _listed(e)


def _listed(e: Experiment) -> Known | None:
    """The dataset that a recipe will make, where the recipe can list it; ``None`` without its source."""
    settings = e.settings
    if settings.recipe == "demo":
        listing = cohort.listing(CohortSettings(seed=settings.seed))
    else:
        recipe = load_recipe(settings.recipe)
        if not hasattr(recipe, "listing") or not Path(settings.source).exists():
            return None
        try:
            options = {"patch_size": settings.patch_size, "seed": settings.seed} | e.recipe_arguments
            listing = recipe.listing(Path(settings.source), **options)
        except UserError:  # the stage "shards" says what is wrong
            return None
    index, made_by, wanted = listing.index, None, wanted_split(e)
    if wanted is not None and SPLIT_PREFIX + wanted.name not in index:
        split = split_of_index(index, wanted)
        index, made_by = index.assign(**{SPLIT_PREFIX + wanted.name: split.column}), split.recipe
    return _known(e, index, listing.schema, settings.patch_size, listing.counts, 0, None, made_by)


def _known(
    e: Experiment,
    index: pd.DataFrame,
    schema: Schema,
    patch_size: int,
    counts: list[int],
    stored: int,
    dataset: PatchDataset | None,
    recipe: Mapping[str, Any] | None,
) -> Known:
    """The experiment's dataset with the split and the filter."""
    kept = only_mask(index, e.settings.only, f"the patches of {e.data}")
    training = _training(index[kept], e.settings.split)
    return Known(index, schema, patch_size, counts, stored, training, dataset, kept, recipe)


def _training(index: pd.DataFrame, split: str) -> int:
    """Rows of the part "train"; all where there is no split."""
    column = SPLIT_PREFIX + split
    return int((index[column] == "train").sum()) if split and column in index else len(index)


def _all(index: pd.DataFrame) -> np.ndarray:
    return np.ones(len(index), bool)


def planned_images(e: Experiment, plans: Mapping[str, pd.DataFrame] | None, data: Known | None) -> dict[str, int]:
    """Images to generate by model; of the plan's file once there is one. Empty before the dataset exists.

    Args:
        e: The experiment.
        plans: The plans, if they were made already.
        data: What is known of its dataset.
    """
    files = {model.name: e.plans(model.name)[-1] for model in e.sampled}
    if e.has("plan") and e.stages.finished("plan"):
        return {name: int(read_plan(path)["count"].sum()) for name, path in files.items()}
    if plans is None and (data is None or not e.has("plan")):
        return {}
    try:
        made = make_plans(e, _training_rows(e, data)) if plans is None else plans
    except UserError:  # the checks before the first stage say what is wrong
        return {}
    return {name: int(table["count"].sum()) for name, table in made.items()}


def _training_rows(e: Experiment, data: Known | None) -> TrainingRows | None:
    """Training rows of a dataset or split that does not exist yet."""
    if data is None or (data.dataset is not None and data.recipe is None):
        return None
    column = SPLIT_PREFIX + e.settings.split
    if column not in data.index:
        raise UserError(f"The dataset will have no split {e.settings.split!r}.")
    held_out = e.settings.held_out
    if isinstance(held_out, str):  # "split"
        if data.recipe is None:
            raise UserError(f"What the split {e.settings.split!r} holds out is known once the dataset is made.")
        alone = replace(e.evaluation, downstream=False)  # which would refuse a split without any
        held_out = evaluated_of_split(data.index, data.schema, data.recipe, alone)
    return TrainingRows(*with_filter(e, data.index[data.index[column] == "train"], data.schema), held_out)
