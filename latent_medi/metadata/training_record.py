"""The record of the combinations that a model was trained on. It is stored with the model and with its samples, so
that an evaluation can check which combinations the model has not seen.

A record is JSON: ``parts``, one per training set (a fine-tuned model keeps those of its base model), each with
``fields``, ``rows`` of their values and the number of patches, and ``patients``, a hash of the set of patients; and
``complete``, false if the base model has no record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pandas as pd

from latent_medi.metadata.schema import Schema

Record = Mapping[str, Any]
_MOST = 50_000  # combinations of a record; more would be larger than small models


def training_record(table: pd.DataFrame, schema: Schema) -> dict[str, Any]:
    """The record of a training set.

    Args:
        table: A row per training patch with ``patient`` and the schema's columns.
        schema: The record has its class and categorical fields, whether or not the model is conditioned on them.
    """
    fields = [field.name for field in schema.fields if not field.continuous and field.name in table.columns]
    counts = table[fields].astype(str).value_counts(sort=False).sort_index() if fields else pd.Series(dtype=int)
    if not fields or len(counts) > _MOST:
        return {"complete": False, "parts": []}
    rows = [[*(key if isinstance(key, tuple) else (key,)), int(n)] for key, n in counts.items()]
    return {"complete": True, "parts": [{"fields": fields, "rows": rows, "patients": patients_hash(table["patient"])}]}


def patients_hash(patients: pd.Series) -> str:
    """Hex SHA-256 of a set of patients; hashes of single patients could be guessed from their numbers."""
    return hashlib.sha256("\n".join(sorted(set(patients.astype(str)))).encode()).hexdigest()


def merge_records(*records: Record | None) -> dict[str, Any]:
    """The record of a model that was trained on the sets of several records; None stands for an unknown record."""
    parts: list[Any] = []
    for record in records:
        parts += [part for part in (record or {}).get("parts", []) if part not in parts]
    return {"complete": all(record is not None and record["complete"] for record in records), "parts": parts}


def was_trained_on(record: Record | None, combination: Mapping[str, str]) -> bool | None:
    """Whether a training patch has a combination; None if the record does not say."""
    if not record:
        return None
    sure = bool(record["complete"])
    for part in record["parts"]:
        if not set(combination) <= set(part["fields"]):
            sure = False
            continue
        where = {part["fields"].index(name): value for name, value in combination.items()}
        if any(all(row[i] == value for i, value in where.items()) for row in part["rows"]):
            return True
    return False if sure else None
