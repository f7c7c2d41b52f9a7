"""What people write for other pipelines of diffusers: honoured here, or refused with what to write instead."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.samplers import SAMPLERS
from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings
from latent_medi.latents.autoencoder import first_line
from latent_medi.metadata.schema import Schema

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "half": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

_SAMPLER_OF = {
    "EulerDiscreteScheduler": "euler", "HeunDiscreteScheduler": "heun", "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm", "UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpmpp_2m",
}  # fmt: skip

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_NO_MATTER = ("low_cpu_mem_usage",)  # how a model is read, not what it is

_LOADING = {
    "variant": "a model folder holds one kind of weights; torch_dtype=torch.float16 loads them as such",
    "trust_remote_code": "no code of a folder is ever run",
    "custom_pipeline": "no code of a folder is ever run",
    "custom_revision": "no code of a folder is ever run",
    "unet": "a network comes with its folder; set pipe.unet afterwards",
    "conditioning": "a conditioner comes with its folder",
    "vae": "write autoencoder=…",
    "subfolder": "name the model's own folder",
    "quantization_config": "weights are fp32, fp16 or bf16: torch_dtype=…",
}

_CALL = {
    "num_inference_steps": "Write steps=….",
    "guidance_scale": "Write guidance=….",
    "generator": "Write seed=…, or seeds=[…] with one per image.",
    "num_images_per_prompt": "Write num_images=….",
    "num_samples": "Write num_images=….",
    "batch_size": "Write num_images=… for how many, batch=… for how many at a time.",
    "prompt": "Write conditions by field, such as class_=….",
    "negative_prompt": "Write conditions by field, such as class_=….",
    "class_labels": "Write class_=…, a value by name.",
    "class_label": "Write class_=…, a value by name.",
    "eta": 'Write sampler=SamplerSettings("ddim", steps, eta).',
    "scheduler": "Write sampler=….",
    "latents": "pipe.generate_latents(conditions, noise) starts from given noise.",
    "height": "Leave it out: a model makes patches of one size.",
    "width": "Leave it out: a model makes patches of one size.",
    "return_dict": "Leave it out: the images are in pipe(…).images.",
    "callback": "pipe.generate_latents(…, watch=…) calls back at every step.",
    "callback_on_step_end": "pipe.generate_latents(…, watch=…) calls back at every step.",
    "cross_attention_kwargs": "Leave it out: the network attends to no text.",
}


def scheduler_refusal(scheduler: Any) -> UserError:
    """Why a pipeline takes no other scheduler, and what to write for the one that was given."""
    kind = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    name = _SAMPLER_OF.get(kind, "")
    options = {} if isinstance(scheduler, type) else getattr(scheduler, "config", {})
    stochastic = str(options.get("algorithm_type")).startswith("sde")
    if name == "dpmpp_2m" and stochastic:
        name = "dpmpp_2m_sde"
    hint = f"Write pipe(…, sampler={name!r})." if name else f"Write pipe(…, sampler=…): {', '.join(SAMPLERS)}."
    return UserError(
        f"The scheduler of a pipeline is the noise schedule its model was trained on; {kind} would not be asked.", hint
    )


def dtype_of(given: Any) -> torch.dtype:
    """A precision of weights from a torch dtype or its name; ``None`` and "auto" are fp32, in which weights are stored.

    Raises:
        UserError: Another kind of numbers.
    """
    known = torch.float32 if given is None or given == "auto" else given
    if isinstance(known, str):
        known = _DTYPES.get(known.removeprefix("torch."), known)
    if known not in _DTYPES.values():
        raise UserError(f"torch_dtype is {given!r}; it is torch.float32, torch.float16 or torch.bfloat16.")
    return known


def device_of(device: Any, device_map: Any = None) -> torch.device:
    """The one device that a model is put on.

    Raises:
        UserError: A map to several, a contradiction, or a device that is not there.
    """
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is not None:
        try:
            mapped = torch.device(device_map)
        except (RuntimeError, TypeError):
            raise UserError(
                f"device_map is {device_map!r}; a model is on one device as a whole.", "Write device='cuda'."
            ) from None
        if torch.device(device) not in (torch.device("cpu"), mapped):
            raise UserError(f"device is {device!r} and device_map {device_map!r}.", "Give one of them.")
        device = mapped
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"There is no device {str(device)!r} here: {reason}", "Write device='cpu'.") from None
    return found


def loading_options(folder: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a download is to be given, out of further arguments of ``from_pretrained``.

    Raises:
        UserError: One that means nothing here.
    """
    for name, value in given.items():
        if name == "scheduler" and value is not None:
            raise scheduler_refusal(value)
        if name == "use_safetensors" and value is False:
            raise UserError("use_safetensors is False; a model folder holds safetensors, and no pickle is opened.")
        if name in (*_DOWNLOAD, *_NO_MATTER, "use_safetensors", "scheduler") or value is None or value is False:
            continue
        known = ("autoencoder", "torch_dtype", "dtype", "device", "device_map", *_DOWNLOAD)
        raise UserError(f"from_pretrained takes no {name}: {_LOADING.get(name, nearest(name, known))}.")
    if given.get("revision") is not None and Path(folder).is_dir():
        raise UserError(f"revision is {given['revision']!r}, and {folder} is a folder here, which has none.")
    return {name: given[name] for name in _DOWNLOAD if given.get(name) is not None}


