"""Pictures that occur under several patients: recorded in the index, and kept within one part of every split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.shards.checking.likeness import BLANK, HASH_BYTES, connected_components, fingerprint, shared_pictures
from latent_medi.shards.format.layout import FINGERPRINT, PICTURE, SPLIT_PREFIX

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

EVERYBODY = "*"
"""In ``allow_duplicates``: every patient."""

SPLIT_REMEDY = (
    "Keep the patients in one part (`latent-medi split` does; replace=true replaces a split), or name them: "
    "allow_duplicates='[PATIENT]', or '[\"*\"]' for all."
)
"""What to do about a picture in several parts of a split."""

_EXAMPLES, _KEYS = 20, 8
_EXAMPLES_SHOWN = 5


def find_duplicates(dataset: PatchDataset, workers: int = 2) -> None:
    """Add the columns of fingerprints and shared pictures to an opened dataset, and ``duplicates`` to its information.

    Only in memory: whoever writes the folder writes them. A dataset that has them, or has no real patch, stays as it
    is. A folder that an earlier version wrote has no fingerprints: all its patches are read for them.

    Args:
        dataset: The dataset.
        workers: Threads that decode patches.
    """
    real = (dataset.index["origin"] == "real").to_numpy()
    if "duplicates" in dataset.info or not real.any():
        return
    index = dataset.index
    prints = np.array(index[FINGERPRINT] if FINGERPRINT in index else np.full(len(index), ""), dtype=object)
    if len(todo := np.flatnonzero(real & (prints == ""))):
        batches = dataset.iterate(todo, 256, workers)
        for rows, images in progress(batches, len(todo), "looking for duplicates", "patches", 256):
            prints[rows] = [fingerprint(image) for image in images]
    picture = shared_pictures(prints.tolist(), index["patient"].tolist(), lambda rows: dataset.read(rows, workers))
    dataset.index = index.assign(**{FINGERPRINT: prints.astype(str), PICTURE: picture})
    dataset.info = {**dataset.info, "duplicates": _record(dataset)}


def _record(dataset: PatchDataset) -> dict[str, Any]:
    """The entry ``duplicates`` of ``dataset.json``."""
    index, known = dataset.index, dataset.schema.class_field
    rows = index[index[PICTURE] >= 0]
    groups = rows.groupby(PICTURE, sort=True)
    seen = index[index[FINGERPRINT].str.len() > len(BLANK)]
    pixels = seen[FINGERPRINT].str[: 4 * HASH_BYTES // 3]
    by_class = rows[known.name].value_counts() if known is not None else {}
    return {
        "pictures": groups.ngroups,
        "patches": len(rows),
        "patients": int(rows["patient"].nunique()),
        "same_pixels": int((pixels[rows.index].groupby(rows[PICTURE]).nunique() == 1).sum()),
        "several_classes": int((groups[known.name].nunique() > 1).sum()) if known is not None else 0,
        "by_class": {str(name): int(count) for name, count in sorted(by_class.items())},
        "within_patients": int(pd.DataFrame({"p": seen["patient"], "h": pixels}).duplicated().sum()),
        "empty": int((index[FINGERPRINT] == BLANK).sum()),
        "examples": [
            {"patches": group["key"].tolist()[:_KEYS], "patients": sorted(set(group["patient"]))[:_KEYS]}
            for _, group in list(groups)[:_EXAMPLES]
        ],
    }


def patients_together(index: pd.DataFrame, allow: Sequence[str] = ()) -> list[list[str]]:
    """Groups of patients who share a picture, directly or through others; sorted.

    Args:
        index: An index; without the column of pictures there is no group.
        allow: Patients whose shared pictures do not count; ``"*"`` for everybody's.
    """
    rows = _counted(index, allow)
    if not len(rows):
        return []
    patients, names = pd.factorize(rows["patient"], sort=True)
    pictures, _ = pd.factorize(rows[PICTURE])
    member = connected_components(patients, len(names) + pictures, len(names) + pictures.max() + 1)[: len(names)]
    return [list(map(str, names[member == group])) for group in pd.unique(member)]


def joined_patients(index: pd.DataFrame) -> np.ndarray:
    """The patient of each row, those who share a picture under one name, [N]."""
    first = {patient: group[0] for group in patients_together(index) for patient in group}
    if not first:
        return index["patient"].to_numpy()
    return index["patient"].map(lambda patient: first.get(patient, patient)).to_numpy(dtype=object)


def _counted(index: pd.DataFrame, allow: Sequence[str]) -> pd.DataFrame:
    """Rows of shared pictures, without the pictures of patients who are allowed to share."""
    if PICTURE not in index or EVERYBODY in allow:
        return index.iloc[:0].assign(**{PICTURE: np.zeros(0, np.int64)})
    rows = index[index[PICTURE] >= 0]
    return rows[~rows[PICTURE].isin(rows.loc[rows["patient"].isin(list(allow)), PICTURE])]


def allowed(patients: Sequence[str]) -> dict[str, list[str]]:
    """The entry of a split's recipe for patients whose pictures may be in several parts; empty if there are none."""
    return {"allow_duplicates": list(patients)} if patients else {}


