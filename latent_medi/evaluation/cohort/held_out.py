"""The combinations that a split holds out, and which of them can be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.evaluation.cohort.combinations import Combination, NotEvaluated, categorical_fields, describe
from latent_medi.evaluation.cohort.comparison_sets import MIN_SAMPLES
from latent_medi.metadata.estimability import Verdicts
from latent_medi.metadata.row_filter import Only
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.duplicates import joined_patients
from latent_medi.statistics.intervals import MIN_PATIENTS

_NAMED = 5  # combinations that a sentence names


def held_out_of_split(
    index: pd.DataFrame,
    schema: Schema,
    recipe: Mapping[str, Any],
    site_field: str,
    only: Only,
    train: np.ndarray,
    test: np.ndarray,
    unseen: bool = True,
) -> tuple[list[Combination], list[NotEvaluated]]:
    """The combinations that a split holds out: those that its recipe names, or else every class × site that test
    patches have and training patches lack.

    One can be evaluated with 10 test patients (an interval needs them) and 20 test patches (a distance needs them), if
    its values are known and training patches identify it.

    Args:
        index: A row per real patch.
        schema: The fields of the real patches.
        recipe: How the split was made.
        site_field: Field of the hospital.
        only: Values by field; combinations with another value are left out.
        train, test: Row numbers of both parts.
        unseen: Whether training patches may not have the combination.

    Returns:
        Those that can be evaluated, in the recipe's order or the vocabularies', and the others with the reasons.
    """
    named = recipe.get("held_out") or ()
    wanted = [{str(name): str(value) for name, value in each.items()} for each in named]
    if not wanted and schema.class_field is not None:
        fields = [schema.class_field.name, site_field]
        seen, tested = (_counts(index.iloc[rows], fields) for rows in (train, test))
        values = product(*(schema.field(name).values for name in fields))
        wanted = [dict(zip(fields, each, strict=True)) for each in values if each in tested and each not in seen]
    wanted = [c for c in wanted if all(value in only.get(name, [value]) for name, value in c.items())]
    evaluable = _Evaluable(index, schema, train, test, unseen)
    reasons = [evaluable.why_not(combination) for combination in wanted]
    evaluated = [combination for combination, why in zip(wanted, reasons, strict=True) if not why]
    return evaluated, [NotEvaluated(c, why) for c, why in zip(wanted, reasons, strict=True) if why]


def not_evaluated_text(evaluated: Sequence[Combination], others: Sequence[NotEvaluated]) -> str:
    """How many combinations of a split are evaluated, and what keeps the others from it, as a sentence."""
    few = [f"{describe(each.combination)} ({each.reason})" for each in others[:_NAMED]]
    more = f"; and {len(others) - _NAMED} more, which metrics.json lists" if len(others) > _NAMED else ""
    return (
        f"{len(evaluated)} of {len(evaluated) + len(others)} combinations that the split holds out are evaluated. Not "
        f"evaluated: {'; '.join(few)}{more}."
    )


class _Evaluable:
    """What is known of combinations; the counts of the same fields are made once."""

    def __init__(self, index: pd.DataFrame, schema: Schema, train: np.ndarray, test: np.ndarray, unseen: bool) -> None:
        patients = joined_patients(index).astype(str)
        self.schema, self.unseen = schema, unseen
        self.known = categorical_fields(schema)
        self.train, self.test = (index.iloc[rows].assign(patient=patients[rows]) for rows in (train, test))
        self.verdict = Verdicts(self.train, MIN_PATIENTS)
        self._of: dict[tuple[str, ...], tuple[Counter[tuple[str, ...]], ...]] = {}

    def why_not(self, combination: Combination) -> str:
        """Why a combination cannot be evaluated, as a clause; empty if it can."""
        for name, value in combination.items():
            if name not in self.known:
                return f"{name} is no class or categorical field"
            if value not in self.schema.field(name).values:
                return f"its {name} is not known"
        fields, values = tuple(combination), tuple(combination.values())
        if fields not in self._of:
            people = self.test.drop_duplicates([*fields, "patient"])
            self._of[fields] = tuple(_counts(table, fields) for table in (self.train, self.test, people))
        trained, patches, patients = (counts[values] for counts in self._of[fields])
        if self.unseen and trained:
            return f"{trained} training patches have it"
        if not patches:
            return "no test patch"
        if patients < MIN_PATIENTS:
            return f"{counted(patients, 'test patient')}, {MIN_PATIENTS} are needed"
        if patches < MIN_SAMPLES:
            return f"{patches} test patches, {MIN_SAMPLES} are needed"
        found = self.verdict(combination)
        return f"training cannot identify it: {found['reason']}" if found["verdict"] == "unidentifiable" else ""


def _counts(table: pd.DataFrame, fields: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Rows by combination of some fields."""
    return Counter(zip(*(table[name].astype(str) for name in fields), strict=True))
