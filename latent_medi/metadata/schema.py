"""Fields, their vocabularies, and the integer codes that a model is conditioned on.

Codes are explicit and permanent: 0 is *null* (not conditioned on, as in guidance), 1 is *unknown* (missing in the
data), then one code per value. A vocabulary is sorted when it is created; later values are appended, so that a code
never changes its meaning. A value outside the vocabulary is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.fields import (
    FIRST_VALUE,
    MISSING,
    NULL,
    UNKNOWN,
    UNKNOWN_WORD,
    Field,
    Kind,
    is_missing,
)
from latent_medi.metadata.tables import require_columns

__all__ = ["FIRST_VALUE", "MISSING", "NULL", "UNKNOWN", "UNKNOWN_WORD", "Field", "Schema", "is_missing"]

SCHEMA_VERSION = 1
QUANTILES = 21


@dataclass(frozen=True)
class Schema:
    """The fields of a dataset or a model: the class first, then the others in the given order.

    Args:
        fields: The fields; names differ and at most one is the class.
    """

    fields: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        # The sort is stable: only the class moves.
        object.__setattr__(self, "fields", tuple(sorted(self.fields, key=lambda f: f.kind != "class")))
        if sum(f.kind == "class" for f in self.fields) > 1:
            classes = [f.name for f in self.fields if f.kind == "class"]
            raise UserError(f"Only one field can be the class, not {classes}.")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"Two fields have the same name: {list(self.names)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all fields, in order."""
        return tuple(f.name for f in self.fields)

    @property
    def class_field(self) -> Field | None:
        """The class field; ``None`` if there is none."""
        return next((f for f in self.fields if f.kind == "class"), None)

    def field(self, name: str) -> Field:
        """The field of that name.

        Raises:
            UserError: There is no such field; names the closest.
        """
        for candidate in self.fields:
            if candidate.name == name:
                return candidate
        raise UserError(f"There is no field {name!r}; {nearest(name, self.names)}.")

    @staticmethod
    def from_table(
        table: pd.DataFrame,
        class_field: str | None,
        categorical: Sequence[str] = (),
        continuous: Sequence[str] = (),
        units: Mapping[str, str] | None = None,
    ) -> Schema:
        """A new schema from a table, with sorted vocabularies, and scaling and quantiles of the rows that have a value.

        Args:
            table: A row per patch.
            class_field: The class column, if there is one.
            categorical: Categorical columns.
            continuous: Continuous columns.
            units: Unit by continuous column.

        Raises:
            UserError: A column is absent, or a continuous value is no number.
        """
        units = dict(units or {})
        fields = [_vocabulary(table, class_field, "class")] if class_field is not None else []
        fields += [_vocabulary(table, name, "categorical") for name in categorical]
        fields += [_scaling(table, name, units.pop(name, "")) for name in continuous]
        if units:
            raise UserError(f"units has {sorted(units)}, which are not among the continuous fields {list(continuous)}.")
        return Schema(tuple(fields))

    def encode(
        self, table: pd.DataFrame | Sequence[Mapping[str, Any]], absent: Literal["error", "null"] = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and standardised values of all fields, in order.

        Args:
            table: N rows; a missing value is one of :data:`MISSING`, a missing number may also be NaN.
            absent: What a field that is not given means, or ``None`` in a sequence of mappings: an error, or
                :data:`NULL`, as for a sampler.

        Returns:
            int64 [N, F] codes (of a continuous field its state: null, unknown, value) and float32 [N, F] values, 0
            where there is none.

        Raises:
            UserError: A value outside the vocabulary, a field that is not given, a cell of a table (or a word of a
                vocabulary) that is empty or NaN, or (``absent="null"``) a name that is no field.
        """
        if absent not in ("error", "null"):
            raise ValueError(f"absent is 'error' or 'null', not {absent!r}")
        count = len(table)
        codes = np.full((count, len(self.fields)), NULL, dtype=np.int64)
        values = np.zeros((count, len(self.fields)), dtype=np.float32)
        if absent == "null" and not isinstance(table, pd.DataFrame):
            for name in {name for row in table for name in row}:
                self.field(name)  # refuses a misspelled field
        for position, known in enumerate(self.fields):
            column = _column(table, known.name)
            if column is None:
                if absent == "error" and count:
                    raise UserError(
                        f"The column of field {known.name!r} is absent; {nearest(known.name, _columns(table))}."
                    )
                continue
            # An empty cell of a table is an error, not a condition left out.
            skip = absent == "null" and not isinstance(table, pd.DataFrame)
            codes[:, position], values[:, position] = _encode_column(known, column, skip)
        return codes, values

    def decode(self, codes: np.ndarray, values: np.ndarray) -> list[dict[str, str | float]]:
        """The rows that :meth:`encode` encoded; null fields are left out, unknown ones are ``"unknown"``."""
        rows: list[dict[str, str | float]] = []
        for row_codes, row_values in zip(np.asarray(codes), np.asarray(values), strict=True):
            row: dict[str, str | float] = {}
            for known, code, value in zip(self.fields, row_codes, row_values, strict=True):
                if code == NULL:
                    continue
                has_number = known.continuous and code == FIRST_VALUE
                row[known.name] = float(value) * known.std + known.mean if has_number else known.value(int(code))
            rows.append(row)
        return rows

    def append(self, field_name: str, values: Sequence[str]) -> Schema:
        """This schema with values appended to one field, in the given order; existing codes do not change.

        Raises:
            UserError: The field is continuous, or already has a value.
        """
        old = self.field(field_name)
        if old.continuous:
            raise UserError(f"Field {field_name!r} is continuous: it has no vocabulary to append to.")
        new = replace(old, values=(*old.values, *values))
        return Schema(tuple(new if f.name == field_name else f for f in self.fields))

    def subset(self, names: Iterable[str]) -> Schema:
        """The schema of some fields (see :meth:`named`), in the given order (the class first), with all values."""
        return Schema(tuple(self.field(name) for name in self.named(names)))

    def named(self, names: Iterable[str]) -> list[str]:
        """Names as settings give them: "class" is the class field, whatever its name, unless another has that name."""
        known = self.class_field
        return [known.name if name == "class" and name not in self.names and known else name for name in names]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "schema_version": SCHEMA_VERSION,
            "reserved_codes": {"null": NULL, "unknown": UNKNOWN},
            "fields": [f.to_dict() for f in self.fields],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schema:
        """The schema with the form of :meth:`to_dict`.

        Raises:
            UserError: A newer version wrote it, or it is invalid.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The metadata schema has version {version!r}; this program reads version {SCHEMA_VERSION}.",
                "Update latent-medi.",
            )
        try:
            return Schema(tuple(Field.from_dict(f) for f in data["fields"]))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"The metadata schema is invalid: {type(error).__name__} {error}.",
                "Restore it from its source, or run the step that writes it again.",
            ) from None

    @staticmethod
    def merge(a: Schema, b: Schema) -> Schema:
        """The union of two schemas: fields and codes of ``a``, with the fields and values that only ``b`` has appended.

        Scaling constants are those of ``a``.

        Raises:
            UserError: A field differs in kind or unit, or both have a class field with different names.
        """
        problems: list[str] = []
        merged = {f.name: f for f in a.fields}
        for theirs in b.fields:
            ours = merged.get(theirs.name)
            if ours is None:
                merged[theirs.name] = theirs
                continue
            problems += _clashes(ours, theirs)
            if not problems and not ours.continuous:
                known = set(ours.values)
                merged[theirs.name] = replace(
                    ours, values=ours.values + tuple(v for v in theirs.values if v not in known)
                )
        classes = [f.name for f in merged.values() if f.kind == "class"]
        if len(classes) > 1:
            problems.append(f"the class is {classes[0]!r} in one and {classes[1]!r} in the other")
        if problems:
            raise UserError(
                "The two metadata schemas cannot be merged: " + "; ".join(problems) + ".",
                "Rename or convert the columns first.",
            )
        return Schema(tuple(merged.values()))

    @staticmethod
    def compatible(model: Schema, dataset: Schema) -> None:
        """Check that a model's schema can encode every row of a dataset. The dataset may have further fields.

        Raises:
            UserError: Lists all fields that the dataset lacks or defines differently, and all values that the model
                does not have.
        """
        problems: list[str] = []
        theirs = {f.name: f for f in dataset.fields}
        for ours in model.fields:
            other = theirs.get(ours.name)
            if other is None:
                problems.append(f"field {ours.name!r} is not in the dataset ({nearest(ours.name, theirs)})")
                continue
            problems += _clashes(ours, other)
            if not ours.continuous and not other.continuous:
                known = set(ours.values)
                problems += [
                    f"the model has no {ours.name} = {v!r} ({nearest(v, ours.values)})"
                    for v in other.values
                    if v not in known
                ]
        if problems:
            raise UserError(
                "The dataset does not fit the model: " + "; ".join(problems) + ".",
                "Correct the table, or append the values to the model's schema and train it on them.",
            )


