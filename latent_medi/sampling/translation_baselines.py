"""Baselines of a translation: stain mapping, the structure that each version of a patch keeps, and the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from latent_medi.core.counting import counted
from latent_medi.core.errors import needs
from latent_medi.core.files import atomic_path
from latent_medi.core.progress import get_logger
from latent_medi.features.stain import STAIN_METHODS, SiteStains, haematoxylin
from latent_medi.shards.dataset import PatchDataset

logger = get_logger("sampling")

TITLES = {
    "original": "original",
    "round_trip": "autoencoder\nround trip",
    "no_op": "no-op: translated\nto what it is",
    "reinhard": "Reinhard",
    "macenko": "Macenko",
    "translated": "translated",
}
_BATCH = 256
_HALF_WINDOW = 5  # pixels on each side of a window's centre
_LARGEST = 256  # pixels of a patch on the sheet, beyond which it is thinned


def stain_mappings(
    data: PatchDataset, rows: np.ndarray, images: np.ndarray, to: Mapping[str, str], pool: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Patches mapped to the stain of another site (or of another value of any categorical field).

    A stain is that of up to 240 patches of the pool, of the classes that own and wanted value share (all, if none), in
    equal parts.

    Args:
        data: The dataset.
        rows: Row numbers of the patches, [N].
        images: The patches, uint8 [N, H, W, 3].
        to: Wanted value by field.
        pool: Row numbers of the patches that stains are measured on.
        seed: Seed of their choice.

    Returns:
        By method, uint8 [N, H, W, 3]; empty if the pool has no patch with the wanted values, or with a patch's own.
    """
    values = data.index[list(to)].astype(str).agg("\x1f".join, axis=1).to_numpy(str)
    target, known = "\x1f".join(to.values()), data.schema.class_field
    classes = data.index[known.name].to_numpy(str) if known else np.full(len(data), "")
    if lacking := sorted({target, *values[rows]} - set(values[pool])):
        names = ", ".join(value.replace("\x1f", " × ") for value in lacking)
        logger.warning("No patches to measure the stain of %s on: the stain mappings are left out.", names)
        return {}
    stains = SiteStains(lambda found: data.read(pool[found]), values[pool], classes[pool], seed, repeat=False)
    return stains.transferred(images, values[rows], target)


def structural_similarity() -> Callable[..., Any]:
    """torchmetrics' function of that name.

    Raises:
        UserError: It is not installed.
    """
    with needs("Measuring translations (measured > 0)", "torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure
    return structural_similarity_index_measure


def structure_kept(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Structure of each patch that another version of it keeps, in the haematoxylin channel: two measures, float64 [N].

    The first is the structural similarity (Wang et al. 2004) of the channel's light, averaged over all windows (11 px,
    σ = 1.5) that lie in the patch; the second is the correlation of its optical density. Stronger haematoxylin lowers
    the first and not the second.

    Args:
        images, others: uint8 [N, H, W, 3]; sides of 11 px or more.

    Raises:
        UserError: torchmetrics is not installed.
    """
    similarity = structural_similarity()
    similarities, correlations = [], []
    for start in range(0, len(images), _BATCH):
        a, b = (
            haematoxylin(torch.from_numpy(np.array(x[start : start + _BATCH])).permute(0, 3, 1, 2).float() / 255.0)
            for x in (images, others)
        )
        # torchmetrics also averages windows that it completes beyond the border by reflection: those are cut off.
        _, windows = similarity(b, a, data_range=1.0, reduction="none", return_full_image=True)
        inside = windows[..., _HALF_WINDOW:-_HALF_WINDOW, _HALF_WINDOW:-_HALF_WINDOW]
        similarities.append(inside.double().mean((1, 2, 3)).numpy())
        p, q = ((-x.double().log10()).flatten(1) for x in (a, b))
        p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
        spread = (p.square().sum(1) * q.square().sum(1)).sqrt()
        # A patch of glass has no structure; its correlation would be 0/0.
        correlations.append(torch.where(spread > 1e-12, (p * q).sum(1) / spread, torch.nan).numpy())
    return np.concatenate(similarities), np.concatenate(correlations)


def compare(images: np.ndarray, versions: Mapping[str, np.ndarray], patients: np.ndarray) -> dict[str, Any]:
    """Structure and colour of each version of some patches, averaged over patients.

    Args:
        images: The originals, uint8 [N, H, W, 3].
        versions: Their versions by name, uint8 [N, H, W, 3].
        patients: Patient of each patch, [N].

    Returns:
        ``patches`` and ``patients`` (numbers), ``original`` with ``rgb`` (mean grey levels), and ``ways``: by name
        ``ssim_haematoxylin``, ``correlation_haematoxylin`` and ``rgb``.
    """

    def over_patients(values: np.ndarray) -> np.ndarray:
        return pd.DataFrame(values).groupby(patients).mean().mean().to_numpy()

    def known(values: np.ndarray) -> float | None:
        mean = float(over_patients(values)[0])
        return None if np.isnan(mean) else mean

    def colour(version: np.ndarray) -> list[float]:
        return over_patients(version.reshape(len(version), -1, 3).mean(axis=1, dtype=np.float64)).round(2).tolist()

    measures = {}
    for name, version in versions.items():
        similarity, correlation = structure_kept(images, version)
        measures[name] = {
            "ssim_haematoxylin": known(similarity),
            "correlation_haematoxylin": known(correlation),
            "rgb": colour(version),
        }
    n_patients = len(np.unique(patients))
    return {"patches": len(images), "patients": n_patients, "original": {"rgb": colour(images)}, "ways": measures}


def measures_text(measures: Mapping[str, Any]) -> str:
    """The measures as a table."""

    def number(value: float | None) -> str:
        return "     –" if value is None else f"{value:6.3f}"

    def rgb(values: Sequence[float]) -> str:
        return " ".join(f"{v:5.1f}" for v in values)

    patients = counted(measures["patients"], "patient")
    lines = [
        f"{counted(measures['patches'], 'patch')} of {patients}, averaged over patients:",
        f"{'':12}{'SSIM of haematoxylin':>22}{'correlation':>14}    mean red, green, blue",
        f"{'original':12}{'':36}    {rgb(measures['original']['rgb'])}",
    ]
    for name, found in measures["ways"].items():
        similarity, correlation = (number(found[f"{what}_haematoxylin"]) for what in ("ssim", "correlation"))
        lines.append(f"{name:12}{similarity:>22}{correlation:>14}    {rgb(found['rgb'])}")
    return "\n".join(lines)


def write_sheet(
    path: str | Path, columns: Mapping[str, np.ndarray], rows: Sequence[str], target: str, remark: str = ""
) -> None:
    """Write a PNG with a row per patch and a column per version.

    Args:
        path: PNG to write.
        columns: Versions by name, uint8 [N, H, W, 3].
        rows: Label of each row.
        target: Values that the patches were mapped or translated to.
        remark: Text below the patches.
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
