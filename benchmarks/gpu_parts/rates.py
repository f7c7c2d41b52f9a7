"""Images per second and memory: against plain loops, tensors in memory, pixels, the device's peak and the estimate."""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from gpu_parts import records
from gpu_parts.child import Context, NeedsGpu, NotHere, fresh_accelerator
from gpu_parts.smoke_train import TINY_S
from latent_medi.core import config
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.training.estimate.report import GIB, estimate, matmul_tflops, measure, stand_in_schema
from latent_medi.training.estimate.step_cost import step_cost
from latent_medi.training.settings import EstimateSettings, TrainSettings

SHAPE = (4, 32, 32)


def _peers() -> None:
    """Look whether the peers of encoding and features can be had.

    Raises:
        NotHere: They cannot.
    """
    if not (records.ROOT / "tests").is_dir():
        raise NotHere("this copy has no tests, whose parts this uses")
    if importlib.util.find_spec("webdataset") is None:
        raise NotHere("webdataset is not installed, which makes the images")


def _forget() -> None:
    """Give back what a compiled network holds."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _updates(preset: str, compiled: bool) -> Callable[[Context], None]:
    """Real updates in bf16 at a batch of 256, or what fits; for B compiled the share of the matrix peak too."""

    def row(context: Context) -> None:
        from training import one_device

        if compiled and not context.gpu:
            raise NeedsGpu("a CPU's compiler is another one")
        context.only_on_gpu()
        batch, shape = (4, (4, 8, 8)) if context.quick else (256, SHAPE)
        model = ModelSettings(preset=preset)  # type: ignore[arg-type]
        if context.quick:
            model = config.build(ModelSettings, TINY_S)
        schema = stand_in_schema(None, 2, 32)
        found = None
        while found is None:
            settings = replace(
                one_device(model, batch, channels_last=True, compile=compiled),
                measure_steps=2 if context.quick else 12,
            )
            try:
                found = measure(settings, shape, schema, batch, context.device)
            except torch.OutOfMemoryError as error:
                if batch == 1:
                    raise NotHere("the card's memory is too small for one image") from error
            if found is None:
                batch //= 2
            _forget()
        rate = found["steps_per_s"] * batch
        context.figures(batch=batch, preset=preset, precision=settings.precision, compiled=compiled, **found)
        context.show(images_per_s=rate)
        if "peak_bytes" in found:
            context.show(peak_gib=found["peak_bytes"] / GIB)
        work = step_cost(settings, shape, schema, 2)[0].flops / 2
        small: dict[str, Any] = {"size": 256, "count": 2} if context.quick else {}
        peak = matmul_tflops(device=context.device, **small)
        context.figures(gflop_per_image=work / 1e9, matmul_tflops=peak)
        share = rate * work / (peak * 1e12)
        if preset == "B" and compiled and not context.quick:
            context.goal("share_of_matmul", share, least=0.45)
        else:
            context.show(share_of_matmul=share)

    return row


def _loops(context: Context) -> None:
    """UNet S as the 8 GB preset trains it, against a loop after diffusers' example and the same step on tensors."""
    import training

    context.only_on_gpu()
    folder = context.work / "loops"
    if not (folder / "whole").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        fresh_accelerator()
        training.make_data(folder, 64 if context.quick else 2048, 8 if context.quick else 32)
        (folder / "whole").touch()
    settings = training.run_settings(folder, True, context.gpu and not context.quick)
    if context.quick:
        settings = replace(settings, global_batch=8, device_batch=8, max_steps=9, log_every_images=24)
    loops: dict[str, Callable[[TrainSettings], list[float]]] = {
        "loop": training.loop_rates,
        "memory": training.memory_rates,
        "plain": training.plain_rates,
    }
    seen: dict[str, list[float]] = {name: [] for name in loops}
    start = context.seconds_left()
    for order in (list(loops), list(loops)[::-1]):  # back and forth, so that a machine that changes does so for all
        for name in order:
            fresh_accelerator()
            seen[name] += loops[name](settings)
            _forget()
            context.figures(**{f"{name}_steps_per_s": statistics.median(seen[name])})
        if context.quick or context.seconds_left() < 2 * (start - context.seconds_left()):
            break
    rate = {name: statistics.median(values) for name, values in seen.items()}
    context.show(images_per_s=rate["loop"] * settings.global_batch)
    context.goal("over_plain_loop", rate["loop"] / rate["plain"], least=0.0 if context.quick else 1.5)
    context.goal("over_tensors_in_memory", rate["loop"] / rate["memory"], least=0.0 if context.quick else 0.97)


