"""The same picture under two patients: found by what is kept of each patch, then looked at pixel by pixel.

Of every real patch the index keeps a fingerprint: a hash of its pixels' brightness, and amplitudes of its lowest
spatial frequencies, which none of the eight symmetries of the square changes, and JPEG hardly. Patches that are close
in these are read, laid on each other in the best of the eight views, and correlated. The index then tells in a second
column which patches show one picture. What one patient has several times, such as overlapping neighbours, is no
finding, and empty patches are nobody's copies.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.shards.layout import FINGERPRINT, PICTURE, SPLIT_PREFIX

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

EVERYBODY = "*"
"""In ``allow_duplicates``: whoever shares a picture."""

SIDES = (
    "Keep the patients in one part (`latent-medi split` does, with replace=true in place of a split that is there), or "
    "name them: allow_duplicates='[PATIENT]', or '[\"*\"]' for all."
)
"""What to do about a picture on two sides of a split."""

BLANK = "-"
LEAST_LIKENESS = 0.92
"""Likeness from which two patches show one picture. JPEG of quality 75 leaves 0.98 of tissue at 64 px and more at 256;
patches of other biopsies reach 0.2, and stripes that differ in noise alone 0.87."""
_RADIUS = 0.15  # JPEG of quality 75 moves a fingerprint by up to 0.07; patches of two biopsies lie 0.26 apart or more
_LEAST_SPREAD = 2.0  # grey levels; what varies less, averaged over 1/32 of the edge, is empty or of one colour
_EDGE, _FINE = 32, 64  # smaller patches have too few frequencies to tell tissue by: there equal pixels alone count
_HASH, _FREQUENCIES = 9, 7
_ROWS, _COLUMNS = 1024, 2048  # a block of comparisons stays in the processor's cache
_PAIRS = 1024
_EXAMPLES, _KEYS = 20, 8

_U, _V = np.array([(u, v) for v in range(1, _FREQUENCIES) for u in range(v + 1)]).T
_WEIGHT = np.hypot(_U, _V)  # tissue has the more amplitude the lower the frequency
_SIZE = len(_U) + int((_U != _V).sum())


def fingerprint(image: np.ndarray) -> str:
    """What is kept of a patch to find its copies.

    Args:
        image: uint8 [H, W, 3], square.

    Returns:
        76 characters of base64: 72 bits of BLAKE2 over the brightness of its pixels, and 48 numbers of a byte, each the
        square root of a share of the amplitudes up to 6 half periods per edge, largest and least of each frequency and
        its transpose.
        Or ``"-"`` for a patch without content.
    """
    grey = Image.fromarray(image).convert("L")
    small = np.asarray(grey.convert("F").resize((_EDGE, _EDGE), Image.Resampling.BOX))
    if float(small.std()) < _LEAST_SPREAD:
        return BLANK
    pixels = hashlib.blake2b(grey.tobytes(), digest_size=_HASH).digest()
    share = np.rint(255 * np.sqrt(_amplitudes(small))).astype(np.uint8)
    return base64.b64encode(pixels + share.tobytes()).decode("ascii")


# Importing scipy takes longer than checking many a dataset, which seldom needs it: both functions import it themselves.


def _cosines(images: np.ndarray) -> np.ndarray:
    """Orthonormal cosine transform of images [..., S, S]."""
    from scipy.fft import dctn

    return dctn(images, norm="ortho", axes=(-2, -1))


def _connected(one: np.ndarray, other: np.ndarray, size: int) -> np.ndarray:
    """Number of the connected component of each of ``size`` nodes; the edges are the pairs of ``one`` and ``other``."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_matrix((np.ones(len(one)), (one, other)), shape=(size, size)), directed=False)[1]


def _amplitudes(small: np.ndarray) -> np.ndarray:
    """Of square pictures [..., S, S]: numbers ≥ 0 that no symmetry of the square changes, of length 1, [..., 48].

    A mirror changes signs of the cosine transform, a turn also swaps its axes.
    """
    size = np.abs(_cosines(small))
    one, other = size[..., _U, _V] * _WEIGHT, size[..., _V, _U] * _WEIGHT
    both = np.concatenate([np.maximum(one, other), np.minimum(one, other)[..., _U != _V]], axis=-1)
    return both / np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-12)


