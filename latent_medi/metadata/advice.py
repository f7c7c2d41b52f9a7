"""What to do about what an audit has found, in sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_STRONG = 0.8  # Cramér's V from which a site nearly tells the class
_MUCH_MISSING = 0.2  # share of unknown values that is worth a word
_SITE_CODE = re.compile("[A-Z0-9]{2}")


def advice(result: Mapping[str, Any], class_field: str) -> list[str]:
    """What to do about it, most pressing first.

    Args:
        result: What :func:`latent_medi.metadata.audit.audit` has found.
        class_field: The class field; ``""`` if there is none.

    Returns:
        Sentences.
    """
    site_field, groups = result["site_field"], result["groups"]
    lines = _questions(result)
    if (shared := result["shared_patients"])["count"]:
        first = shared["examples"][0]
        lines.append(
            f"Patients with patches at several {site_field}s: {shared['count']}, such as {first['patient']!r} at "
            f"{some(first['sites'], 4)}. If they are different people, as where hospitals number their patients alike, "
            f"write the {site_field} before the patient in the table ({first['sites'][0]}-{first['patient']}) and make "
            "the dataset again: until then they are counted, and held out, as one."
        )
    if len(groups) > 1:
        codes = [site for group in groups for site in group["sites"]]
        if all(_SITE_CODE.fullmatch(site) for site in codes):
            lines.append(
                f"{site_field} looks like TCGA's codes, which stand for (hospital, study) pairs: map them to "
                "institutions with tss_table=… (GDC's table of tissue source sites), and audit again."
            )
        else:
            lines.append(
                f"Add patients of a second {class_field} at some {site_field} of each group, merge {site_field}s that "
                "are one hospital, or study the groups apart: no model can tell their effects apart."
            )
    strong = result["cramers_v"].get(site_field)
    if strong is not None and strong >= _STRONG:
        lines.append(
            f"{site_field} nearly tells the {class_field} (Cramér's V {strong:.2f}): a classifier can learn the "
            f"{site_field} instead. Test at held-out {site_field}s or combinations."
        )
    for name, share in result["missing"].items():
        if share >= _MUCH_MISSING:
            lines.append(f"{name} is unknown for {share:.0%} of the patches: ask for it, or leave the field out.")
    counts = result["verdict_counts"]
    if counts["thin"]:
        lines.append(
            f"{counts['thin']} combinations rest on fewer than {result['thin_patients']} patients: collect more, merge "
            "rare values, or plan them with that in mind."
        )
    if counts["both margins seen"]:
        lines.append(
            f"{counts['both margins seen']} combinations have no patch and can be drawn: `latent-medi plan "
            "goal=fill_unseen`."
        )
    return lines


def _questions(result: Mapping[str, Any]) -> list[str]:
    """What looks like one value spelled twice, and like a word for missing."""
    lines = []
    for name, groups in result["spelled_alike"].items():
        told = [" / ".join(f"{value!r} ({count})" for value, count in group.items()) for group in groups]
        lines.append(
            f"Is that one {name}, spelled in several ways? {some(told, 6)}. If so, write it in one way in the table: "
            "now each spelling counts by itself."
        )
    for name, words in result["looks_missing"].items():
        told = [f"{value!r} ({count})" for value, count in words.items()]
        remedy = "give each row its patient" if name == "patient" else "write unknown, or leave the cell empty"
        lines.append(f"Does that mean missing in {name}? {some(told, 8)}. If so, {remedy}: now each is a {name}.")
    return lines


def some(words: Sequence[str], most: int = 12) -> str:
    """The first words, and how many there are if that is not all."""
    return ", ".join(words[:most]) + (f" … ({len(words)} in all)" if len(words) > most else "")
