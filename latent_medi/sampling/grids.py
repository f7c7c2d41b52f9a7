"""Pictures of generated patches: tables of combinations, blends of two values of a field, denoising trajectories."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from latent_medi.core.errors import UserError, needs
from latent_medi.core.files import atomic_path, check_file
from latent_medi.diffusion.conditioning import FieldEmbedding, MetadataConditioner, embedding_key
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.model_folder import known_fields
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.launch import make_accelerator
from latent_medi.metadata.schema import FIRST_VALUE, Field, Schema
from latent_medi.sampling.settings import GridSettings
from latent_medi.shards.format.codec import SyntheticImage

_GAP, _LETTERS = 4, 14  # pixels


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans; Pillow's own font lacks ×, ᾱ and the accented letters in names of hospitals."""
    with needs("A contact sheet", "matplotlib"):
        from matplotlib import get_data_path
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _LETTERS)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), columns: Sequence[str] = ()
) -> Image.Image:
    """Patches in labelled rows, with white gaps.

    Args:
        rows: Patches uint8 [H, W, 3], all of one size; rows may differ in length.
        labels: Label to the left of each row.
        columns: Label above each column.
    """
    height, width = rows[0][0].shape[:2]
    font = _font()
    left = max((round(font.getlength(label)) for label in labels), default=-_GAP) + 2 * _GAP
    wide = max([width, *(round(font.getlength(name)) for name in columns)])
    top = _LETTERS + 3 * _GAP if columns else _GAP
    most = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + most * (wide + _GAP), top + len(rows) * (height + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((left + i * (wide + _GAP), _GAP), name, "black", font)
    for j, row in enumerate(rows):
        y = top + j * (height + _GAP)
        if labels:
            draw.text((_GAP, y + (height - _LETTERS) // 2), labels[j], "black", font)
        for i, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (left + i * (wide + _GAP), y))
    return sheet


def check_picture(path: str | Path) -> Path:
    """The path of a picture, checked before the patches are generated.

    Raises:
        UserError: The name does not end in .png, it cannot be written, or another kind of file has it.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"The picture {path} must end in .png.")
    return check_file(path, "picture", rb"\x89PNG")


def save_sheet(sheet: Image.Image, path: str | Path) -> Path:
    """Write a sheet of synthetic patches as PNG with their mark, atomically.

    Raises:
        UserError: The name does not end in .png.
    """
    path = check_picture(path)
    with atomic_path(path) as temporary:
        SyntheticImage.of(np.asarray(sheet)).save(temporary, format="PNG")
    return path


def grid(settings: GridSettings) -> Path:
    """Generate and write the picture that the settings describe.

    Raises:
        UserError: A field or value that the model does not know, or settings that contradict each other.
    """
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise UserError("A grid is drawn by one process.", "Start one, without a launcher.")
    check_picture(settings.out)
    if problems := settings.problems():
        raise UserError("The grid cannot be drawn: " + "; ".join(problems) + ".")
    if (known := known_fields(settings.model)) is not None:
        _check_fields(known, settings)
    pipeline = MediPipeline.from_pretrained(settings.model).to(accelerator.device)
    _check_fields(pipeline.schema, settings)
    draw = {"cells": _cells, "blend": _blend, "trajectory": _trajectory}[settings.kind]
    return save_sheet(draw(pipeline, settings), settings.out)


def _check_fields(known: Schema, settings: GridSettings) -> None:
    """Refuse a field or value that the model does not know.

    Raises:
        UserError: Names it, and the closest one that there is.
    """
    varied = {"cells": (settings.rows, settings.columns), "blend": (settings.field,), "trajectory": ()}[settings.kind]
    for name in [*settings.fields, *filter(None, varied)]:
        known.field(name)
    ends = (settings.start, settings.stop) if settings.kind == "blend" else ()
    known.encode([settings.fields, *({settings.field: end} for end in ends)], absent="null")


def _images(pipeline: MediPipeline, settings: GridSettings, rows: list[dict[str, Any]], seeds: list[int]) -> np.ndarray:
    """Images uint8 [n, H, W, 3] of conditions, value by field, each from its seed."""
    noise, generators = draw_noise(seeds, pipeline.latent_shape)
    conditions, how = pipeline.conditions(rows), (settings.sampler, settings.guidance)
    latents = pipeline.generate_latents(conditions, noise, *how, generators, settings.device_batch, pad=True)
    parts = torch.split(latents, settings.device_batch)
    return np.concatenate([pipeline.decode(part.to(pipeline.unet.device)) for part in parts])


def _seeds(settings: GridSettings) -> list[int]:
    return list(range(settings.seed, settings.seed + settings.n))


def _cells(pipeline: MediPipeline, settings: GridSettings) -> Image.Image:
    """``n`` patches per pair of values, from the same seeds in every cell, so that only the condition differs."""
    across, down = pipeline.schema.field(settings.columns), pipeline.schema.field(settings.rows)
    pairs = [{down.name: d, across.name: a} for d in down.values for a in across.values]
    conditions = [{**settings.fields, **pair} for pair in pairs for _ in range(settings.n)]
    images = _images(pipeline, settings, conditions, _seeds(settings) * len(pairs))
    rows = images.reshape(len(down.values), -1, *images.shape[1:])
    columns = [value if i == 0 else "" for value in across.values for i in range(settings.n)]
    return contact_sheet([list(row) for row in rows], list(down.values), columns)


def blended(
    conditioner: MetadataConditioner, known: Field, start: str, stop: str, shares: Sequence[float]
) -> tuple[MetadataConditioner, list[str]]:
    """A copy of a conditioner with further values of a field, whose embeddings are interpolated between two values.

    Args:
        conditioner: The model's conditioner.
        known: A class or categorical field of the model.
        start, stop: Two of its values.
        shares: 0 is ``start``, 1 is ``stop``.

    Returns:
        The copy, and the names of the further values in the order of ``shares``.

    Raises:
        UserError: An unknown value.
    """
    codes = [known.code(start), known.code(stop)]
    names = [f"{start} to {stop}, {share:.6f} ({i})" for i, share in enumerate(shares)]
    copied = copy.deepcopy(conditioner)
    copied.append(known.name, names, start="zero")
    embedding = cast(FieldEmbedding, copied.embeddings[embedding_key(known.name)]).codes
    with torch.no_grad():
        weights = torch.tensor(shares, device=embedding.weight.device, dtype=embedding.weight.dtype)[:, None]
        ends = embedding.weight[codes]
        embedding.weight[-len(names) :] = torch.lerp(ends[:1], ends[1:], weights)
    assert known.n_codes == FIRST_VALUE + len(known.values)
    return copied, names


def _blend(pipeline: MediPipeline, settings: GridSettings) -> Image.Image:
    """A row per seed, from one value of a field to another in equal steps."""
    known = pipeline.schema.field(settings.field)
    shares = np.linspace(0.0, 1.0, settings.steps).tolist()
    if known.continuous:
        values: list[Any] = np.linspace(float(settings.start), float(settings.stop), settings.steps).tolist()
        columns = [f"{value:g}" for value in values]
    else:
        assert pipeline.conditioning is not None
        copied, values = blended(pipeline.conditioning, known, settings.start, settings.stop, shares)
        pipeline.conditioning, pipeline.denoiser = copied, Denoiser(pipeline.unet, copied).eval()
        columns = [settings.start, *(f"{share:.2f}" for share in shares[1:-1]), settings.stop]
    rows = [{**settings.fields, known.name: value} for _ in range(settings.n) for value in values]
    seeds = [seed for seed in _seeds(settings) for _ in values]
    images = _images(pipeline, settings, rows, seeds)
    return contact_sheet([list(row) for row in images.reshape(settings.n, -1, *images.shape[1:])], columns=columns)


def _trajectory(pipeline: MediPipeline, settings: GridSettings) -> Image.Image:
    """Two rows per seed along the denoising trajectory: the noisy latent and the predicted clean one, decoded."""
    conditions = pipeline.conditions([settings.fields] * settings.n)
    check_guidance(settings.guidance, pipeline.conditioning, conditions)
    noise, generators = draw_noise(_seeds(settings), pipeline.latent_shape)
    steps: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    how = (settings.sampler, settings.guidance)
    pipeline.generate_latents(conditions, noise, *how, generators, callback=lambda *step: steps.append(step))
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, settings.steps).round().astype(int))]
    pictures = [(alpha, pipeline.decode(noisy), pipeline.decode(clean)) for alpha, noisy, clean in chosen]
    rows = [[p[kind][i] for p in pictures] for i in range(settings.n) for kind in (1, 2)]
    labels = [f"seed {seed}: {what}" for seed in _seeds(settings) for what in ("x_t", "x_0")]
    return contact_sheet(rows, labels, [f"ᾱ={alpha:.3f}" for alpha, *_ in chosen])


def samples_sheet(images: np.ndarray, rows: np.ndarray, labels: dict[int, str], width: int = 16) -> Image.Image:
    """Lines of up to ``width`` images; each row of a plan begins a line.

    Args:
        images: uint8 [n, H, W, 3].
        rows: Row of the plan of each image, [n].
        labels: Label of each row.
        width: Images per line.
    """
    lines: list[list[np.ndarray]] = []
    names: list[str] = []
    for number in dict.fromkeys(rows.tolist()):
        own = list(images[rows == number])
        lines += [own[start : start + width] for start in range(0, len(own), width)]
        names += [labels[number], *[""] * (len(lines) - len(names) - 1)]
    return contact_sheet(lines, names)
