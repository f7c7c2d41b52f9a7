"""Names that a new dataset's fields cannot have, since a plan, the index or a call would use them twice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from latent_medi.core.errors import UserError

PLAN_COLUMNS = ("count", "verdict", "seed")
"""A plan's own columns."""
ON_REAL = ("_quantiles", "_unknown")
"""Endings of a plan's columns that say what ``real`` means for a continuous field."""
COUNTS = ("patches", "slides", "patients")
"""What an audit counts, beside the fields."""
_INDEX = ("key", "shard", "offset", "size", "origin", "patient", "slide", "x", "y", "source_mpp")
_PIPELINE = (
    "self", "class_", "num_images", "steps", "sampler", "guidance", "seeds", "seed", "output_type", "batch",
)  # fmt: skip
_COMMAND = (
    "adapter_scales", "adapters", "autoguidance", "classifier", "codec", "columns", "config", "device_batch", "field",
    "fields", "grid", "help", "ignore", "json", "kind", "model", "mpp", "n", "name", "out", "patches_per_shard", "plan",
    "precision", "rows", "start", "stop",
)  # fmt: skip
RESERVED: dict[str, str] = {
    **dict.fromkeys(_COMMAND, "is a setting of `latent-medi sample` or `grid`, where --NAME VALUE gives a field"),
    **dict.fromkeys(_PIPELINE, "is an argument of MediPipeline's call, beside which fields are given"),
    **dict.fromkeys(PLAN_COLUMNS, "is a plan's own column"),
    **dict.fromkeys(_INDEX, "is a column of a dataset's index"),
    **dict.fromkeys(COUNTS, "is what an audit counts"),
    "file_name": "is a column of an exported metadata.csv",
    "unseen": "is a column of an evaluation's predictions.csv",
    "plan_row": "is a column of generated patches",
}
"""Who uses a name, by name."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PREFIXES = {"split_": "is how the index names splits", "selected_": "is how the index names selections"}


def check_new_names(fields: Sequence[str], extra: Sequence[str] = (), continuous: Sequence[str] = ()) -> None:
    """Refuse names that fields of a new dataset cannot have. Datasets that have them already still open.

    Args:
        fields: Names of the fields.
        extra: Names of further columns, which only the index holds.
        continuous: Which of the fields are continuous.

    Raises:
        UserError: A name is empty, has blanks around it, is used by something else, or differs from another only in
            case or in its Unicode form.
    """
    for name in (*fields, *extra):
        if not name or name != name.strip() or _CONTROL.search(name):
            raise UserError(
                f"A field cannot be called {name!r}.", "A name has no control character, and no blank at an end."
            )
        taken = RESERVED.get(name, "") if name in fields or name in (*_INDEX, "file_name") else ""
        taken = taken or next((why for prefix, why in _PREFIXES.items() if name.startswith(prefix)), "")
        for ending in ON_REAL:
            if name.removesuffix(ending) in continuous and name.endswith(ending):
                taken = f"is what a plan calls a column on the field {name.removesuffix(ending)!r}"
        if taken:
            raise UserError(f"A field cannot be called {name!r}: that {taken}.", _renamed(name))
    seen: dict[str, str] = {}
    for name in (*fields, *extra):
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"The fields {other!r} and {name!r} differ only in case or in how their letters are encoded.",
                "Rename one of them in the table.",
            )


def _renamed(name: str) -> str:
    return f"Rename the column in the table, such as to {name.rstrip('_')}_value, and name it so in the settings."
