"""What a model is used for: autoencoder, samplers and evaluation on the device, against fp32 or the CPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts import records
from gpu_parts.child import Context, NeedsGpu, NotHere, fresh_accelerator
from latent_medi.core import config
from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.diffusion.settings import (
    DropoutSettings,
    GuidanceSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder
from latent_medi.metadata.schema import Field, Schema
from latent_medi.sampling.grids import contact_sheet, save_sheet

SCHEMA = Schema(
    (
        Field("class", "class", tuple(f"c{i}" for i in range(3))),
        Field("site", "categorical", tuple(f"s{i}" for i in range(4))),
    )
)

GUIDANCE = {
    "none": GuidanceSettings(),
    "chain": GuidanceSettings("chain", 2.0),
    "margins": GuidanceSettings("margins", 2.0),
    "interval": GuidanceSettings("chain", 3.0, interval=(0.0, 0.25)),
    "rescaled": GuidanceSettings("chain", 3.0, rescale=0.7),
}


def test_parts() -> Any:
    """The tests' module of small real parts.

    Raises:
        NotHere: This copy has no tests.
    """
    folder = records.ROOT / "tests"
    if not folder.is_dir():
        raise NotHere("this copy has no tests, whose parts this uses")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import parts

    return parts


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ENCODE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.01}  # error of the moments over their spread, root mean square
_DECODE = {"fp32": 0.1, "bf16": 3.0, "fp16": 1.0}  # mean difference of pixels, grey levels


def _moments(autoencoder: Autoencoder, images: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    mean, std = autoencoder.encode(images)
    found = torch.cat([mean, std] if std is not None else [mean], 1).float().cpu()
    return found, autoencoder.decode(mean.float())


def _autoencoder(precision: str) -> Callable[[Context], None]:
    """The architecture of sd-vae-ft-mse with random weights; fp32 is held against the CPU, the others against fp32."""

    def row(context: Context) -> None:
        if precision == "fp16" and not context.gpu:
            raise NeedsGpu("fp16 convolutions are for GPUs")
        folder = context.work / "vae"
        if not (folder / "config.json").is_file():
            test_parts().stable_diffusion_vae(folder)
        if precision == "fp32":
            context.only_on_gpu()
        count, size = (1, 64) if context.quick or precision == "fp32" else (8, 256)
        draw = np.random.default_rng(0)
        coarse = draw.integers(60, 220, (count, size // 16, size // 16, 3), dtype=np.uint8)
        images = coarse.repeat(16, 1).repeat(16, 2)
        expected, seen = _moments(
            load_autoencoder(str(folder), "cpu" if precision == "fp32" else context.device), images
        )
        found, pixels = _moments(load_autoencoder(str(folder), context.device, _DTYPES[precision]), images)
        context.require(bool(torch.isfinite(found).all()), "a moment is not finite")
        error = (found - expected).square().mean().sqrt() / expected.std()
        context.within("encode", float(error), _ENCODE[precision])
        difference = np.abs(pixels.astype(int) - seen)
        context.within("decode", float(difference.mean()), _DECODE[precision])
        context.figures(largest_of_a_pixel=int(difference.max()), images=count, size=size)
        if context.gpu:
            context.show(peak_gib=torch.cuda.max_memory_allocated() / 2**30)

    return row


def small_pipeline(context: Context, device: str, objective: ObjectiveSettings | None = None) -> MediPipeline:
    """The demo's network with random weights, and a small random autoencoder."""
    parts = test_parts()
    size = 8 if context.quick else 16
    model = config.build(ModelSettings, config.load_yaml("demo/medi")["model"] | {"fields": None})
    torch.manual_seed(0)
    conditioner = MetadataConditioner(SCHEMA.to_dict(), model.embed_dim, dropout_patterns=asdict(DropoutSettings()))
    denoiser = Denoiser(build_unet(model, 4, size, conditional=True), conditioner)
    for parameter in denoiser.parameters():  # what starts at zero would let conditions and blocks do nothing
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    autoencoder = parts.make_autoencoder()
    shift, scale = torch.zeros(4), torch.ones(4)
    made = {"mpp": 0.5, "name": "random"}
    return MediPipeline.from_parts(denoiser, objective or ObjectiveSettings(), autoencoder, shift, scale, made).to(
        device
    )