def _clashes(a: Field, b: Field) -> list[str]:
    if a.kind != b.kind:
        return [f"field {a.name!r} is {a.kind} in one and {b.kind} in the other"]
    if a.unit != b.unit:
        return [f"field {a.name!r} is in {a.unit!r} in one and in {b.unit!r} in the other"]
    return []


def _columns(table: pd.DataFrame | Sequence[Mapping[str, Any]]) -> list[str]:
    if isinstance(table, pd.DataFrame):
        return [str(c) for c in table.columns]
    return sorted({name for row in table for name in row})


def _column(table: pd.DataFrame | Sequence[Mapping[str, Any]], name: str) -> pd.Series | None:
    """A column, with ``None`` where a mapping lacks it; ``None`` if no row has it."""
    if isinstance(table, pd.DataFrame):
        return table[name] if name in table.columns else None
    if not any(name in row for row in table):
        return None
    return pd.Series([row.get(name) for row in table], dtype=object)


def _distinct(column: pd.Series) -> tuple[np.ndarray, list[Any]]:
    """The position of each cell among the distinct values, and these. Values of different types differ (1 and "1")."""
    seen: dict[Any, int] = {}
    # NaN is not equal to itself: without one common object, every NaN would be distinct.
    cells = [np.nan if isinstance(c, (float, np.floating)) and math.isnan(c) else c for c in column.tolist()]
    positions = np.fromiter((seen.setdefault((type(c), c), len(seen)) for c in cells), dtype=np.int64, count=len(cells))
    return positions, [content for _, content in seen]