def _sampling(context: Context) -> None:
    """DDIM with guidance at every step, against the loop of diffusers' pipelines."""
    import sampling

    context.only_on_gpu()
    if context.quick:
        with mock.patch.object(sampling, "STEPS", 4):
            result = sampling.speed(True)
    else:
        result = sampling.speed(False)
    context.figures(**result)
    context.show(images_per_s=result["same_guidance_images_per_s"])
    context.goal("over_plain_loop", result["same_guidance_over_plain_ddim_loop"], least=0.0 if context.quick else 1.5)
    context.show(in_its_interval=result["guidance_in_its_interval_over_plain_ddim_loop"])


def _by_command(module: str, key: str, least: float) -> Callable[[Context], None]:
    """A benchmark's own command, in this process."""

    def row(context: Context) -> None:
        context.only_on_gpu()
        _peers()
        file = context.work / f"{module}.json"
        asked = [module, "--quick", "--json", str(file), *(["--size", "32"] if context.quick else [])]
        context.command = f"python benchmarks/{module}.py " + " ".join(asked[1:])
        with mock.patch.object(sys, "argv", asked):
            importlib.import_module(module).main()
        result = json.loads(file.read_text())
        context.figures(**result)
        context.show(**{k: v for k, v in result.items() if k.endswith("images_per_s") and "alone" not in k})
        context.goal(key, result[key], least=0.0 if context.quick else least)

    return row


def _features(context: Context) -> None:
    """Features of an evaluation, from folder to written cache, against a bare loop with the same encoder."""
    context.only_on_gpu()
    _peers()
    import evaluation

    from latent_medi.features.encoders import load_encoder

    weights = context.models / "squeezenet" / "squeezenet1_0_imagenet.safetensors"
    name = "squeezenet" if weights.is_file() and not context.quick else "demo"
    encoder = load_encoder(name, str(weights) if name == "squeezenet" else None, context.device)
    result = evaluation.embedding(encoder, 128 if context.quick else 1024, encoder.preprocessing.size or 256, 2)
    context.figures(encoder=name, **result)
    context.show(patches_per_s=result["cached_features_patches_per_s"])
    ratio = result["cached_features_over_bare_loop"]
    context.goal("over_bare_loop", ratio, least=0.0 if context.quick else 0.95)


def _peak(preset: str) -> Callable[[Context], None]:
    """What a preset takes on the GPU, and what `train --estimate` predicts."""

    def row(context: Context) -> None:
        if not context.gpu:
            raise NeedsGpu("memory is counted on a GPU")
        settings = config.parse(EstimateSettings, ["--config", f"presets/{preset}", "measure_steps=3"])
        if context.quick:
            settings = replace(settings, global_batch=4, device_batch=4, compile=False)
        context.command = f"latent-medi train --config presets/{preset} --estimate"
        result = estimate(settings)
        _forget()
        context.figures(**{k: v for k, v in result.items() if k != "measured"}, measured=result["measured"] or {})
        if not result["measured"]:
            raise NotHere("the card's memory is too small for this preset")
        peak, expected = result["measured"]["peak_bytes"] / GIB, result["bytes"]["peak"] / GIB
        context.show(peak_gib=peak, estimated_gib=expected)
        context.goal("off_by", abs(peak / expected - 1), most=0.10)

    return row


def _pixels(context: Context) -> None:
    """UNet L on latents of 256 px against MeDi's network on pixels of 128 px, each at its best batch."""
    from training import against_pixels

    result: dict[str, Any] = against_pixels(context.gpu and not context.quick, 0.0)
    context.figures(**result)
    context.show(flop_ratio=result["medi_pixels_flop_over_latent_l"])
    if isinstance(result["latent_l_over_medi_pixels"], str):
        context.only_on_gpu()
    else:
        context.show(images_per_s=result["latent_l_images_per_s"])
        context.goal("over_pixels", result["latent_l_over_medi_pixels"], least=5.0)


ROWS: dict[str, Callable[[Context], None]] = {
    **{f"train {p} eager": _updates(p, False) for p in ("S", "B", "L")},
    **{f"train {p} compiled": _updates(p, True) for p in ("S", "B", "L")},
    "loops": _loops,
    "sampling": _sampling,
    "encoding": _by_command("encoding", "encode_dataset_over_bare_loop", 0.95),
    "features": _features,
    **{f"peak {preset}": _peak(preset) for preset in ("8gb", "12gb", "24gb", "80gb")},
    "pixels": _pixels,
}