def pictures_in_several_parts(index: pd.DataFrame, column: pd.Series, allow: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of pictures that are in more than one part of a split, with the part as ``part``."""
    rows = _counted(index, allow)
    rows = rows.assign(part=column.loc[rows.index])
    rows = rows[rows["part"] != ""]
    return rows[rows.groupby(PICTURE)["part"].transform("nunique") > 1]


def check_pictures(index: pd.DataFrame, column: pd.Series, name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse a split with one picture in several parts, unless its recipe allows it (``allow_duplicates``).

    Raises:
        UserError: Names the split and the first such picture.
    """
    rows = pictures_in_several_parts(index, column, recipe.get("allow_duplicates", ()))
    if not len(rows):
        return
    first = rows[rows[PICTURE] == rows[PICTURE].iloc[0]].drop_duplicates("part")
    named = " and ".join(f"{k!r} of {p!r} ({part})" for k, p, part in first[["key", "patient", "part"]].to_numpy()[:2])
    raise UserError(
        f"Split {name!r} has the same picture in several parts, under different patients: {named} "
        f"({rows[PICTURE].nunique()} such pictures).",
        SPLIT_REMEDY,
    )


def duplicates_report(dataset: PatchDataset) -> dict[str, Any]:
    """The entry ``duplicates`` of a dataset, ``{}`` if it has none, with the patches of each split added.

    ``splits`` holds by split ``parts``, the patches that show a shared picture by part, and ``several_parts``, the
    number of pictures that are in more than one part.
    """
    if "duplicates" not in dataset.info:
        return {}
    index, splits = dataset.index, {}
    rows = index[index[PICTURE] >= 0]
    for name in dataset.splits:
        column = index[SPLIT_PREFIX + name]
        parts = column.loc[rows.index].value_counts()
        splits[name] = {
            "parts": {str(part): int(count) for part, count in sorted(parts.items()) if part},
            "several_parts": int(pictures_in_several_parts(index, column)[PICTURE].nunique()),
        }
    return {**dataset.info["duplicates"], "splits": splits}


def duplicates_text(report: Mapping[str, Any]) -> str:
    """The report in lines for people; ``""`` if there are no duplicates."""
    lines = []
    if report.get("pictures"):
        classes = ", ".join(f"{name} {count}" for name, count in report["by_class"].items())
        lines.append(
            f"pictures under several patients: {report['pictures']} ({counted(report['patches'], 'patch')} of "
            f"{counted(report['patients'], 'patient')}; {report['same_pixels']} with equal pixels, the others turned, "
            "mirrored or encoded again)" + (f"; patches by class: {classes}" if classes else "")
        )
        lines += [f"  {' = '.join(group['patches'])}" for group in report["examples"][:_EXAMPLES_SHOWN]]
        if report["pictures"] > _EXAMPLES_SHOWN:
            lines.append(f"  … and {report['pictures'] - _EXAMPLES_SHOWN} more")
        if report["several_classes"]:
            lines.append(f"  under several classes: {report['several_classes']}")
        for name, split in report.get("splits", {}).items():
            parts = ", ".join(f"{part} {count}" for part, count in split["parts"].items()) or "none"
            lines.append(f"  patches in split {name}: {parts}; pictures in several parts: {split['several_parts']}")
    if report.get("within_patients"):
        lines.append(f"patches with the pixels of another patch of the same patient: {report['within_patients']}")
    return "\n".join(lines)
