"""What a translation is shown beside: stain mapping between sites, how much structure each way keeps, and the sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_medi.core.errors import needs
from latent_medi.core.files import atomic_path
from latent_medi.core.progress import get_logger
from latent_medi.features.stain import Method, StainStats, fit_stain, haematoxylin, transfer
from latent_medi.shards.dataset import PatchDataset

logger = get_logger("synthesis")

STAIN_METHODS: tuple[Method, ...] = ("reinhard", "macenko")
TITLES = {
    "original": "original",
    "round_trip": "autoencoder\nround trip",
    "no_op": "no-op: translated\nto what it is",
    "reinhard": "Reinhard",
    "macenko": "Macenko",
    "translated": "translated",
}
_PATCHES_PER_FIT = 240
_BATCH = 256
_LARGEST = 256  # pixels of a patch on the sheet, beyond which it is thinned


def stain_mappings(
    data: PatchDataset,
    rows: np.ndarray,
    images: np.ndarray,
    to: Mapping[str, str],
    pool: np.ndarray,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Patches mapped to the stain of another site (or of another value of any categorical field).

    The stain of either side is that of up to 240 patches of the pool, of the classes that both sides have (all, if
    none), in equal parts.

    Args:
        data: The dataset.
        rows: Row numbers of the patches, [N].
        images: The patches, uint8 [N, H, W, 3].
        to: Wanted value by field; a patch's side is the combination of its own values of these fields.
        pool: Row numbers of the patches that stains are measured on.
        seed: Seed of their choice.

    Returns:
        By method, uint8 [N, H, W, 3]; nothing if the pool lacks the target, or a patch's own side.
    """
    sides = data.index[list(to)].astype(str).agg("\x1f".join, axis=1).to_numpy(str)
    target, known = "\x1f".join(to.values()), data.schema.class_field
    classes = data.index[known.name].to_numpy(str) if known else np.full(len(data), "")
    there = set(sides[pool])
    if lacking := sorted({target, *sides[rows]} - there):
        names = ", ".join(side.replace("\x1f", " × ") for side in lacking)
        logger.warning("No stain mapping beside: there is no patch of %s to measure a stain on.", names)
        return {}

    def stain(side: str, shared: set[str]) -> StainStats:
        own = pool[(sides[pool] == side) & (np.isin(classes[pool], list(shared)) if shared else True)]
        return fit_stain(data.read(_balanced(own, classes[own], _PATCHES_PER_FIT, seed)))

    mapped = {method: np.empty_like(images) for method in STAIN_METHODS}
    for side in np.unique(sides[rows]):
        shared = set(classes[pool][sides[pool] == side]) & set(classes[pool][sides[pool] == target])
        ours, theirs, here = stain(side, shared), stain(target, shared), sides[rows] == side
        for method in STAIN_METHODS:
            mapped[method][here] = transfer(images[here], ours, theirs, method)
    return {str(method): made for method, made in mapped.items()}