def check_fields(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse what is an argument of other pipelines, and no field.

    Raises:
        UserError: Says what to write instead.
    """
    for name in names:
        if name in _CALL and name not in known:
            raise UserError(f"{name} is neither an argument nor a field of the model.", _CALL[name])


def whole(value: Any, name: str, least: int = 1) -> int:
    """A whole number that an argument is.

    Raises:
        UserError: It is of another type, or out of range.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        hint = "Conditions are given by name, such as class_='…'." if name == "num_images" else ""
        raise UserError(f"{name} is {value!r}; it takes a whole number.", hint)
    if not least <= int(value) < 2**63:
        raise UserError(f"{name} is {value}; it must be at least {least}, and at most 2^63 − 1.")
    return int(value)


def seeds_of(seeds: Any) -> list[int]:
    """Seeds, one per image.

    Raises:
        UserError: No list of whole numbers.
    """
    if isinstance(seeds, (np.ndarray, torch.Tensor)):
        seeds = seeds.tolist()
    if not isinstance(seeds, (Sequence, range)) or isinstance(seeds, (str, bytes)):
        raise UserError(f"seeds is {seeds!r}; it takes a list of whole numbers, one per image.", "seed=… is the first.")
    return [whole(seed, f"seeds[{i}]", least=0) for i, seed in enumerate(seeds)]


def sampler_of(sampler: Any, steps: Any) -> SamplerSettings:
    """A sampler by its name or settings, with its steps.

    Raises:
        UserError: Anything else.
    """
    if isinstance(sampler, SchedulerMixin) or (isinstance(sampler, type) and issubclass(sampler, SchedulerMixin)):
        raise scheduler_refusal(sampler)
    if sampler is not None and not isinstance(sampler, (str, SamplerSettings)):
        raise UserError(f"sampler is {sampler!r}; it takes a name ({', '.join(SAMPLERS)}) or SamplerSettings.")
    chosen = sampler if isinstance(sampler, SamplerSettings) else SamplerSettings(name=sampler or "dpmpp_2m")  # type: ignore[arg-type]
    return SamplerSettings(chosen.name, whole(chosen.steps if steps is None else steps, "steps", least=0), chosen.eta)


def rows_of(
    schema: Schema, fields: Mapping[str, Any], num_images: int | None, seeds: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Values by field of every image, where a list gives each image its own.

    Raises:
        UserError: The class is given twice or is no field, or numbers of images disagree.
    """
    if "class_" in fields:
        if (known := schema.class_field) is None:
            raise UserError("class_ is given, but the model has no class field.")
        if known.name in fields:
            raise UserError(f"The class is given twice, as class_ and as {known.name}.")
        fields = {known.name: fields["class_"], **{n: v for n, v in fields.items() if n != "class_"}}
    listed = {n: list(v) for n, v in fields.items() if isinstance(v, (list, tuple, np.ndarray))}
    counts = {len(v) for v in listed.values()} | ({len(seeds)} if seeds is not None else set())
    counts |= {num_images} if num_images is not None else set()
    if len(counts) > 1:
        raise UserError(f"num_images, seeds and lists of values disagree about the number of images: {sorted(counts)}.")
    count = counts.pop() if counts else 1
    if count < 1:
        raise UserError(f"The number of images must be at least 1, not {count}.")
    return [{n: listed[n][i] if n in listed else v for n, v in fields.items()} for i in range(count)]


def check_guidance_argument(guidance: Any) -> None:
    """Refuse a guidance that is no number, no mapping to numbers and no settings.

    Raises:
        UserError: As said.
    """
    if guidance is None or isinstance(guidance, GuidanceSettings):
        return
    scales = list(guidance.values()) if isinstance(guidance, Mapping) else [guidance]
    if not all(isinstance(scale, numbers.Real) and not isinstance(scale, bool) for scale in scales):
        raise UserError(
            f"guidance is {guidance!r}; it takes a number, numbers by field, or GuidanceSettings.",
            "guidance=2.0, or guidance={'class': 2.0}.",
        )
