"""Names that the fields of a new dataset cannot have, because the index, a plan or a function already uses them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from latent_medi.core.errors import UserError

PLAN_COLUMNS = ("count", "verdict", "seed")
"""Columns of a plan that are not fields."""
ON_REAL = ("_quantiles", "_unknown")
"""Endings of a plan's columns that describe the real values of a continuous field."""
COUNTS = ("patches", "slides", "patients")
"""Names of the counts in an audit."""
_INDEX = ("key", "shard", "offset", "size", "origin", "patient", "slide", "x", "y", "source_mpp")
_MODEL_SETTINGS = ("adapter_scales", "adapters", "autoguidance", "classifier", "device_batch", "guidance", "model")
_SAMPLING = ("precision", "sampler", "steps")
_DATA_SETTINGS = ("codec", "columns", "config", "field", "fields", "grid", "help", "ignore", "json", "kind", "mpp")
_COMMAND = (
    "n",
    "name",
    "out",
    "patches_per_shard",
    "plan",
    "rows",
    "start",
    "stop",
    *_DATA_SETTINGS,
    *_MODEL_SETTINGS,
    *_SAMPLING,
)
RESERVED: dict[str, str] = {
    **dict.fromkeys(_COMMAND, "is a setting of `latent-medi sample` or `grid`, where --NAME VALUE gives a field"),
    "class_": "is the class field in calls of MediPipeline, whatever that field's name",
    **dict.fromkeys(PLAN_COLUMNS, "is a plan's own column"),
    **dict.fromkeys(_INDEX, "is a column of a dataset's index"),
    **dict.fromkeys(COUNTS, "is a count in an audit"),
    "file_name": "is a column of an exported metadata.csv",
    "unseen": "is a column of an evaluation's predictions.csv",
    "plan_row": "is a column of generated patches",
}
"""What uses a name, by name."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PREFIXES = {"split_": "marks splits in the index", "selected_": "marks selections in the index"}


def check_new_names(fields: Sequence[str], extra: Sequence[str] = (), continuous: Sequence[str] = ()) -> None:
    """Refuse names that fields of a new dataset cannot have. Existing datasets with such names can still be read.

    Args:
        fields: Names of the fields.
        extra: Names of further columns of the index.
        continuous: Which of the fields are continuous.

    Raises:
        UserError: A name is empty, has blanks around it, is already used, or differs from another only in case or in
            its Unicode form.
    """
    for name in (*fields, *extra):
        if not name or name != name.strip() or _CONTROL.search(name):
            raise UserError(
                f"A field cannot be called {name!r}.", "Remove control characters, and blanks around the name."
            )
        taken = RESERVED.get(name, "") if name in fields or name in (*_INDEX, "file_name") else ""
        taken = taken or next((why for prefix, why in _PREFIXES.items() if name.startswith(prefix)), "")
        for ending in ON_REAL:
            if name.removesuffix(ending) in continuous and name.endswith(ending):
                taken = f"is the name of a plan's column for the field {name.removesuffix(ending)!r}"
        if taken:
            raise UserError(f"A field cannot be called {name!r}: that {taken}.", _renamed(name))
    seen: dict[str, str] = {}
    for name in (*fields, *extra):
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"The fields {other!r} and {name!r} differ only in case or Unicode form.",
                "Rename one of them in the table.",
            )


def _renamed(name: str) -> str:
    return f"Rename the column in the table, such as to {name.rstrip('_')}_value, and in the settings."
