"""Stages on the real patches: the dataset folder, its audit, its latents, and the plan of what to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import cpu_count

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_file, write_json, write_text
from latent_medi.experiment.damaged_outputs import damaged_dataset, damaged_latents, reopen
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.models import CORPUS
from latent_medi.experiment.settings import CorpusSettings, ExperimentSettings
from latent_medi.experiment.stages import Stage
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.row_filter import only_mask, with_values_of
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.settings import SplitSettings
from latent_medi.shards.dataset import INFO_FILE, SPLIT_PREFIX, PatchDataset
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.split import split_folder, split_of


def shards(e: Experiment) -> Stage:
    """The dataset folder, made by a recipe; of one that exists, its content."""
    from latent_medi.features.cache import dataset_hash

    settings = e.settings
    if settings.data:
        return Stage(lambda: None, {"sha256": dataset_hash(PatchDataset.open(e.data))})
    inputs = {key: getattr(settings, key) for key in ("recipe", "source", "patch_size", "seed")}
    if e.recipe_arguments:
        inputs["options"] = {
            name: sha256_file(value) if isinstance(value, Path) else value for name, value in e.recipe_arguments.items()
        }
    return Stage(
        lambda: _make_dataset(e),
        inputs,
        outputs=("data",),
        damaged=lambda: damaged_dataset(e.data),
        mend=lambda: reopen(e.data),
        costly=True,
    )


def _make_dataset(e: Experiment) -> None:
    _follow_recipe(e, e.settings, e.data, e.recipe_arguments)


def _follow_recipe(
    e: Experiment, where: ExperimentSettings | CorpusSettings, out: Path, arguments: Mapping[str, Any]
) -> None:
    """Make a dataset folder by a recipe."""
    jobs = e.settings.processes or cpu_count()
    if where.recipe == "demo":
        from latent_medi.demo.cohort import build
        from latent_medi.demo.settings import CohortSettings

        build(out, CohortSettings(seed=where.seed), jobs=jobs)
        return
    from latent_medi.recipes.registry import load_recipe

    sizes = {"patch_size": e.settings.patch_size, "seed": where.seed, "jobs": jobs}
    load_recipe(where.recipe).build(Path(where.source), out, **sizes, **arguments)


def corpus(e: Experiment) -> Stage:
    """The unlabelled tissue that models are pre-trained on, as ``corpus``; what recipes make of it, as ``corpora``."""
    from latent_medi.features.cache import dataset_hash

    inputs: dict[str, Any] = dict(e.split_record)
    made = []
    for name, source in e.settings.corpus.items():
        if source.data:
            inputs[name] = dataset_hash(PatchDataset.open(source.data))
        elif source.part:
            inputs[name] = source.part
        else:
            made.append(f"corpora/{name}")
            inputs[name] = {key: getattr(source, key) for key in ("recipe", "source", "recipe_options", "seed")}
    return Stage(
        lambda: _join_corpus(e),
        inputs,
        ("shards",),
        outputs=(CORPUS, *made),
        damaged=lambda: [path for name in (CORPUS, *made) for path in damaged_dataset(e.folder / name)],
        mend=lambda: reopen(*(e.folder / name for name in (CORPUS, *made))),
        costly=True,
    )


def _join_corpus(e: Experiment) -> None:
    from latent_medi.recipes.registry import recipe_arguments
    from latent_medi.shards.writing.join import join

    folders = []
    for name, source in e.settings.corpus.items():
        if source.recipe:
            out = e.folder / "corpora" / name
            options = recipe_arguments(source.recipe, source.recipe_options) if source.recipe_options else {}
            _follow_recipe(e, source, out, options)
            folders.append(out)
        else:
            folders.append(Path(source.data) if source.data else e.data)
    names = [set(PatchDataset.open(folder).index["patient"]) for folder in folders]
    disjoint = len(set().union(*names)) == sum(map(len, names))
    part = next((source.part for source in e.settings.corpus.values() if source.part), "")
    settings = JoinSettings(
        out=str(e.folder / CORPUS),
        folders=[str(folder) for folder in folders],
        names=list(e.settings.corpus),
        patients="refuse" if disjoint else "separate",
        without=[str(e.data)],
        unlabelled={e.settings.split: part} if part else {},
        any_mpp=True,
    )
    join(settings)


@contextmanager
def split_for_checks(e: Experiment) -> Iterator[None]:
    """Make the split that ``split_settings`` describe, if the dataset folder lacks it; it is taken back if what follows
    is refused, so that such a run leaves the folder as it was.

    Raises:
        UserError: The folder has another split of that name, or no such split can be made.
    """
    made = ensure_split(e)
    try:
        yield
    except UserError:
        if made:
            PatchDataset.open(e.data).remove_split(e.settings.split)
        raise


def ensure_split(e: Experiment) -> bool:
    """Make the split that ``split_settings`` describe, if the dataset folder lacks it; whether it did.

    Raises:
        UserError: It has another split of that name, or no such split can be made.
    """
    settings, wanted = e.settings, wanted_split(e)
    if wanted is None:
        return False
    dataset = PatchDataset.open(e.data)
    if settings.split not in dataset.splits:
        split_folder(wanted)
        return True
    if split_of(dataset, wanted).column.tolist() != dataset.index[SPLIT_PREFIX + settings.split].tolist():
        raise UserError(
            f"{e.data} has another split {settings.split!r} than split_settings would make.",
            "Choose another name with split=…, or leave split_settings out to use the one that is there.",
        )
    return False


def wanted_split(e: Experiment) -> SplitSettings | None:
    """The split that ``split_settings`` describe; ``None`` if there are none."""
    settings = e.settings
    if not settings.split_settings:
        return None
    derived: dict[str, Any] = {"site_field": settings.site_field, **e.only}
    if not settings.split_settings.get("table") and settings.split_settings.get("scheme", "hold_out") == "hold_out":
        derived["seed"] = settings.seed  # the others are not random
    values = config.merge(derived, settings.split_settings) | {"data": str(e.data), "name": settings.split}
    return config.make(SplitSettings, values, "split_settings")


def audit(e: Experiment) -> Stage:
    """What the training patches can support, as ``audit.json`` and ``audit.txt``."""
    inputs = e.split_record | {"held_out": e.settings.held_out}
    if e.settings.site_field != ExperimentSettings.site_field:  # earlier versions took this one
        inputs["site_field"] = e.settings.site_field
    return Stage(lambda: _audit(e), inputs, ("shards",), ("audit.json", "audit.txt"))


def _audit(e: Experiment) -> None:
    from latent_medi.metadata.audit import audit as audit_of
    from latent_medi.metadata.audit_text import audit_text

    index, schema = _training_rows(e)
    held_out, site_field = e.held_out, e.settings.site_field
    result = audit_of(index, schema, requested=held_out or None, site_field=site_field)
    text = audit_text(result)
    if held_out:
        result["all_combinations"] = audit_of(index, schema, site_field=site_field)["verdict_counts"]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in result["all_combinations"].items() if count)
        text += f"\nall combinations of the fields, held out or not: {counts}"
    write_json(e.folder / "audit.json", result)
    write_text(e.folder / "audit.txt", text)
    print(text)


def encode(e: Experiment) -> Stage:
    """Latents of the experiment's dataset, and of other datasets that models are trained on."""
    from latent_medi.features.cache import dataset_hash

    chosen = e.encodings[""]
    inputs: dict[str, Any] = {"autoencoder": e.settings.autoencoder} | e.only
    # What earlier versions could not choose is left out where it is what they did.
    inputs |= {n: v for n in ("precision", "views") if (v := getattr(chosen, n)) != getattr(EncodeSettings, n)}
    # A corpus that is not made yet has no hash.
    made = {name: s.data for name, s in e.encodings.items() if name and (Path(s.data) / INFO_FILE).is_file()}
    if others := {name: dataset_hash(PatchDataset.open(data)) for name, data in made.items()}:
        inputs["models"] = others
    given = {"": e.settings.latents} | {name: model.latents for name, model in e.settings.models.items()}
    inside = {name: Path(s.out) for name, s in e.encodings.items() if not given[name]}
    return Stage(
        lambda: _encode(e),
        inputs,
        ("shards", *e.needs("corpus", "autoencoder")),
        by_model={name: (folder.name,) for name, folder in inside.items()},
        shared=tuple(f"{s.out}/latents.json" for name, s in e.encodings.items() if name not in inside),
        damaged=lambda: [path for folder in inside.values() for path in damaged_latents(folder)],
        costly=True,
    )