def _balanced(rows: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Up to ``count`` of ``rows``, groups in equal parts as far as they reach, ascending."""
    names = np.unique(groups)
    rng = np.random.default_rng([seed, 11])
    each = math.ceil(count / len(names))
    return np.sort(np.concatenate([rng.permutation(rows[groups == name])[:each] for name in names]))


def structural_similarity() -> Callable[..., Any]:
    """torchmetrics' function of that name.

    Raises:
        UserError: It is not installed.
    """
    with needs("Measuring translations (measured > 0)", "torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure
    return structural_similarity_index_measure


def structure_kept(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each patch's structure another version of it has, both on the haematoxylin channel, float64 [N] each.

    The structural similarity (Wang et al. 2004; window of 11 px, σ = 1.5) of the channel's light, and the correlation
    of its optical density. A site with stronger haematoxylin lowers the former and leaves the latter.

    Args:
        images, others: uint8 [N, H, W, 3].

    Raises:
        UserError: torchmetrics is not installed.
    """
    similarity = structural_similarity()
    similar, together = [], []
    for start in range(0, len(images), _BATCH):
        a, b = (
            haematoxylin(torch.from_numpy(np.array(x[start : start + _BATCH])).permute(0, 3, 1, 2).float() / 255.0)
            for x in (images, others)
        )
        found = similarity(b, a, data_range=1.0, reduction="none")
        similar.append(torch.atleast_1d(torch.as_tensor(found)).double().numpy())
        p, q = ((-x.double().log10()).flatten(1) for x in (a, b))
        p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
        spread = (p.square().sum(1) * q.square().sum(1)).sqrt()
        # A patch of glass has no structure to keep: nothing is said of it, rather than 0/0.
        together.append(torch.where(spread > 1e-12, (p * q).sum(1) / spread, torch.nan).numpy())
    return np.concatenate(similar), np.concatenate(together)


def compare(images: np.ndarray, ways: Mapping[str, np.ndarray], patients: np.ndarray) -> dict[str, Any]:
    """Structure kept and colour by each way, averaged over patients.

    Args:
        images: The originals, uint8 [N, H, W, 3].
        ways: By name, what became of them, uint8 [N, H, W, 3].
        patients: Of each patch, [N].

    Returns:
        ``patches`` and ``patients`` (numbers), ``original`` with ``rgb`` (mean grey levels), and ``ways``: by name
        ``ssim_haematoxylin``, ``correlation_haematoxylin`` and ``rgb``.
    """
    names = np.unique(patients)

    def over_patients(values: np.ndarray) -> float | None:
        means = [values[(patients == p) & np.isfinite(values)] for p in names]
        present = [float(m.mean()) for m in means if len(m)]
        return float(np.mean(present)) if present else None

    def colour(version: np.ndarray) -> list[float]:
        each = version.reshape(len(version), -1, 3).mean(axis=1, dtype=np.float64)
        return [round(float(np.mean([each[patients == p, c].mean() for p in names])), 2) for c in range(3)]

    told = {}
    for name, version in ways.items():
        similar, together = structure_kept(images, version)
        told[name] = {
            "ssim_haematoxylin": over_patients(similar),
            "correlation_haematoxylin": over_patients(together),
            "rgb": colour(version),
        }
    return {"patches": len(images), "patients": len(names), "original": {"rgb": colour(images)}, "ways": told}


def measures_text(measures: Mapping[str, Any]) -> str:
    """The measures as a table."""

    def number(value: float | None) -> str:
        return "     –" if value is None else f"{value:6.3f}"

    def rgb(values: Sequence[float]) -> str:
        return " ".join(f"{v:5.1f}" for v in values)

    lines = [
        f"{measures['patches']} patches of {measures['patients']} patients, averaged over patients:",
        f"{'':12}{'SSIM of haematoxylin':>22}{'correlation':>14}    mean red, green, blue",
        f"{'original':12}{'':36}    {rgb(measures['original']['rgb'])}",
    ]
    for name, found in measures["ways"].items():
        similar, together = (number(found[f"{what}_haematoxylin"]) for what in ("ssim", "correlation"))
        lines.append(f"{name:12}{similar:>22}{together:>14}    {rgb(found['rgb'])}")
    return "\n".join(lines)


def write_sheet(
    path: str | Path, columns: Mapping[str, np.ndarray], rows: Sequence[str], target: str, remark: str = ""
) -> None:
    """Write a PNG with a row per patch and a column per way.

    Args:
        path: PNG to write.
        columns: By way, uint8 [N, H, W, 3]; "original" and "translated" are labelled with what they show.
        rows: Label of each row.
        target: What the patches were mapped or translated to.
        remark: Shown below.
    """
    with needs("The sheet of comparisons", "matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    step = math.ceil(next(iter(columns.values())).shape[1] / _LARGEST)
    figure = Figure(figsize=(1.1 + 1.35 * len(columns), 0.75 + 1.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (name, images) in enumerate(columns.items()):
        title = TITLES.get(name, name)
        if name in (*STAIN_METHODS, "translated"):
            title = f"{title}\nto {target}"
        for i in range(len(rows)):
            ax = axes[i][j]
            ax.imshow(images[i][::step, ::step], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if not i:
                ax.set_title(title, fontsize=7)
            if not j:
                ax.set_ylabel(rows[i], fontsize=5)
    if remark:
        figure.supxlabel(remark, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})