def _encode_column(known: Field, column: pd.Series, skip_none: bool) -> tuple[np.ndarray, np.ndarray]:
    positions, contents = _distinct(column)
    codes = np.full(len(contents), NULL, dtype=np.int64)
    values = np.zeros(len(contents), dtype=np.float32)
    for i, content in enumerate(contents):
        if content is None and skip_none:
            continue
        try:
            if content is None or (not known.continuous and not isinstance(content, str) and is_missing(content)):
                raise UserError(
                    f"Field {known.name!r} is {content}.",
                    f"Write {UNKNOWN_WORD!r} for missing data, or leave the field out for no condition.",
                )
            codes[i] = known.code(content)
        except UserError as error:
            rows = np.flatnonzero(positions == i)
            where = f" First in row {rows[0]}, in {len(rows)} of {len(positions)} rows." if len(positions) > 1 else ""
            raise UserError(error.message + where, error.hint) from None
        if known.continuous and codes[i] == FIRST_VALUE:
            values[i] = known.standardise(float(content))
    return codes[positions], values[positions]


def _vocabulary(table: pd.DataFrame, name: str, kind: Kind) -> Field:
    require_columns(table, [name], "The table")
    positions, contents = _distinct(table[name])
    missing = np.array([c is None or is_missing(c) for c in contents], dtype=bool)
    values = sorted({str(c) for c, gone in zip(contents, missing, strict=True) if not gone})
    return Field(name, kind, tuple(values), missing=float(missing[positions].mean()) if len(positions) else 0.0)


def _scaling(table: pd.DataFrame, name: str, unit: str) -> Field:
    unscaled = Field(name, "continuous", unit=unit)
    require_columns(table, [name], "The table")
    cells = table[name].tolist()
    numbers = [None if c is None or is_missing(c) else unscaled.number(c) for c in cells]
    present = np.array([n for n in numbers if n is not None], dtype=np.float64)
    missing = 1 - len(present) / len(cells) if cells else 0.0
    if not len(present):
        return replace(unscaled, missing=missing)
    std = float(present.std())
    quantiles = np.quantile(present, np.linspace(0, 1, QUANTILES))
    return replace(
        unscaled,
        mean=float(present.mean()),
        std=std if std > 0 else 1.0,  # a constant column
        quantiles=tuple(quantiles.tolist()),
        missing=missing,
    )
