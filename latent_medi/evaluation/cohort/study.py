"""The cohort of one evaluation: the parts of the real rows, the held-out combinations, and the synthetic sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.combinations import (
    Combination,
    Labels,
    NotEvaluated,
    among,
    categorical_fields,
    matches,
)
from latent_medi.evaluation.cohort.roles import Roles, synthetic_roles
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.shards.checking.duplicates import joined_patients
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)

NO_SITE, ALL_SITES = "site", "all"
"""Field and value that stand for the hospital in a study without one; a result then names no site field."""
NOT_CONDITIONED = frozenset({UNKNOWN_WORD, "null", ""})
"""Values of a synthetic patch's field that its model was not conditioned on."""


@dataclass(frozen=True)
class SyntheticSet:
    """One synthetic dataset.

    Args:
        name: Its name, such as "medi".
        dataset: Its patches.
        fields: The class and categorical fields that its model was conditioned on: those with a known value.
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

    @cached_property
    def labels(self) -> Labels:
        """Which rows of ``index`` have which values."""
        return Labels(self.index)


@dataclass(frozen=True)
class Study:
    """Real rows by the part they play; all are row numbers of ``real.index``.

    Args:
        real: The real dataset.
        class_field, site_field: Names of the two fields.
        held_out: Combinations without a training patch.
        synthetic: Synthetic datasets by name.
        train: Training patches.
        shown: Training patches and those without a known class: all that a model may have been shown.
        probe: Further real patches of other patients, for real-vs-real distances.
        probe_train: Real patches that the linear probes of the adherence are trained on.
        reference: Test patches for fidelity and for the linear probes' accuracy on real patches.
        test: Test patches for the downstream comparison.
        oracle_reason: Why there is no oracle; empty if there is one.
        notes: What a reader must know about these choices.
        warnings: What the verdict must not be read without.
        not_evaluated: Combinations that the split holds out and that cannot be evaluated.
        candidate: Name of the candidate among the synthetic sets; empty for the default.
        further_seeds: By synthetic set further ones, of the same model with other training seeds.
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
    not_evaluated: list[NotEvaluated] = field(default_factory=list)
    candidate: str = ""
    further_seeds: dict[str, list[SyntheticSet]] = field(default_factory=dict)

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
        result: np.ndarray = self.index[self.class_field].to_numpy(str)
        return result

    @cached_property
    def site_labels(self) -> np.ndarray:
        """Site of each row of the real index, text [N]."""
        result: np.ndarray = self.index[self.site_field].to_numpy(str)
        return result

    @cached_property
    def patients(self) -> np.ndarray:
        """Patient of each row of the real index, text [N]; those who share a picture are one."""
        return joined_patients(self.index).astype(str)

    @cached_property
    def labels(self) -> Labels:
        """Which rows of the real index have which values."""
        return Labels(self.index)

    def having(self, combination: Mapping[str, str]) -> np.ndarray:
        """Which rows of the real index have all the values of a combination, bool [N]."""
        return self.labels.having(combination)

    def rows_of(self, part: np.ndarray, combination: Mapping[str, str]) -> np.ndarray:
        """Those rows of a part, such as ``test``, that have all the values of a combination."""
        result: np.ndarray = part[self.having(combination)[part]]
        return result

    def categorical(self) -> tuple[str, ...]:
        """Names of the class and categorical fields."""
        return categorical_fields(self.real.schema)


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


def with_one_site(index: pd.DataFrame, schema: Schema, folder: str | Path) -> tuple[pd.DataFrame, Schema]:
    """Index and schema of a dataset without a field of the hospital, given one that is the same for all patches.

    What compares sites then finds a single one.

    Args:
        index: A row per patch.
        schema: Its fields.
        folder: The dataset's, for messages.

    Raises:
        UserError: It has a field of that name.
    """
    if NO_SITE in schema.names:
        problem = f"site_field is empty, and {folder} has a field {NO_SITE!r}."
        raise UserError(problem, f"Leave site_field out, or set site_field={NO_SITE}.")
    index = index.assign(**{NO_SITE: ALL_SITES})
    return index, Schema.merge(schema, Schema.from_table(index, None, [NO_SITE]))


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
