"""The splits that MeDi was published with, and the two simpler rules in its code. None of them is random.

Drexlin et al., MICCAI 2025, and the code and tables that its authors published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.tables import require_columns

ROW_ORDER_SCHEMES = ("medi", "every_fourth_patient")
"""Schemes in which the order of the rows decides: they need the published table."""


_CHOICES = (
    "hold_out",
    "hold_out_fields",
    "hold_out_share",
    "hold_out_part",
    "hold_out_fractions",
    "sites",
    "site_share",
)
HOLD_OUT_SETTINGS = (*_CHOICES, "thin_patients", "stratify", "fractions", "seed")
"""Settings of the scheme "hold_out" alone."""
MEDI_SETTINGS = ("medi_fields", "medi_share")
"""Settings of the scheme "medi" alone."""


def changed(settings: SplitSettings, *names: str) -> list[str]:
    """Those of some settings that do not have their default."""
    usual = SplitSettings()
    return [name for name in names if getattr(settings, name) != getattr(usual, name)]


def published_columns(settings: SplitSettings) -> list[str]:
    """Columns besides ``patient`` that a published scheme needs."""
    if settings.scheme == "every_fourth_patient":
        return []
    fields = settings.medi_fields if settings.scheme == "medi" else []
    return list(dict.fromkeys([settings.class_field, settings.site_field, *fields]))


def published_split(
    index: pd.DataFrame, settings: SplitSettings, kept: np.ndarray | None = None
) -> tuple[pd.Series, dict[str, Any]]:
    """The column of a published scheme, and its recipe; see :func:`medi_split`, :func:`every_fourth_patient` and
    :func:`every_fourth_site`.

    Args:
        index: A row per slide or patch.
        settings: The scheme and its columns; ``only`` is not used.
        kept: Rows that take part, bool [len(index)]: only their classes have to be in both parts. By default all.

    Raises:
        UserError: Settings of other schemes are given, or a class is in one part only.
    """
    scheme, class_field, site_field = settings.scheme, settings.class_field, settings.site_field
    if given := changed(settings, *HOLD_OUT_SETTINGS):
        raise UserError(f"scheme={scheme} has no {', '.join(given)}: it has only training and test, none of it random.")
    if scheme != "medi" and (given := changed(settings, *MEDI_SETTINGS)):
        raise UserError(f"scheme={scheme} has no {', '.join(given)}, which belong to scheme=medi.", "Leave them out.")
    if scheme == "every_fourth_patient":
        return every_fourth_patient(index), {"kind": "MeDi's code: every fourth, by patient"}
    fields = {"class_field": class_field, "site_field": site_field}
    if scheme == "every_fourth_site":
        column = every_fourth_site(index, class_field, site_field, kept)
        return column, {"kind": "MeDi's code: every fourth site of a class", **fields}
    column = medi_split(index, class_field, site_field, settings.medi_fields, settings.medi_share, kept)
    more = {"fields": list(settings.medi_fields), "share": settings.medi_share}
    return column, {"kind": "MeDi's complex split", **fields, **more}


def medi_split(
    index: pd.DataFrame,
    class_field: str,
    site_field: str,
    fields: Sequence[str],
    share: float = 0.7,
    kept: np.ndarray | None = None,
) -> pd.Series:
    """MeDi's published complex split: ``train`` or ``test`` for each row. It is not random.

    Within each class the combinations of the fields are taken in the order of their first row: the first ⌊share · n⌋
    are for training, the others for testing. A site that is then in both parts goes to the test part. A model therefore
    has no embedding of test sites: the split tests a classifier at new hospitals (Drexlin et al., MICCAI 2025).

    Args:
        index: A row per slide or patch, in the published order for the published split.
        class_field: Column of classes.
        site_field: Column of sites, tissue-source-site codes in the published split.
        fields: Columns whose combinations with the site are divided: gender and race in the published split.
        share: Share of combinations to train on, 0.7 in the published split.
        kept: Rows whose classes have to be in both parts, bool [len(index)]; by default all.

    Raises:
        UserError: A class of a kept row is in one part only.
    """
    require_columns(index, ["patient", class_field, site_field, *fields], "The index")
    combination = index[site_field].astype(str).str.cat([index[name].astype(str) for name in fields], sep="\x1f")
    keys = pd.DataFrame({"class": index[class_field], "key": combination}).drop_duplicates()
    trains: set[tuple[str, str]] = set()
    for name, of_class in keys.groupby("class", sort=True):
        ordered = of_class["key"].tolist()
        trains |= {(str(name), key) for key in ordered[: int(share * len(ordered) + 1e-9)]}
    train = np.fromiter(
        ((c, k) in trains for c, k in zip(index[class_field].astype(str), combination, strict=True)), bool, len(index)
    )
    train = _without_shared_sites(index[site_field].astype(str), train)
    return _with_all_classes(index, class_field, train, kept)


def every_fourth_patient(index: pd.DataFrame) -> pd.Series:
    """``test`` for the first, fifth, ninth … patient in the order of their first rows, ``train`` for the others.

    MeDi's code takes every fourth slide so. That puts slides of one patient on both sides (488 of its 7,168 patients),
    which no split does here.

    Args:
        index: A row per slide or patch with ``patient``, in the published order.
    """
    require_columns(index, ["patient"], "The index")
    number, _ = pd.factorize(index["patient"])
    return pd.Series(np.where(number % 4 == 0, "test", "train"), index=index.index, dtype=object)


def every_fourth_site(
    index: pd.DataFrame, class_field: str, site_field: str, kept: np.ndarray | None = None
) -> pd.Series:
    """``test`` for the fourth, eighth … site of each class in alphabetical order, or for the first site of a class that
    has fewer than four; ``train`` for the others. A site that is then in both parts goes to the test part.

    Args:
        index: A row per slide or patch.
        class_field: Column of classes.
        site_field: Column of sites, tissue-source-site codes in MeDi's code.
        kept: Rows whose classes have to be in both parts, bool [len(index)]; by default all.

    Raises:
        UserError: A class of a kept row is in one part only.
    """
    require_columns(index, ["patient", class_field, site_field], "The index")
    sites = index[site_field].astype(str)
    tests: set[tuple[str, str]] = set()
    for name, of_class in sites.groupby(index[class_field].astype(str), sort=True):
        ordered = sorted(of_class.unique(), key=lambda site: (site.lower(), site))
        tests |= {(str(name), site) for site in (ordered[3::4] if len(ordered) > 3 else ordered[:1])}
    pairs = zip(index[class_field].astype(str), sites, strict=True)
    train = np.fromiter((pair not in tests for pair in pairs), bool, len(index))
    return _with_all_classes(index, class_field, _without_shared_sites(sites, train), kept)


def _without_shared_sites(sites: pd.Series, train: np.ndarray) -> np.ndarray:
    """The training rows without those of sites that also have test rows."""
    both = set(sites[train]) & set(sites[~train])
    return train & ~sites.isin(both).to_numpy()


def _with_all_classes(index: pd.DataFrame, class_field: str, train: np.ndarray, kept: np.ndarray | None) -> pd.Series:
    """The split with these training rows, after a check that each class of the kept rows is in both parts of them."""
    takes_part = np.ones(len(index), bool) if kept is None else kept
    classes = set(index.loc[takes_part, class_field])
    for part, rows in (("train", train), ("test", ~train)):
        if lost := sorted(classes - set(index.loc[rows & takes_part, class_field])):
            raise UserError(
                f"MeDi's split has no {part} rows of {lost[:5]} ({len(lost)} of {len(classes)} classes).",
                "It needs several sites per class; hold out combinations or sites instead.",
            )
    return pd.Series(np.where(train, "train", "test"), index=index.index, dtype=object)
