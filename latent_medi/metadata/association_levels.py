"""Training sets of one size in which the association of class and site increases, for the shift benchmark.

Some combinations of class and site are the targets. At level 0 training has as many patients of a target as of any
other combination of its class, at level 1 none. Each class keeps its number of patients, so that neither size nor class
balance explains what a model loses (after the design of PathoROB's accuracy drop, Kömen et al. 2025, with combinations
that can be withheld while class and site stay seen).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.association import cramers_v
from latent_medi.metadata.estimability import component_of
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.splits import random_key


def rotating_targets(
    table: pd.DataFrame, class_field: str, site_field: str, rotation: int = 0, per_site: int = 1
) -> list[dict[str, str]]:
    """Combinations to withhold: ``per_site`` classes of each site, whose effects the other combinations still identify.

    Site j lacks the classes j + rotation, j + rotation + 1, … (in order of names, modulo their number), if it has
    patients of them and the remaining combinations still link class and site. With three or more classes, one lacking
    per site and every combination seen, each combination is a target in one of as many rotations as there are classes.
    With two classes some site always keeps both.

    Args:
        table: A row per patient or patch with both columns.
        class_field, site_field: Names of the columns.
        rotation: Number of the rotation, 0 and up.
        per_site: Number of classes that each site lacks, fewer than all.

    Raises:
        UserError: A site would have nothing left, or no combination can be withheld.
    """
    known = table[[class_field, site_field]].drop_duplicates().astype(str)
    pairs = {
        (c, s) for c, s in zip(known[class_field], known[site_field], strict=True) if not is_missing(c) | is_missing(s)
    }
    classes, sites = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    if per_site >= len(classes):
        raise UserError(
            f"With {per_site} of {len(classes)} classes withheld per site, no site would be seen.",
            "Withhold fewer classes per site, or name the combinations.",
        )
    targets: list[tuple[str, str]] = []
    for turn in range(per_site):
        for number, site in enumerate(sites):
            target = (classes[(number + rotation + turn) % len(classes)], site)
            of = component_of(pairs - {*targets, target})
            # A value in no component would not be seen at all.
            if target in pairs and of.get((0, target[0]), -1) == of.get((1, site), -2):
                targets.append(target)
    if not targets:
        raise UserError(
            f"No combination of {class_field} and {site_field} can be withheld: its effects would not be identifiable "
            f"from the other {len(pairs) - 1} (rotation {rotation}).",
            "Use another rotation, or name the combinations.",
        )
    return [{class_field: c, site_field: s} for c, s in targets]


def patients_by_level(
    table: pd.DataFrame,
    class_field: str,
    site_field: str,
    targets: Sequence[dict[str, str]],
    levels: Sequence[float],
    seed: int = 0,
) -> list[set[str]]:
    """The patients to train on at each level.

    Within a class, a target's share of the patients is (1 − level) times that of another combination. The number of
    patients of each class is the largest that all levels can have. The patients of a combination at one level are
    included at every level that has more of them, so that levels differ by as few patients as possible.

    Args:
        table: A row per patch or patient with ``patient`` and both columns; one class and site per patient.
        class_field, site_field: Names of the columns.
        targets: Combinations whose share falls.
        levels: Association levels, from 0 (none) to 1 (targets absent).
        seed: Seed of the order in which patients are chosen.

    Returns:
        A set of patients for each level.

    Raises:
        UserError: A level outside 0 to 1, a target that no patient has, or a patient with two classes or sites.
    """
    for level in levels:
        if not 0 <= level <= 1:
            raise UserError(f"An association level is from 0 (none) to 1 (targets absent), not {level}.")
    people = table[["patient", class_field, site_field]].astype(str).drop_duplicates()
    people = people[~people[class_field].map(is_missing) & ~people[site_field].map(is_missing)]
    if twice := sorted(people["patient"][people["patient"].duplicated()])[:1]:
        raise UserError(
            f"Patient {twice[0]!r} has two classes or sites, and cannot be counted in one combination.",
            "Choose a class field that belongs to the patient, or leave these patients out of the split.",
        )
    cells = {
        key: sorted(rows["patient"], key=lambda name: random_key(seed, name))
        for key, rows in people.groupby([class_field, site_field], sort=True)
    }
    withheld = {(target[class_field], target[site_field]) for target in targets}
    if unknown := sorted(withheld - set(cells)):
        raise UserError(f"No patient has the target {' × '.join(unknown[0])}.", "Name combinations that occur.")
    chosen: list[set[str]] = [set() for _ in levels]
    for name in sorted({key[0] for key in cells}):
        mine = {key: found for key, found in cells.items() if key[0] == name}
        weights = [{key: (1.0 - level) if key in withheld else 1.0 for key in mine} for level in levels]
        if any(sum(weight.values()) <= 0 for weight in weights):
            raise UserError(f"Every site of {name!r} is a target: at level 1 it would have no patient.")
        size = min(_largest(mine, weight) for weight in weights)
        for patients, weight in zip(chosen, weights, strict=True):
            for key, count in _apportion(size, weight).items():
                patients.update(mine[key][: min(count, len(mine[key]))])
    return chosen


def association(table: pd.DataFrame, class_field: str, site_field: str) -> float:
    """Bias-corrected Cramér's V of class and site over patients, 0 (independent) to 1 (one determines the other)."""
    return cramers_v(table, class_field, site_field) or 0.0


def _largest(cells: dict[tuple[str, str], list[str]], weight: dict[tuple[str, str], float]) -> int:
    """The largest number of patients that the combinations have in these proportions."""
    total = sum(weight.values())
    return int(min(len(found) * total / weight[key] for key, found in cells.items() if weight[key] > 0) + 1e-9)


def _apportion(size: int, weight: dict[tuple[str, str], float]) -> dict[tuple[str, str], int]:
    """``size`` divided in proportion to weights, by largest remainders; equal remainders in order of names."""
    total = sum(weight.values())
    exact = {key: size * w / total for key, w in weight.items()}
    counts = {key: int(value + 1e-9) for key, value in exact.items()}
    left = size - sum(counts.values())
    for key in sorted(exact, key=lambda k: (counts[k] - exact[k], k))[:left]:
        counts[key] += 1
    return counts
