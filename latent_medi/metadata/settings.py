"""Settings of the audit and of splits."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AuditSettings:
    """What to look for in a dataset.

    Args:
        data: Dataset folder.
        split: Named split to look at; empty for all rows.
        split_value: The part of that split, such as train.
        site_field: The field whose graph with the class is examined.
        thin_patients: A combination with fewer patients than this is thin.
        requested: Combinations to judge, each a value by field; none for the whole product of class and categorical
            fields.
    """

    data: str = ""
    split: str = ""
    split_value: str = "train"
    site_field: str = "site"
    thin_patients: int = 10
    requested: list[dict[str, str]] = field(default_factory=list)


@dataclass
class SplitSettings:
    """How to split patients.

    Args:
        name: Name of the split; its column is split_NAME.
        fractions: Share of patients by part; they add up to 1.
        seed: Seed.
        stratify: Fields whose combinations are spread evenly over the parts.
        hold_out: Combinations, each a value by field, whose patients all go to one part.
        hold_out_part: The part that they go to.
    """

    name: str = "main"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "test": 0.3})
    seed: int = 0
    stratify: list[str] = field(default_factory=list)
    hold_out: list[dict[str, str]] = field(default_factory=list)
    hold_out_part: str = "test"
