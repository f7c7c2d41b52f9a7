"""The cohort of one evaluation: which real rows play which part, the held-out combinations, and the synthetic arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.combinations import Combination, among, categorical_fields, describe, matches
from latent_medi.evaluation.cohort.roles import Roles, synthetic_roles
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.metadata.schema import NULL, UNKNOWN_WORD, Schema
from latent_medi.metadata.seen import patients_hash, saw
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.shards.checking.duplicates import joined_patients, pictures_in_several_parts
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.layout import PICTURE
from latent_medi.shards.format.selections import selected_mask

log = get_logger(__name__)

NOT_CONDITIONED = frozenset({UNKNOWN_WORD, "null", ""})
"""Values of a synthetic patch's field that its model was not conditioned on."""


@dataclass
class SyntheticSet:
    """One synthetic dataset.

    Args:
        name: "medi", "cls" or another name.
        dataset: Its patches.
        fields: The class and categorical fields that its model was given; values unknown throughout do not count.
        rows: Row numbers of the dataset that take part, ascending.
    """

    name: str
    dataset: PatchDataset
    fields: tuple[str, ...]
    rows: np.ndarray

    @cached_property
    def index(self) -> pd.DataFrame:
        """A row per patch that takes part, numbered from 0."""
        return self.dataset.index.iloc[self.rows].reset_index(drop=True)


_MAY_BE_SEEN = "set unseen=false (evaluate.unseen=false of `latent-medi run`)"