def _encode(e: Experiment) -> None:
    """In a process of its own, so that this one holds no memory that training needs."""
    for name, settings in e.encodings.items():
        job = f"encode-{name}" if name else "encode"
        config.save_settings(settings, e.folder / f"{job}.yaml")
        e.run_commands({job: ["encode", "--config", str(e.folder / f"{job}.yaml")]})


def plan(e: Experiment) -> Stage:
    """What each model generates, as ``plan-NAME.csv``."""
    settings = e.settings
    inputs: dict[str, Any] = {
        key: getattr(settings, key) for key in ("plan_fields", "seen_per_cell", "unseen_per_cell", "seed")
    }
    if settings.plan:
        inputs["plan"] = settings.plan
    if settings.plan_unseen != "all":
        inputs |= {key: getattr(settings, key) for key in ("plan_unseen", "held_out", "site_field")}
    if e.has_data:
        schema = PatchDataset.open(e.data).schema
        # What earlier versions could not choose is left out where it is what they did.
        if settings.draw_from != "all" and any(field.continuous for field in schema.fields):
            inputs["draw_from"] = settings.draw_from
        fields = {model.name: e.conditions(model, schema) for model in e.sampled}
        earlier = {"medi": None, "cls": [schema.class_field.name] if schema.class_field else []}
        if own := {name: known for name, known in fields.items() if known != earlier.get(name, ...)}:
            inputs["models"] = own
    outputs = {model.name: (f"plan-{model.name}.csv",) for model in e.sampled}
    return Stage(lambda: _plan(e), inputs | e.split_record, ("shards",), by_model=outputs)


