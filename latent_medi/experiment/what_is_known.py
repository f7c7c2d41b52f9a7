"""What is known of an experiment's data before it runs: rows, fields, and how many images its plans ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import make_plans
from latent_medi.metadata.schema import Schema
from latent_medi.planning.plan import read_plan
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import INFO_FILE, SPLIT_PREFIX, PatchDataset


@dataclass(frozen=True)
class Known:
    """A dataset, as a folder or as a recipe lists it.

    Args:
        index: A row per patch, with patients, fields and splits.
        schema: Its fields.
        patch_size: Edge of a patch in pixels.
        counts: Patches of each shard.
        stored: Bytes of its shards; 0 if it is only listed.
        training_patches: Patches of the experiment's split in the part "train".
        dataset: The folder, opened; ``None`` if it is only listed.
    """

    index: pd.DataFrame
    schema: Schema
    patch_size: int
    counts: list[int]
    stored: int
    training_patches: int
    dataset: PatchDataset | None = None


def known_data(e: Experiment, model: str = "") -> Known | None:
    """What is known of the experiment's dataset, or of that which a model is trained on; ``None`` before it exists."""
    entry = e.models[model].entry if model else None
    folder = Path(entry.data) if entry else e.data
    split = entry.split if entry else e.settings.split
    if not (folder / INFO_FILE).is_file():
        return None if entry or e.settings.data else _listed(e)
    dataset = PatchDataset.open(folder)
    shards = dataset.info["shards"]
    column = SPLIT_PREFIX + split
    training = (
        len(dataset) if not split or column not in dataset.index else int((dataset.index[column] == "train").sum())
    )
    counts, stored = [shard["count"] for shard in shards], sum(shard["bytes"] for shard in shards)
    return Known(dataset.index, dataset.schema, dataset.patch_size, counts, stored, training, dataset)


def _listed(e: Experiment) -> Known | None:
    """The dataset that a recipe will make, where the recipe can list it; ``None`` without its source."""
    settings, column = e.settings, SPLIT_PREFIX + e.settings.split
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
    index = listing.index
    training = int((index[column] == "train").sum()) if column in index else len(index)
    return Known(index, listing.schema, settings.patch_size, listing.counts, 0, training)


def planned_images(e: Experiment, plans: Mapping[str, pd.DataFrame] | None, data: Known | None) -> dict[str, int]:
    """Images to generate by model; of the plan's file once there is one. Empty before the dataset exists.

    Args:
        e: The experiment.
        plans: The plans, if they were made already.
        data: What is known of its dataset.
    """
    files = {model.name: e.folder / f"plan-{model.name}.csv" for model in e.sampled}
    if e.has("plan") and e.stages.finished("plan"):
        return {name: int(read_plan(path)["count"].sum()) for name, path in files.items()}
    if plans is None and (data is None or not e.has("plan")):
        return {}
    try:
        made = make_plans(e, _training(e, data)) if plans is None else plans
    except UserError:  # the checks before the first stage say what is wrong
        return {}
    return {name: int(table["count"].sum()) for name, table in made.items()}


def _training(e: Experiment, data: Known | None) -> tuple[pd.DataFrame, Schema] | None:
    """Training rows of a dataset that is only listed."""
    if data is None or data.dataset is not None:
        return None
    column = SPLIT_PREFIX + e.settings.split
    if column not in data.index:
        raise UserError(f"The dataset will have no split {e.settings.split!r}.")
    return data.index[data.index[column] == "train"], data.schema