def _sampler(name: str) -> Callable[[Context], None]:
    """Every form of guidance once, the device's pixels against the CPU's."""

    def row(context: Context) -> None:
        context.only_on_gpu()
        count = 4 if context.quick else 12
        rows = [{"class": f"c{i % 3}", "site": f"s{i % 4}"} for i in range(count)]
        ends_in_noise = ObjectiveSettings(zero_terminal_snr=name != "heun")  # Heun cannot start from there
        pipelines = {
            device: small_pipeline(context, device, ends_in_noise) for device in dict.fromkeys(("cpu", context.device))
        }
        shares, largest, pictures = [], 0, []
        for form, guidance in GUIDANCE.items():
            made = []
            for device in ("cpu", context.device):
                pipeline = pipelines[device]
                noise, generators = draw_noise(range(count), pipeline.latent_shape)
                latents = pipeline.generate_latents(
                    pipeline.conditions(rows),
                    noise,
                    SamplerSettings(name, 5 if context.quick else 10),  # type: ignore[arg-type]
                    guidance,
                    generators,
                )
                context.require(bool(torch.isfinite(latents).all()), f"{form}: a latent is not finite")
                made.append(pipeline.decode(latents.to(pipeline.unet.device)))
            difference = np.abs(made[0].astype(int) - made[1])
            shares.append(float((difference == 0).mean()))
            largest = max(largest, int(difference.max()))
            context.figures(
                **{f"{form}: share equal": shares[-1], f"{form}: largest difference": int(difference.max())}
            )
            pictures.append(list(made[1][:8]))
        save_sheet(contact_sheet(pictures, list(GUIDANCE)), context.pictures / f"sampler-{name}.png")
        context.within("share unequal", 1 - min(shares), 0.05)
        context.within("largest", largest, 3)

    return row


def numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested record with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{where}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{where}/{i}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, float(value)


def _evaluate(context: Context) -> None:
    """The same evaluation by the CPU and by the device; distances in both spaces."""
    context.only_on_gpu()
    test_parts()
    from evaluation_world import Size, build_world

    from latent_medi.core.records import encode
    from latent_medi.evaluation.evaluate import evaluate

    root = context.work / "world"
    shutil.rmtree(root, ignore_errors=True)
    world = build_world(root, Size(6, 6, 6, 3) if context.quick else Size(), 8 if context.quick else 40)
    found = []
    for name, device in (("on-cpu", "cpu"), ("on-device", context.device)):
        fresh_accelerator()
        settings = world.settings(
            name,
            device=device,
            encoders=["demo"],
            colour_free=True,
            downstream=False,
            memorisation=True,
            real_splits=0,
            cache=str(root / f"features-{name}"),
        )
        found.append(evaluate(settings))
    fresh_accelerator()
    sides = [dict(numbers(encode(metrics.fidelity))) for metrics in found]
    context.require(sides[0].keys() == sides[1].keys(), "the two do not have the same results")
    worst, where, compared = 0.0, "", 0
    for place in sides[0].keys() & sides[1].keys():
        if place.rpartition("/")[2] in ("fd", "fd_pca") or place.endswith("/sources/medi/value"):
            compared += 1
            difference = abs(sides[0][place] - sides[1][place]) / max(abs(sides[0][place]), 0.1)
            worst, where = max((worst, where), (difference, place))
    context.figures(worst_at=where)
    context.show(distances=compared)
    context.require(compared > 0, "no distance was found in the metrics")
    context.within("difference", worst, 1e-4)


ROWS: dict[str, Callable[[Context], None]] = {
    **{f"autoencoder {precision}": _autoencoder(precision) for precision in _DTYPES},
    **{f"sampler {n}": _sampler(n) for n in ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun", "ddim", "ddpm")},
    "evaluate": _evaluate,
}


def work_folder(context: Context, name: str) -> Path:
    """An empty folder for one row's files."""
    folder = context.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
