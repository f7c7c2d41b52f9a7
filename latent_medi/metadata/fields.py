"""One metadata field: its vocabulary or scaling, and the code of each value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest

NULL = 0
"""Code of a field that the model is not conditioned on (dropped for guidance)."""
UNKNOWN = 1
"""Code of a value that is missing in the data."""
FIRST_VALUE = 2
"""Code of the first value of a vocabulary, and the state of a continuous field that has a value."""
UNKNOWN_WORD = "unknown"
"""The word for a missing value in tables, JSON and indexes."""

# "NA" is a tissue-source-site code of TCGA and "none" can be a real category, so neither is here.
MISSING: frozenset[str] = frozenset(
    {"", "unknown", "'--", "--", "not reported", "not available"}
    | {"[unknown]", "[not reported]", "[not available]", "[not evaluated]"}
)
"""Words that mean missing, in lower case; case and blanks around a word are ignored."""

Kind = Literal["class", "categorical", "continuous"]


def is_missing(value: Any) -> bool:
    """Whether a cell means missing: one of :data:`MISSING`, NaN or ``pandas.NA``, but not ``None``."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is pd.NA or value is pd.NaT or (isinstance(value, (float, np.floating)) and math.isnan(value))


@dataclass(frozen=True)
class Field:
    """A metadata field of patches.

    Args:
        name: Column name.
        kind: ``class`` (at most one in a schema), ``categorical`` or ``continuous``.
        values: The vocabulary of a class or categorical field; the value at position i has code i + 2.
        mean: Of a continuous field, in its unit: subtracted to standardise.
        std: Of a continuous field, in its unit, > 0: divided by to standardise.
        unit: Of a continuous field, such as ``years``.
        quantiles: 21 empirical quantiles (0, 0.05, …, 1) of a continuous field, or none; for drawing realistic values.
        missing: Share of rows without a value when the schema was made, 0 to 1.

    Raises:
        UserError: A value occurs twice or means missing, or the scaling is invalid.
    """

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    unit: str = ""
    quantiles: tuple[float, ...] = ()
    missing: float = 0.0
    _codes: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "quantiles", tuple(float(q) for q in self.quantiles))
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"The name of a field is {self.name!r}; it must be a text.")
        if self.kind not in ("class", "categorical", "continuous"):
            raise UserError(f"Field {self.name!r} has kind {self.kind!r}.", "Use class, categorical or continuous.")
        if self.continuous:
            if self.values:
                raise UserError(f"The continuous field {self.name!r} cannot have a vocabulary.")
            if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
                raise UserError(
                    f"Field {self.name!r} needs a finite mean and a std > 0, not {self.mean} and {self.std}."
                )
        for value in self.values:
            if not isinstance(value, str):
                raise UserError(f"Field {self.name!r} has the value {value!r}; values are strings.")
            if is_missing(value):
                raise UserError(f"Field {self.name!r} cannot have the value {value!r}, which means missing data.")
            if value != value.strip():
                raise UserError(
                    f"Field {self.name!r} has {value!r} with blanks around it.", "Strip the blanks in the table."
                )
            if value in self._codes:
                raise UserError(f"Field {self.name!r} has the value {value!r} twice.")
            self._codes[value] = FIRST_VALUE + len(self._codes)

    @property
    def continuous(self) -> bool:
        """Whether the field is a number instead of a value of a vocabulary."""
        return self.kind == "continuous"

    @property
    def n_codes(self) -> int:
        """Number of codes: null, unknown, and one for each value, or one for "has a value" of a continuous field."""
        return 3 if self.continuous else FIRST_VALUE + len(self.values)

    def code(self, value: Any) -> int:
        """The code of a value; :data:`UNKNOWN` for a word that means missing.

        Raises:
            UserError: The value is not in the vocabulary (or is no number); names the field, the value and the closest
                known values.
        """
        if value is None:
            raise UserError(
                f"Field {self.name!r} is None.",
                f"Write {UNKNOWN_WORD!r} for missing data, or leave the field out for no condition.",
            )
        if is_missing(value):
            return UNKNOWN
        if self.continuous:
            return FIRST_VALUE if self.number(value) is not None else UNKNOWN
        code = self._codes.get(value if isinstance(value, str) else str(value))
        if code is None:
            raise UserError(f"Field {self.name!r} has no value {str(value)!r}; {nearest(str(value), self.values)}.")
        return code

    def value(self, code: int) -> str:
        """The value of a code; ``"unknown"`` for :data:`UNKNOWN`.

        Raises:
            UserError: The code is null or outside the vocabulary, or the field is continuous and the code means "has a
                value".
        """
        if code == UNKNOWN:
            return UNKNOWN_WORD
        if self.continuous or not FIRST_VALUE <= code < self.n_codes:
            raise UserError(
                f"Field {self.name!r} has no value with code {code}; "
                f"its codes run from {UNKNOWN} to {self.n_codes - 1}."
            )
        return self.values[code - FIRST_VALUE]

    def standardise(self, x: Any) -> Any:
        """(x − mean) / std of a continuous field, for a number or an array."""
        return (x - self.mean) / self.std

    def number(self, value: Any) -> float | None:
        """A continuous value as a finite number; ``None`` if it is missing."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number) and not isinstance(value, (float, np.floating)):
            raise UserError(
                f"Field {self.name!r} is continuous, and {value!r} is not a number.",
                f"If it means missing, write {UNKNOWN_WORD} or leave the cell empty.",
            )
        if math.isinf(number):
            raise UserError(f"Field {self.name!r} is continuous, and {value!r} is not finite.")
        return None if math.isnan(number) else number

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with all codes."""
        if not self.continuous:
            return {"name": self.name, "kind": self.kind, "codes": dict(self._codes), "missing": self.missing}
        scaling = {"unit": self.unit, "mean": self.mean, "std": self.std, "quantiles": list(self.quantiles)}
        return {"name": self.name, "kind": self.kind, **scaling, "missing": self.missing}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Field:
        """The field with the form of :meth:`to_dict`; keys may have any order.

        Raises:
            UserError: An entry is absent or of another type, or codes are not 2, 3, 4, … without a gap.
        """
        number = (int, float)
        needed = {"mean": number, "std": number} if data.get("kind") == "continuous" else {"codes": dict}
        further = {"unit": str, "quantiles": list, "missing": number}
        kinds: dict[str, Any] = {"name": str, "kind": str} | needed | {k: v for k, v in further.items() if k in data}
        for key, kind in kinds.items():
            if not isinstance(data.get(key), kind) or isinstance(data[key], bool):
                raise UserError(f"Field {data.get('name')!r}: its {key!r} is {data.get(key)!r}.")
        codes = dict(data.get("codes", {}))
        if not all(type(code) is int for code in codes.values()):
            raise UserError(f"The codes of field {data['name']!r} are not whole numbers: {codes}.")
        values = tuple(sorted(codes, key=lambda v: codes[v]))
        if [codes[v] for v in values] != list(range(FIRST_VALUE, FIRST_VALUE + len(values))):
            raise UserError(
                f"The codes of field {data['name']!r} are not {FIRST_VALUE}, {FIRST_VALUE + 1}, … "
                f"without a gap: {codes}."
            )
        return Field(
            name=data["name"],
            kind=data["kind"],
            values=values,
            mean=float(data.get("mean", 0.0)),
            std=float(data.get("std", 1.0)),
            unit=data.get("unit", ""),
            quantiles=tuple(data.get("quantiles", ())),
            missing=float(data.get("missing", 0.0)),
        )