def _plan(e: Experiment) -> None:
    from latent_medi.planning.plan import write_plan

    for name, table in make_plans(e).items():
        write_plan(table, e.folder / f"plan-{name}.csv")


@dataclass(frozen=True)
class TrainingRows:
    """What plans are made from, of a dataset or split that does not exist yet.

    Args:
        index: A row per training patch.
        schema: Their fields.
        held_out: The held-out combinations.
    """

    index: pd.DataFrame
    schema: Schema
    held_out: Sequence[Mapping[str, str]]


def make_plans(e: Experiment, rows: TrainingRows | None = None) -> dict[str, pd.DataFrame]:
    """The plan of each model that is sampled: every combination of the fields that it is conditioned on, those without
    a training patch more often.

    Args:
        e: The experiment.
        rows: By default those of the dataset folder.
    """
    from latent_medi.evaluation.cohort.combinations import any_match
    from latent_medi.planning.planner import make_plan
    from latent_medi.planning.settings import PlanSettings

    settings = e.settings
    derived = {
        "goal": "each",
        "per_cell": settings.seen_per_cell,
        "seed": settings.seed,
        "fields": settings.plan_fields,
        "draw_from": settings.draw_from,
    }
    own_goal = bool(settings.plan.get("goal") or settings.plan.get("tasks"))
    if own_goal:
        del derived["per_cell"], derived["goal"]
    index, schema = (rows.index, rows.schema) if rows else _training_rows(e)
    asked = config.make(PlanSettings, config.merge(derived, settings.plan), "plan")
    whole = make_plan(index, schema, asked).table
    if not own_goal:
        # A field that is not planned is empty in every row.
        names = [f.name for f in schema.fields if not f.continuous and (whole[f.name] != "").any()]
        seen = set(index[names].astype(str).itertuples(index=False, name=None))
        unseen = ~whole[names].astype(str).apply(tuple, axis=1).isin(seen)
        whole.loc[unseen & (whole["count"] > 0), "count"] = settings.unseen_per_cell
        if settings.plan_unseen == "held_out":
            held_out = rows.held_out if rows else e.held_out
            whole = whole[~unseen | any_match(whole, held_out)].reset_index(drop=True)
    return {
        model.name: _plan_of(model.name, e.conditions(model, schema), whole, index, schema, settings.seed)
        for model in e.sampled
    }


def _plan_of(
    model: str, known: list[str] | None, whole: pd.DataFrame, index: pd.DataFrame, schema: Schema, seed: int
) -> pd.DataFrame:
    """The whole plan; for a model that knows fewer fields, the same number of patches by combination of these, "seen"
    where a training patch has them."""
    from latent_medi.planning.plan import stable_seed

    if known is None or set(schema.names) <= set(known):
        return whole
    kept = [f.name for f in schema.fields if f.name in whole.columns and f.name in known and not f.continuous]
    combined = [name for name in kept if (whole[name] != "").any()]
    seen = {tuple(row) for row in index[combined].astype(str).to_numpy()}
    groups: Any = whole.groupby(kept, sort=True, observed=True) if kept else [((), whole)]
    rows = []
    for values, group in groups:
        asked = dict(zip(kept, values, strict=True))
        rows.append(
            asked
            | {
                "count": group["count"].sum(),
                "verdict": "seen" if tuple(asked[n] for n in combined) in seen else group["verdict"].iloc[0],
                "seed": stable_seed(seed, model, *values),
            }
        )
    return pd.DataFrame(rows)


def _training_rows(e: Experiment) -> tuple[pd.DataFrame, Schema]:
    """The index's training rows, and the schema; with a filter, the values that the rows left have."""
    dataset = PatchDataset.open(e.data)
    return with_filter(e, dataset.index.iloc[dataset.rows({SPLIT_PREFIX + e.settings.split: "train"})], dataset.schema)


def with_filter(e: Experiment, index: pd.DataFrame, schema: Schema) -> tuple[pd.DataFrame, Schema]:
    """Those of some training rows that the filter leaves, and the schema with the values that they have."""
    only = e.settings.only
    if not only:
        return index, schema
    index = index[only_mask(index, only, f"the training patches of {e.data}")]
    return index, with_values_of(schema, index)
