"""Opening the datasets of an evaluation: every check, and the part of every real row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.combinations import Combination, NotEvaluated, categorical_fields, describe, matches
from latent_medi.evaluation.cohort.held_out import held_out_of_split, not_evaluated_text
from latent_medi.evaluation.cohort.roles import synthetic_roles
from latent_medi.evaluation.cohort.study import NO_SITE, NOT_CONDITIONED, Study, SyntheticSet, with_one_site
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.metadata.row_filter import only_mask, only_text
from latent_medi.metadata.schema import NULL, Schema
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.training_record import patients_hash, was_trained_on
from latent_medi.shards.checking.duplicates import pictures_in_several_parts
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.layout import PICTURE
from latent_medi.shards.format.selections import selected_mask

log = get_logger(__name__)

_MAY_BE_SEEN = "set unseen=false (evaluate.unseen=false of `latent-medi run`)"


def open_study(settings: EvaluateSettings) -> Study:
    """Open the datasets, check them, and give every real row its part.

    Raises:
        UserError: No class field, an unknown split, field or value, synthetic rows among the real ones, a combination
            that is not held out or that has no test patch.
    """
    real = _open_real(settings)
    if isinstance(settings.held_out, str):  # "split"
        split = _Split.of(real.index, real.schema, settings)
        recipe = real.info["splits"][settings.split]["recipe"]
        held_out, not_evaluated = _of_split(settings, real.index, real.schema, recipe, split)
    else:
        held_out, not_evaluated = _check_held_out(settings.held_out, real.schema, settings.downstream), []
        split = _Split.of(real.index, real.schema, settings)
    synthetic_roles(settings.synthetic, settings.candidate)
    _check_combinations(settings, real, split, held_out)
    parts = _Parts(split.probe, split.probe, split.test) if len(split.probe) else _halved(real, split, settings)
    notes: list[str] = []
    warnings = [real.patients_note] if real.patients_note else []
    warnings += _shared_pictures(real.index, settings.split)
    if not_evaluated:
        warnings.append(not_evaluated_text(held_out, not_evaluated))
        log.warning("%s", warnings[-1])
    if split.dropped:
        notes.append(
            f"{split.dropped} real patches without a known {split.class_field} take no part, but copies of them are "
            "looked for."
        )
    notes += parts.notes
    if unknown := sorted(set(settings.selected) - set(settings.synthetic)):
        close = nearest(unknown[0], settings.synthetic)
        raise UserError(f"selected names {unknown[0]!r}, which is no synthetic set; {close}.")
    trained = _training_patients(real, settings, split)
    synthetic = {}
    further_seeds: dict[str, list[SyntheticSet]] = {}
    if unknown := sorted(set(settings.further_seeds) - set(settings.synthetic)):
        close = nearest(unknown[0], settings.synthetic)
        raise UserError(f"further_seeds names {unknown[0]!r}, which is no synthetic set; {close}.")
    for name, folder in settings.synthetic.items():
        synthetic[name] = _open_synthetic(settings, name, folder, split.class_field)
        others = [_open_synthetic(settings, name, f, split.class_field) for f in settings.further_seeds.get(name, [])]
        further_seeds |= {name: others} if others else {}
        for samples in _different(synthetic[name], others):
            known = _unknown_training(samples, held_out if settings.unseen else [])
            notes += [note for note in known if note not in notes]
            warnings += _other_patients(samples, settings, trained)
    return Study(
        real=real,
        class_field=split.class_field,
        site_field=settings.site_field or NO_SITE,
        held_out=held_out,
        synthetic=synthetic,
        train=split.train,
        shown=split.shown,
        probe=parts.probe,
        probe_train=parts.probe_train,
        reference=parts.reference,
        test=split.test,
        oracle_reason=parts.oracle_reason,
        notes=notes,
        warnings=warnings,
        not_evaluated=not_evaluated,
        candidate=settings.candidate,
        further_seeds=further_seeds,
    )


def evaluated_of_split(
    index: pd.DataFrame, schema: Schema, recipe: Mapping[str, Any], settings: EvaluateSettings
) -> list[Combination]:
    """The combinations that a split holds out and that can be evaluated, where the dataset is only listed yet.

    Args:
        index: A row per patch that the dataset will have, with the split.
        schema: Its fields.
        recipe: How the split was made.
        settings: The evaluation.

    Raises:
        UserError: As for :func:`open_study`, of the split and the combinations.
    """
    if not settings.site_field:
        index, schema = with_one_site(index, schema, settings.real)
    return _of_split(settings, index, schema, recipe, _Split.of(index, schema, settings))[0]


def _known_fields(dataset: PatchDataset) -> tuple[str, ...]:
    index = dataset.index
    return tuple(
        name for name in categorical_fields(dataset.schema) if (~index[name].astype(str).isin(NOT_CONDITIONED)).any()
    )


def _check_held_out(held_out: Sequence[Mapping[str, str]], schema: Schema, downstream: bool) -> list[Combination]:
    if not held_out and downstream:
        raise UserError(
            "No held-out combination is given.",
            "Set held_out, e.g. [{class: spindle, site: birch}], or downstream=false to evaluate the patches alone.",
        )
    names = categorical_fields(schema)
    for combination in held_out:
        for name, value in combination.items():
            if name not in names:
                known = nearest(name, names)
                raise UserError(f"A held-out combination uses {name!r}, no class or categorical field; {known}.")
            if schema.field(name).code(value) <= NULL + 1:
                raise UserError(f"A held-out combination needs a value of {name!r}, not {value!r}.")
    return [dict(c) for c in held_out]


def _of_split(
    settings: EvaluateSettings, index: pd.DataFrame, schema: Schema, recipe: Mapping[str, Any], split: _Split
) -> tuple[list[Combination], list[NotEvaluated]]:
    """The combinations that the split holds out: those that can be evaluated, and the others.

    Raises:
        UserError: None can be evaluated, and classifiers are to be compared.
    """
    found, others = held_out_of_split(
        index, schema, recipe, settings.site_field or NO_SITE, settings.only, split.shown, split.test, settings.unseen
    )
    if not found and settings.downstream:
        what = f"{split.class_field} × {settings.site_field}" if settings.site_field else split.class_field
        raise UserError(
            not_evaluated_text(found, others)
            if others
            else f"Split {settings.split!r} holds out no combination: training has every {what} of the test patches.",
            "Hold out combinations of more patients, or give the test part more of them (`latent-medi split`: "
            "hold_out, fractions, hold_out_fractions); or set downstream=false (in `run`: evaluate.downstream=false) "
            "to evaluate the patches alone.",
        )
    return found, others


def _training_patients(real: PatchDataset, settings: EvaluateSettings, split: _Split) -> set[str]:
    """Hashes of the patients that a model of this split may have been trained on: those of the filter, or all."""
    every = real.rows({SPLIT_PREFIX + settings.split: settings.train_value}) if settings.only else split.shown
    return {patients_hash(real.index["patient"].iloc[rows]) for rows in (split.shown, every)}


def _halve_test(
    index: pd.DataFrame, test: np.ndarray, fields: Sequence[str], others: Sequence[str], seed: int
) -> np.ndarray:
    """Which test rows stand in for a probe split, bool over ``test``: half of the patients of each combination of the
    fields, with about the same mix of the other fields in both halves.
    """
    first = index.iloc[test].drop_duplicates("patient").sort_values("patient").astype(str)
    rng = np.random.default_rng(seed)
    chosen: set[str] = set()
    for _, group in first.groupby(list(fields), sort=True):
        odd = 0
        mixed = group.iloc[rng.permutation(len(group))]
        kinds = [alike for _, alike in mixed.groupby(list(others), sort=True)] if others else [mixed]
        # In an order by chance: the reference keeps the first kind's odd patient, the other half gets the second's.
        for which in rng.permutation(len(kinds)) if len(kinds) > 1 else [0]:
            taken, odd = divmod(len(kinds[which]) + odd, 2)
            chosen.update(kinds[which]["patient"].to_numpy()[:taken])
    table = index.iloc[test]
    result: np.ndarray = table["patient"].astype(str).isin(chosen).to_numpy()
    return result


def _open_real(settings: EvaluateSettings) -> PatchDataset:
    """The real dataset, if it has the class, site and split and no synthetic patch."""
    real = PatchDataset.open(settings.real)
    index, column = real.index, f"split_{settings.split}"
    if real.schema.class_field is None:
        raise UserError(f"The dataset {settings.real} has no class field.", "An evaluation needs one.")
    if column not in index.columns:
        raise UserError(
            f"The dataset {settings.real} has no split {settings.split!r}; {nearest(settings.split, real.splits)}.",
            f"`latent-medi split {settings.real} name={settings.split} …` makes one.",
        )
    if not settings.site_field:
        with_site, schema = with_one_site(real.index, real.schema, real.folder)
        real = PatchDataset(real.folder, real.info, schema, with_site)
    elif settings.site_field not in real.schema.names:
        close = nearest(settings.site_field, real.schema.names)
        problem = f"The dataset {settings.real} has no field {settings.site_field!r}; {close}."
        raise UserError(
            problem, "Name the hospital's field with site_field=NAME; site_field='' leaves out all that compares sites."
        )
    if synthetic := int((index["origin"] != "real").sum()):
        raise UserError(f"{settings.real} holds {synthetic} synthetic patches; a reference must be real.")
    assert_patient_disjoint(index, column)
    known = categorical_fields(real.schema)
    for name in (name for fields in settings.by_fields for name in fields):
        if name not in known:
            raise UserError(f"by_fields names {name!r}, no class or categorical field; {nearest(name, known)}.")
    return real


@dataclass(frozen=True)
class _Split:
    """Rows of the real index by split value, of patches with a known class.

    Args:
        class_field: Name of the class field.
        train, probe, test: Rows with that value.
        shown: Training patches and those without a known class.
        dropped: Patches of the split without a known class.
    """

    class_field: str
    train: np.ndarray
    probe: np.ndarray
    test: np.ndarray
    shown: np.ndarray
    dropped: int

    @classmethod
    def of(cls, index: pd.DataFrame, schema: Schema, settings: EvaluateSettings) -> _Split:
        """The split that the settings name.

        Raises:
            UserError: There is no training or no test patch.
        """
        field = schema.class_field
        assert field is not None
        kept = only_mask(index, settings.only, settings.real)
        split = np.where(kept, index[f"split_{settings.split}"].to_numpy(dtype=str), "")
        known = index[field.name].isin(field.values).to_numpy(bool)
        values = np.where(known, split, "")
        names = (settings.train_value, settings.probe_value, settings.test_value)
        train, probe, test = (np.flatnonzero(values == name) for name in names)
        for name, rows in ((settings.train_value, train), (settings.test_value, test)):
            if len(rows) == 0:
                with_only = f" with {only_text(settings.only)}" if settings.only else ""
                raise UserError(
                    f"Split {settings.split!r} has no {name!r} patches{with_only}; it has {sorted(set(values))}."
                )
        shown = np.flatnonzero(split == settings.train_value)
        return cls(field.name, train, probe, test, shown, int(((split != "") & ~known).sum()))


def _check_combinations(
    settings: EvaluateSettings, real: PatchDataset, split: _Split, held_out: Sequence[Combination]
) -> None:
    """Refuse a combination that training has or that test patches lack, and a training set of one class."""
    for combination in held_out:
        keep = matches(real.index, combination)
        if settings.unseen and keep[split.train].any():
            raise UserError(
                f"{describe(combination)} is not held out: {int(keep[split.train].sum())} training patches have it.",
                f"Name combinations that training lacks, or {_MAY_BE_SEEN}.",
            )
        if not keep[split.test].any():
            raise UserError(f"{describe(combination)} has no test patch, so nothing can be said about it.")
    classes = sorted(set(real.index[split.class_field].to_numpy(str)[split.train]))
    if settings.downstream and len(classes) < 2:
        raise UserError(
            f"All training patches have {split.class_field} = {classes[0]}: a classifier needs two classes.",
            "Set downstream=false to evaluate the patches alone.",
        )


@dataclass(frozen=True)
class _Parts:
    """Rows of the real index that depend on whether there is a probe split; see :class:`Study`."""

    probe: np.ndarray
    probe_train: np.ndarray
    reference: np.ndarray
    oracle_reason: str = ""
    notes: tuple[str, ...] = ()


def _halved(real: PatchDataset, split: _Split, settings: EvaluateSettings) -> _Parts:
    """Half of the test patients in place of a probe split, for real-vs-real distances and linear probes."""
    fields = (split.class_field, (settings.site_field or NO_SITE))
    others = [name for name in categorical_fields(real.schema) if name not in fields]
    half = _halve_test(real.index, split.test, fields, others, settings.seed)
    probe = split.test[half]
    reason = (
        f"the split {settings.split!r} has no {settings.probe_value!r} patients, so no real patch of a held-out "
        "combination is free for training"
    )
    note = (
        f"There is no {settings.probe_value!r} split: half of the test patients of each class and site "
        f"({len(set(real.index['patient'].iloc[probe]))} patients) give the real-vs-real distances and, with the "
        "training patches, train the linear probes; fidelity and the linear probes' accuracy on real patches use the "
        "other half. Downstream accuracy uses all of them."
    )
    return _Parts(probe, np.concatenate([split.train, probe]), split.test[~half], reason, (note,))


def _shared_pictures(index: pd.DataFrame, split: str) -> list[str]:
    """A warning if several parts of the split have the same picture."""
    shared = pictures_in_several_parts(index, index[f"split_{split}"])
    if not len(shared):
        return []
    first = shared["key"][shared[PICTURE] == shared[PICTURE].iloc[0]][:2]
    return [
        f"{shared[PICTURE].nunique()} pictures are in several parts of split {split!r} under different patients, such "
        f"as {' = '.join(first)}: test patches were seen in training. `latent-medi split` keeps such patients together."
    ]


def _different(first: SyntheticSet, others: Sequence[SyntheticSet]) -> list[SyntheticSet]:
    """The samples of all training seeds of a model.

    Raises:
        UserError: Two of them are one folder, or were made of different fields.
    """
    every = [first, *others]
    folders = [Path(samples.dataset.folder).resolve() for samples in every]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"further_seeds names a folder of {first.name} twice.", "Name samples of models with other training seeds."
        )
    for samples in others:
        if samples.fields != first.fields:
            raise UserError(
                f"{samples.dataset.folder} has the fields {', '.join(samples.fields)}, {first.name} itself "
                f"{', '.join(first.fields)}.",
                "Under further_seeds name samples of the same model and plan, trained with another seed.",
            )
    return every


def _open_synthetic(settings: EvaluateSettings, name: str, folder: str, class_field: str) -> SyntheticSet:
    """One synthetic set with the rows of its selection.

    Raises:
        UserError: It has another class field, holds real patches, lacks the selection, or has none of the values of
            ``only``.
    """
    dataset = PatchDataset.open(folder)
    if dataset.schema.class_field is None or dataset.schema.class_field.name != class_field:
        raise UserError(f"The synthetic dataset {folder} ({name}) has no class field {class_field!r}.")
    if (dataset.index["origin"] != "synthetic").any():
        raise UserError(f"The synthetic dataset {folder} ({name}) holds real patches.", "Name one without them.")
    rows = np.arange(len(dataset))
    if name in settings.selected:
        rows = np.flatnonzero(selected_mask(dataset, settings.selected[name]))
    for field, wanted in settings.only.items():
        if field in dataset.schema.names:  # not slides or patients, whose names are the samples' own
            values = dataset.index[field].astype(str).iloc[rows]
            rows = rows[values.isin([*wanted, *NOT_CONDITIONED]).to_numpy(bool)]
    if settings.only and not len(rows):
        raise UserError(f"The synthetic dataset {folder} ({name}) has no patch with {only_text(settings.only)}.")
    fields = _known_fields(dataset)
    log.info("Synthetic set %s: %d patches, fields %s", name, len(rows), ", ".join(fields))
    return SyntheticSet(name, dataset, fields, rows)


def _training_hashes(synthetic: SyntheticSet) -> tuple[bool, list[str | None]]:
    """Whether the record of what the model was trained on is complete, and the hash of the patients of each part."""
    record = synthetic.dataset.info.get("provenance", {}).get("seen") or {"complete": False, "parts": []}
    return record["complete"], [part.get("patients") for part in record["parts"]]


def _other_patients(synthetic: SyntheticSet, settings: EvaluateSettings, trained: set[str]) -> list[str]:
    """A warning if the model was trained on other patients than those with one of the given hashes."""
    if all(known is None or known in trained for known in _training_hashes(synthetic)[1]):
        return []
    return [
        f"The model that made {synthetic.dataset.folder} ({synthetic.name}) was trained on other patients than the "
        f"{settings.train_value!r} part of split {settings.split!r}: test patients may be among them."
    ]


def _unknown_training(synthetic: SyntheticSet, held_out: Sequence[Combination]) -> list[str]:
    """Notes on what a synthetic set does not record of its model's training.

    Raises:
        UserError: The model was trained on a held-out combination.
    """
    name, dataset = synthetic.name, synthetic.dataset
    record = dataset.info.get("provenance", {}).get("seen")
    notes = []
    for combination in held_out:
        if was_trained_on(record, combination):
            raise UserError(
                f"The model that made {dataset.folder} ({name}) was trained on patches of {describe(combination)}.",
                f"Train one without them, name combinations that it did not see, or {_MAY_BE_SEEN}.",
            )
    if any(was_trained_on(record, combination) is None for combination in held_out):
        notes.append(f"The samples of {name} do not record whether their model was trained on held-out combinations.")
    complete, hashes = _training_hashes(synthetic)
    if not complete or None in hashes:
        notes.append(f"The samples of {name} do not record which patients their model was trained on.")
    return notes