@dataclass
class Study:
    """Real rows by the part they play; all are row numbers of ``real.index``.

    Args:
        real: The real dataset.
        class_field, site_field: Names of the two fields.
        held_out: Combinations without a training patch.
        synthetic: Synthetic datasets by name.
        train: Training patches.
        shown: Training patches and those without a known class: all that a model may have been shown.
        probe: Real patches of other patients for the floor.
        probe_train: What the probes of the adherence learn from.
        reference: Test patches for fidelity and for the probes' ceiling.
        test: Test patches for the downstream comparison.
        oracle_reason: Why there is no oracle; empty if there is one.
        notes: What a reader must know about these choices.
        warnings: What the verdict must not be read without.
        candidate: Name of the candidate among the synthetic sets; empty for the default.
    """

    real: PatchDataset
    class_field: str
    site_field: str
    held_out: list[Combination]
    synthetic: dict[str, SyntheticSet]
    train: np.ndarray
    shown: np.ndarray
    probe: np.ndarray
    probe_train: np.ndarray
    reference: np.ndarray
    test: np.ndarray
    oracle_reason: str
    notes: list[str]
    warnings: list[str] = field(default_factory=list)
    candidate: str = ""
    _masks: dict[tuple[tuple[str, str], ...], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def roles(self) -> Roles:
        """Which synthetic set is the candidate and which are its baselines."""
        return synthetic_roles(self.synthetic, self.candidate)

    @property
    def index(self) -> pd.DataFrame:
        """The real dataset's index."""
        return self.real.index

    @property
    def classes(self) -> list[str]:
        """Class values that occur in training or test patches, in the schema's order."""
        rows = np.concatenate([self.train, self.test])
        present = set(self.index[self.class_field].to_numpy()[rows])
        return [v for v in self.real.schema.field(self.class_field).values if v in present]

    @cached_property
    def class_labels(self) -> np.ndarray:
        """Class of each row of the real index, text [N]."""
        return self.index[self.class_field].to_numpy(str)

    @cached_property
    def site_labels(self) -> np.ndarray:
        """Site of each row of the real index, text [N]."""
        return self.index[self.site_field].to_numpy(str)

    @cached_property
    def patients(self) -> np.ndarray:
        """Patient of each row of the real index, text [N]; those who share a picture are one."""
        return joined_patients(self.index).astype(str)

    def having(self, combination: Mapping[str, str]) -> np.ndarray:
        """Which rows of the real index have all the values of a combination, bool [N]."""
        key = tuple(sorted(combination.items()))
        if key not in self._masks:
            self._masks[key] = matches(self.index, combination)
        return self._masks[key]

    def rows_of(self, part: np.ndarray, combination: Mapping[str, str]) -> np.ndarray:
        """Those rows of a part, such as ``test``, that have all the values of a combination."""
        return part[self.having(combination)[part]]

    def categorical(self) -> tuple[str, ...]:
        """Names of the class and categorical fields."""
        return categorical_fields(self.real.schema)


def _known_fields(dataset: PatchDataset) -> tuple[str, ...]:
    index = dataset.index
    return tuple(
        name for name in categorical_fields(dataset.schema) if (~index[name].astype(str).isin(NOT_CONDITIONED)).any()
    )


def _check_held_out(held_out: Sequence[Mapping[str, str]], schema: Schema, downstream: bool) -> list[Combination]:
    if not held_out and downstream:
        raise UserError(
            "No held-out combination is given.",
            "Set held_out, e.g. [{class: spindle, site: birch}], or downstream=false to judge the patches alone.",
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
    return table["patient"].astype(str).isin(chosen).to_numpy()


def open_study(settings: EvaluateSettings) -> Study:
    """Open the datasets, check them, and give every real row its part.

    Raises:
        UserError: No class field, an unknown split or field, synthetic rows among the real ones, a combination that is
            not held out or that has no test patch.
    """
    real = PatchDataset.open(settings.real)
    index = real.index
    column = f"split_{settings.split}"
    if real.schema.class_field is None:
        raise UserError(f"The dataset {settings.real} has no class field.", "An evaluation needs one.")
    if column not in index.columns:
        raise UserError(
            f"The dataset {settings.real} has no split {settings.split!r}; {nearest(settings.split, real.splits)}.",
            f"`latent-medi split {settings.real} name={settings.split} …` makes one.",
        )
    if settings.site_field not in real.schema.names:
        close = nearest(settings.site_field, real.schema.names)
        raise UserError(f"The dataset {settings.real} has no field {settings.site_field!r}; {close}.")
    synthetic = int((index["origin"] != "real").sum())
    if synthetic:
        raise UserError(f"{settings.real} holds {synthetic} synthetic patches; a reference must be real.")
    assert_patient_disjoint(index, column)
    held_out = _check_held_out(settings.held_out, real.schema, settings.downstream)
    for name in dict.fromkeys(name for fields in settings.cells for name in fields):
        if name not in categorical_fields(real.schema):
            close = nearest(name, categorical_fields(real.schema))
            raise UserError(f"cells names {name!r}, no class or categorical field; {close}.")

    class_field = real.schema.class_field.name
    notes: list[str] = []
    split = index[column].to_numpy(dtype=str).copy()
    trained = patients_hash(index["patient"][split == settings.train_value])
    shown = np.flatnonzero(split == settings.train_value)
    named = index[class_field].isin(real.schema.class_field.values).to_numpy(bool)
    if dropped := int(((split != "") & ~named).sum()):
        split[~named] = ""
        notes.append(
            f"{dropped} real patches without a known {class_field} take no part, but copies of them are looked for."
        )
    parts = {v: np.flatnonzero(split == v) for v in (settings.train_value, settings.probe_value, settings.test_value)}
    train, probe, test = parts.values()
    for name, rows in ((settings.train_value, train), (settings.test_value, test)):
        if len(rows) == 0:
            raise UserError(f"Split {settings.split!r} has no {name!r} patches; it has {sorted(set(split))}.")
    for combination in held_out:
        keep = matches(index, combination)
        if settings.unseen and keep[train].any():
            raise UserError(
                f"{describe(combination)} is not held out: {int(keep[train].sum())} training patches have it.",
                f"Name combinations that training lacks, or {_MAY_BE_SEEN}.",
            )
        if not keep[test].any():
            raise UserError(f"{describe(combination)} has no test patch, so nothing can be said about it.")

    taught = sorted(set(index[class_field].to_numpy(str)[train]))
    if settings.downstream and len(taught) < 2:
        raise UserError(
            f"All training patches show {class_field} = {taught[0]}: a classifier has nothing to tell apart.",
            "Set downstream=false to judge the patches alone.",
        )
    if len(probe):
        reference, probe_train, reason = test, probe, ""
    else:
        fields = (class_field, settings.site_field)
        others = [name for name in categorical_fields(real.schema) if name not in fields]
        half = _halve_test(index, test, fields, others, settings.seed)
        probe, reference = test[half], test[~half]
        probe_train = np.concatenate([train, probe])
        reason = (
            f"the split {settings.split!r} has no {settings.probe_value!r} patients, so no real patch of a held-out "
            "combination is free for training"
        )
        notes.append(
            f"There is no {settings.probe_value!r} split: half of the test patients of each class and site "
            f"({len(set(index['patient'].iloc[probe]))} patients) give the floor and, with the training patches, train "
            "the probes; fidelity and the probes' ceiling use the other half. Downstream accuracy uses all of them."
        )
    warnings: list[str] = []
    if len(shared := pictures_in_several_parts(index, index[column])):
        warnings.append(
            f"{shared[PICTURE].nunique()} pictures lie in several parts of split {settings.split!r} under different "
            f"patients, such as {' = '.join(shared['key'][shared[PICTURE] == shared[PICTURE].iloc[0]][:2])}: what is "
            "judged has been seen in training. `latent-medi split` keeps such patients together."
        )
    if unknown := sorted(set(settings.selected) - set(settings.synthetic)):
        raise UserError(f"selected names the arm {unknown[0]!r}; {nearest(unknown[0], settings.synthetic)}.")
    synthetic_roles(settings.synthetic, settings.candidate)
    arms = {}
    for name, folder in settings.synthetic.items():
        dataset = PatchDataset.open(folder)
        if dataset.schema.class_field is None or dataset.schema.class_field.name != class_field:
            raise UserError(f"The synthetic dataset {folder} ({name}) has no class field {class_field!r}.")
        if (dataset.index["origin"] != "synthetic").any():
            raise UserError(
                f"The synthetic dataset {folder} ({name}) holds real patches.", "An arm must be wholly synthetic."
            )
        rows = np.arange(len(dataset))
        if name in settings.selected:
            rows = np.flatnonzero(selected_mask(dataset, settings.selected[name]))
        if settings.unseen and held_out:
            notes += _check_unseen(name, dataset, held_out)
        record = dataset.info.get("provenance", {}).get("seen") or {"complete": False, "parts": []}
        hashes = [part.get("patients") for part in record["parts"]]
        if not record["complete"] or None in hashes:
            notes.append(f"The samples of {name} do not say which patients their model was trained on.")
        if any(known not in (None, trained) for known in hashes):
            warnings.append(
                f"The model that made {dataset.folder} ({name}) was trained on other patients than the "
                f"{settings.train_value!r} part of split {settings.split!r}: test patients may be among them."
            )
        arms[name] = SyntheticSet(name, dataset, _known_fields(dataset), rows)
        log.info("Arm %s: %d patches, fields %s", name, len(rows), ", ".join(arms[name].fields))
    return Study(
        real,
        class_field,
        settings.site_field,
        held_out,
        arms,
        train,
        shown,
        probe,
        probe_train,
        reference,
        test,
        reason,
        notes,
        warnings,
        settings.candidate,
    )


def _check_unseen(name: str, dataset: PatchDataset, held_out: Sequence[Combination]) -> list[str]:
    """Refuse samples of a model that was shown a held-out combination; a note where that cannot be told."""
    record = dataset.info.get("provenance", {}).get("seen")
    for combination in held_out:
        if saw(record, combination):
            raise UserError(
                f"The model that made {dataset.folder} ({name}) was trained on patches of {describe(combination)}.",
                f"Train one without them, name combinations that it did not see, or {_MAY_BE_SEEN}.",
            )
    if any(saw(record, combination) is None for combination in held_out):
        return [f"The samples of {name} do not say whether their model was trained on the held-out combinations."]
    return []


def held_out_with_class(study: Study) -> list[Combination]:
    """Held-out combinations with a class each; one without stands for all classes, what another implies is left out."""
    expanded: list[Combination] = []
    for combination in study.held_out:
        if study.class_field in combination:
            expanded.append(dict(combination))
        else:
            expanded += [{study.class_field: value, **combination} for value in study.classes]
    unique: list[Combination] = []
    for cell in expanded:
        implied = any(other != cell and other.items() <= cell.items() for other in expanded)
        if not implied and cell not in unique:
            unique.append(cell)
    return unique


def domain(study: Study, cell: Combination) -> Combination:
    """A cell without its class: where and how the patch was made."""
    return {k: v for k, v in cell.items() if k != study.class_field}


def affected_sites(study: Study) -> set[str]:
    """Sites that have a held-out combination; one that names no site affects each site where test patches show it."""
    sites: set[str] = set()
    for combination in study.held_out:
        if study.site_field in combination:
            sites.add(combination[study.site_field])
        else:
            sites |= set(
                study.index[study.site_field].to_numpy(str)[among(study.test, matches(study.index, combination))]
            )
    return sites
