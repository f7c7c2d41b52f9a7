"""Which patches show the same picture: a fingerprint per patch finds candidates, their pixels decide.

The fingerprint holds a hash of the patch's brightness and amplitudes of its lowest spatial frequencies, which the eight
symmetries of the square do not change and JPEG hardly does. Patches with similar fingerprints are read, aligned in the
best of the eight views, and correlated. Several copies within one patient, such as overlapping neighbours, are no
finding; empty patches are never compared.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.core.progress import progress

BLANK = "-"
"""Fingerprint of a patch without content."""
LEAST_LIKENESS = 0.92
"""Likeness from which two patches show one picture. JPEG of quality 75 leaves 0.98 of tissue at 64 px and more at 256;
patches of other biopsies reach 0.2, and stripes that differ in noise alone 0.87."""
_RADIUS = 0.15  # JPEG of quality 75 moves a fingerprint by up to 0.07; patches of two biopsies differ by 0.26 or more
_LEAST_SPREAD = 2.0  # grey levels; what varies less, averaged over 1/32 of the edge, is empty or of one colour
_EDGE, _FINE = 32, 64  # smaller patches have too few frequencies to recognise tissue: only equal pixels count there
HASH_BYTES = 9
"""Length of the fingerprint's first part, the hash of the pixels."""
_FREQUENCIES = 7
_ROWS, _COLUMNS = 1024, 2048  # a block of comparisons stays in the processor's cache
_PAIRS = 1024

_U, _V = np.array([(u, v) for v in range(1, _FREQUENCIES) for u in range(v + 1)]).T
_WEIGHT = np.hypot(_U, _V)  # tissue has the more amplitude the lower the frequency
_SIZE = len(_U) + int((_U != _V).sum())


def fingerprint(image: np.ndarray) -> str:
    """The text that the index keeps of a patch to find copies of it.

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
    pixels = hashlib.blake2b(grey.tobytes(), digest_size=HASH_BYTES).digest()
    share = np.rint(255 * np.sqrt(_amplitudes(small))).astype(np.uint8)
    return base64.b64encode(pixels + share.tobytes()).decode("ascii")


# scipy is imported inside the two functions that need it: that takes longer than checking most datasets.


def _cosines(images: np.ndarray) -> np.ndarray:
    """Orthonormal cosine transform of images [..., S, S]."""
    from scipy.fft import dctn

    return dctn(images, norm="ortho", axes=(-2, -1))


def connected_components(one: np.ndarray, other: np.ndarray, size: int) -> np.ndarray:
    """The number of the connected component of each of ``size`` nodes; the edges join ``one[i]`` and ``other[i]``."""
    from scipy.sparse import coo_matrix, csgraph

    edges = coo_matrix((np.ones(len(one)), (one, other)), shape=(size, size))
    return csgraph.connected_components(edges, directed=False)[1]


def _amplitudes(small: np.ndarray) -> np.ndarray:
    """Numbers ≥ 0 of square pictures [..., S, S] that no symmetry of the square changes, of length 1, [..., 48].

    A mirror changes signs of the cosine transform, a turn also swaps its axes.
    """
    size = np.abs(_cosines(small))
    one, other = size[..., _U, _V] * _WEIGHT, size[..., _V, _U] * _WEIGHT
    both = np.concatenate([np.maximum(one, other), np.minimum(one, other)[..., _U != _V]], axis=-1)
    return both / np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-12)


def _decoded(prints: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash, bytes [N], and amplitudes of length 1, float32 [N, 48], of fingerprints that are not blank."""
    raw = np.frombuffer(base64.b64decode("".join(prints)), np.uint8).reshape(len(prints), HASH_BYTES + _SIZE)
    shares = (raw[:, HASH_BYTES:].astype(np.float32) / 255) ** 2
    shares /= np.maximum(np.linalg.norm(shares, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(raw[:, :HASH_BYTES]).view(f"V{HASH_BYTES}")[:, 0], shares


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """How similar two patches are as pictures, whatever their brightness, in the best of the eight symmetries.

    The correlation of the signed square roots of their spatial frequencies' amplitudes: many weak frequencies count as
    much as the few strong ones that are alike in all stripes or edges.

    Args:
        one, other: uint8 [H, W, 3], square, of one size.

    Returns:
        -1 to 1; 0 if either is of one colour.
    """
    return _correlation(_spectrum(one), _spectrum(other))


def _spectrum(image: np.ndarray) -> np.ndarray:
    """float32 [S, S] of length 1, or 0 throughout; S is 32, or half the edge of a patch below 64 px."""
    edge = min(_FINE, len(image))
    grey = Image.fromarray(image).convert("L").convert("F").resize((edge, edge), Image.Resampling.BOX)
    # JPEG removes the upper half of the frequencies; the lowest ones are uneven light and edges of tissue.
    size = _cosines(np.asarray(grey))[: edge // 2, : edge // 2]
    size[:2, :2] = 0
    roots = np.sign(size) * np.sqrt(np.abs(size))
    length = float(np.linalg.norm(roots))
    return roots / length if length > 0 else roots


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The largest over the symmetries: a mirror changes the sign of every second frequency, a turn also swaps axes."""
    mirror = (-1.0) ** np.arange(len(one))
    both = mirror[:, None] * mirror
    signs = (1.0, mirror, mirror[:, None], both)
    return max(float((view * sign * other).sum()) for view in (one, one.T) for sign in signs)


def close_pairs(shares: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Pairs of two patients' fingerprints that may be of one picture, int64 [P, 2], the first number the smaller.

    Every fingerprint is compared with every other: in 48 dimensions no tree is faster. The order along the direction of
    the largest spread leaves half of them out.

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
        for start in progress(starts, len(order), "comparing patches", "patches", _ROWS):
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
    """The number of the picture that each patch shares with a patch of another patient.

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
    # Patches with equal pixels need not be compared, and one of them stands for all.
    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    several = np.zeros(len(first), bool)
    several[same[owner != owner[first[same]]]] = True
    pairs = close_pairs(shares[first], np.where(several, -1, owner[first]))
    starts = range(0, len(pairs), _PAIRS)
    blocks = progress(starts, len(pairs), "comparing pixels of pairs", "pairs", _PAIRS)
    alike = [pair for start in blocks for pair in _confirmed(pairs[start : start + _PAIRS], known[first], read)]
    links = np.array(alike, np.int64).reshape(-1, 2)
    picture = connected_components(links[:, 0], links[:, 1], len(first))[same]
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
    return [(a, b) for a, b in pairs.tolist() if _correlation(spectra[a], spectra[b]) >= LEAST_LIKENESS]