def _decoded(prints: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash, bytes [N], and amplitudes of length 1, float32 [N, 48], of fingerprints that are not blank."""
    raw = np.frombuffer(base64.b64decode("".join(prints)), np.uint8).reshape(len(prints), _HASH + _SIZE)
    shares = (raw[:, _HASH:].astype(np.float32) / 255) ** 2
    shares /= np.maximum(np.linalg.norm(shares, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(raw[:, :_HASH]).view(f"V{_HASH}")[:, 0], shares


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """How much two patches are one picture, whatever its brightness, in the best of the eight symmetries of the square.

    The correlation of the roots of their spatial frequencies' amplitudes, with their signs: many weak frequencies count
    as much as the few strong ones that are alike in all stripes or edges.

    Args:
        one, other: uint8 [H, W, 3], square, of one size.

    Returns:
        -1 to 1; 0 if either is of one colour.
    """
    return _likeness(_spectrum(one), _spectrum(other))


def _spectrum(image: np.ndarray) -> np.ndarray:
    """float32 [S, S] of length 1, or 0 throughout; S is 32, or half the edge of a patch below 64 px."""
    edge = min(_FINE, len(image))
    grey = Image.fromarray(image).convert("L").convert("F").resize((edge, edge), Image.Resampling.BOX)
    # The upper half of the frequencies is what JPEG takes out; the lowest ones are uneven light and edges of tissue.
    size = _cosines(np.asarray(grey))[: edge // 2, : edge // 2]
    size[:2, :2] = 0
    roots = np.sign(size) * np.sqrt(np.abs(size))
    length = float(np.linalg.norm(roots))
    return roots / length if length > 0 else roots


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """A mirror changes the sign of every second frequency along its axis, and a turn by 90° also swaps both axes."""
    mirror = (-1.0) ** np.arange(len(one))
    both = mirror[:, None] * mirror
    signs = (1.0, mirror, mirror[:, None], both)
    return max(float((view * sign * other).sum()) for view in (one, one.T) for sign in signs)


def close_pairs(shares: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Pairs of two patients' fingerprints that may be of one picture, int64 [P, 2], the first number the smaller.

    All are compared with all: in 48 dimensions no tree is faster. The order along the direction of the largest
    spread leaves half of them out.

    Args:
        shares: Amplitudes of length 1, float32 [N, 48].
        patients: A number per row; -1 differs from all, itself too.
    """
    found = [np.zeros((0, 2), np.int64)]
    if len(shares) > 1:
        _, axes = np.linalg.eigh(np.cov(shares, rowvar=False))
        place = shares @ axes[:, -1].astype(np.float32)
        order = np.argsort(place, kind="stable")
        place, sorted_shares, owner = place[order], np.ascontiguousarray(shares[order]), patients[order]
        least = np.float32(1 - _RADIUS**2 / 2)
        starts = range(0, len(order), _ROWS)
        for start in progress(starts, desc="comparing patches", unit="block") if len(starts) > 32 else starts:
            mine = sorted_shares[start : start + _ROWS]
            end = int(np.searchsorted(place, place[min(start + _ROWS, len(place)) - 1] + _RADIUS, side="right"))
            for left in range(start, end, _COLUMNS):
                close = mine @ sorted_shares[left : min(left + _COLUMNS, end)].T
                if left >= start + _ROWS and close.max() < least:
                    continue
                a, b = np.nonzero(close >= least)
                a, b = a + start, b + left
                keep = (a < b) & ((owner[a] != owner[b]) | (owner[a] < 0))
                found.append(order[np.stack([a[keep], b[keep]], axis=1)])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def shared_pictures(
    prints: Sequence[str], patients: Sequence[str], read: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Which patches show a picture that lies under several patients.

    Args:
        prints: :func:`fingerprint` of each patch; ``""`` and ``"-"`` take no part.
        patients: Patient of each patch.
        read: Patches by their places in ``prints``, uint8 [n, H, W, 3].

    Returns:
        int64 [N]: the picture's number, counted from 0 in the order of the first patch; -1 for no finding.
    """
    result = np.full(len(prints), -1, np.int64)
    known = np.flatnonzero([len(text) > len(BLANK) for text in prints])
    if not len(known):
        return result
    hashes, shares = _decoded([prints[i] for i in known.tolist()])
    _, owner = np.unique(np.asarray(patients, dtype=str)[known], return_inverse=True)
    # The same pixels need no second look, and one of them stands for all.
    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    several = np.zeros(len(first), bool)
    several[same[owner != owner[first[same]]]] = True
    pairs = close_pairs(shares[first], np.where(several, -1, owner[first]))
    alike = [
        pair
        for start in (progress(range(0, len(pairs), _PAIRS), desc="looking at pairs", unit="block")
                      if len(pairs) > 8 * _PAIRS else range(0, len(pairs), _PAIRS))
        for pair in _confirmed(pairs[start : start + _PAIRS], known[first], read)
    ]  # fmt: skip
    links = np.array(alike, np.int64).reshape(-1, 2)
    picture = _connected(links[:, 0], links[:, 1], len(first))[same]
    table = pd.DataFrame({"picture": picture, "owner": owner})
    shared = (table.groupby("picture")["owner"].transform("nunique") > 1).to_numpy()
    result[known[shared]] = pd.factorize(picture[shared])[0]
    return result


def _confirmed(pairs: np.ndarray, place: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> list[tuple[int, int]]:
    """Those of some pairs that show one picture."""
    if not len(pairs):
        return []
    members = np.unique(pairs)
    images = read(place[members])
    if images.shape[1] < _EDGE:
        return []
    spectra = {int(m): _spectrum(image) for m, image in zip(members, images, strict=True)}
    return [(a, b) for a, b in pairs.tolist() if _likeness(spectra[a], spectra[b]) >= LEAST_LIKENESS]


def look(dataset: PatchDataset, workers: int = 2) -> None:
    """Give an opened dataset the two columns of this module and the entry ``duplicates`` of its information, unless it
    has them or holds no real patch. In memory: whoever writes the folder writes them.

    A folder that an earlier version wrote has no fingerprints: all its patches are read for them.
    """
    real = (dataset.index["origin"] == "real").to_numpy()
    if "duplicates" in dataset.info or not real.any():
        return
    index = dataset.index
    prints = np.array(index[FINGERPRINT] if FINGERPRINT in index else np.full(len(index), ""), dtype=object)
    if len(todo := np.flatnonzero(real & (prints == ""))):
        batches = dataset.iterate(todo, 256, workers)
        for rows, images in progress(batches, -(-len(todo) // 256), "looking for duplicates", "batch"):
            prints[rows] = [fingerprint(image) for image in images]
    picture = shared_pictures(prints.tolist(), index["patient"].tolist(), lambda rows: dataset.read(rows, workers))
    dataset.index = index.assign(**{FINGERPRINT: prints.astype(str), PICTURE: picture})
    dataset.info = {**dataset.info, "duplicates": _record(dataset)}


def _record(dataset: PatchDataset) -> dict[str, Any]:
    """What ``dataset.json`` tells of duplicates."""
    index, known = dataset.index, dataset.schema.class_field
    rows = index[index[PICTURE] >= 0]
    groups = rows.groupby(PICTURE, sort=True)
    seen = index[index[FINGERPRINT].str.len() > len(BLANK)]
    pixels = seen[FINGERPRINT].str[: 4 * _HASH // 3]
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
        index: An index with the column of pictures, or without: then there is no group.
        allow: Patients whose shared pictures do not count; ``"*"`` for everybody's.
    """
    rows = _counted(index, allow)
    if not len(rows):
        return []
    patients, names = pd.factorize(rows["patient"], sort=True)
    pictures, _ = pd.factorize(rows[PICTURE])
    member = _connected(patients, len(names) + pictures, len(names) + pictures.max() + 1)[: len(names)]
    return [list(map(str, names[member == group])) for group in pd.unique(member)]


def joined_patients(index: pd.DataFrame) -> np.ndarray:
    """The patient of each row, those who share a picture under one name, [N]."""
    first = {patient: group[0] for group in patients_together(index) for patient in group}
    if not first:
        return index["patient"].to_numpy()
    return index["patient"].map(lambda patient: first.get(patient, patient)).to_numpy(dtype=object)


def _counted(index: pd.DataFrame, allow: Sequence[str]) -> pd.DataFrame:
    """Rows of shared pictures, without those of which a patient is allowed."""
    if PICTURE not in index or EVERYBODY in allow:
        return index.iloc[:0].assign(**{PICTURE: np.zeros(0, np.int64)})
    rows = index[index[PICTURE] >= 0]
    return rows[~rows[PICTURE].isin(rows.loc[rows["patient"].isin(list(allow)), PICTURE])]


def allowed(patients: Sequence[str]) -> dict[str, list[str]]:
    """What a split's recipe says of patients whose pictures may lie in several parts; nothing if there are none."""
    return {"allow_duplicates": list(patients)} if patients else {}


def on_several_sides(index: pd.DataFrame, column: pd.Series, allow: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of pictures that lie in more than one part of a split, with the part as ``part``; none if all is well."""
    rows = _counted(index, allow)
    rows = rows.assign(part=column.loc[rows.index])
    rows = rows[rows["part"] != ""]
    return rows[rows.groupby(PICTURE)["part"].transform("nunique") > 1]


def check_sides(index: pd.DataFrame, column: pd.Series, name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse a split that has one picture on two sides, unless its recipe allows it (``allow_duplicates``).

    Raises:
        UserError: Names the split and the first such picture.
    """
    rows = on_several_sides(index, column, recipe.get("allow_duplicates", ()))
    if not len(rows):
        return
    first = rows[rows[PICTURE] == rows[PICTURE].iloc[0]].drop_duplicates("part")
    named = " and ".join(f"{k!r} of {p!r} ({part})" for k, p, part in first[["key", "patient", "part"]].to_numpy()[:2])
    raise UserError(
        f"Split {name!r} has the same picture in several parts, under different patients: {named} "
        f"({rows[PICTURE].nunique()} such pictures).",
        SIDES,
    )


def report(dataset: PatchDataset) -> dict[str, Any]:
    """The record of a dataset, or ``{}`` if none was looked for, with ``splits``: per split the patches that show a
    shared picture by part, and ``several_parts``, the number of pictures that lie in more than one.
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
            "several_parts": int(on_several_sides(index, column)[PICTURE].nunique()),
        }
    return {**dataset.info["duplicates"], "splits": splits}


def duplicates_text(told: Mapping[str, Any], most: int = 5) -> str:
    """The report in words; ``""`` if there is nothing to tell."""
    lines = []
    if told.get("pictures"):
        classes = ", ".join(f"{name} {count}" for name, count in told["by_class"].items())
        lines.append(
            f"pictures that lie under several patients: {told['pictures']} ({told['patches']} patches of "
            f"{told['patients']} patients; {told['same_pixels']} with the same pixels, the others turned, mirrored or "
            "encoded again)" + (f"; patches by class: {classes}" if classes else "")
        )
        lines += [f"  {' = '.join(group['patches'])}" for group in told["examples"][:most]]
        if told["pictures"] > most:
            lines.append(f"  … and {told['pictures'] - most} more")
        if told["several_classes"]:
            lines.append(f"  under several classes: {told['several_classes']}")
        for name, split in told.get("splits", {}).items():
            parts = ", ".join(f"{part} {count}" for part, count in split["parts"].items()) or "none"
            across = split["several_parts"]
            lines.append(f"  patches in split {name}: {parts}; pictures in several parts: {across}")
    if told.get("within_patients"):
        lines.append(f"patches with the pixels of another patch of their own patient: {told['within_patients']}")
    return "\n".join(lines)
