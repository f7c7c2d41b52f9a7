"""Arguments of a pipeline's calls: checked, converted, and explained where other pipelines of diffusers differ."""

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

_DTYPES = dict.fromkeys(("float32", "fp32"), torch.float32)
_DTYPES |= dict.fromkeys(("float16", "fp16", "half"), torch.float16)
_DTYPES |= dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16)

_SAMPLER_OF = {"EulerDiscreteScheduler": "euler", "HeunDiscreteScheduler": "heun", "DDIMScheduler": "ddim"}
_SAMPLER_OF |= {"DDPMScheduler": "ddpm", "UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpmpp_2m"}

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_IGNORED = ("low_cpu_mem_usage",)  # changes how a model is read, not the model

_LOADING = {
    "variant": "a model folder holds one kind of weights; torch_dtype=torch.float16 loads them in fp16",
    "trust_remote_code": "code in a folder is never run",
    "custom_pipeline": "code in a folder is never run",
    "custom_revision": "code in a folder is never run",
    "unet": "the network is that of the folder; set pipe.unet afterwards",
    "conditioning": "the conditioner is that of the folder",
    "vae": "write autoencoder=…",
    "subfolder": "give the model's own folder",
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
    "callback": "pipe.generate_latents(…, callback=…) calls it at every step.",
    "callback_on_step_end": "pipe.generate_latents(…, callback=…) calls it at every step.",
    "cross_attention_kwargs": "Leave it out: the network attends to no text.",
}


def scheduler_refusal(scheduler: Any) -> UserError:
    """The refusal of another scheduler, with the sampler to use instead."""
    kind = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    name = _SAMPLER_OF.get(kind, "")
    options = {} if isinstance(scheduler, type) else getattr(scheduler, "config", {})
    stochastic = str(options.get("algorithm_type")).startswith("sde")
    if name == "dpmpp_2m" and stochastic:
        name = "dpmpp_2m_sde"
    hint = f"Write pipe(…, sampler={name!r})." if name else f"Write pipe(…, sampler=…): {', '.join(SAMPLERS)}."
    return UserError(
        f"A pipeline's scheduler is the noise schedule of its training; {kind} would have no effect.", hint
    )


def dtype_of(given: Any) -> torch.dtype:
    """The precision of weights from a torch dtype or its name; ``None`` and "auto" are fp32, that of stored weights.

    Raises:
        UserError: It is none of fp32, fp16 and bf16.
    """
    known = torch.float32 if given is None or given == "auto" else given
    if isinstance(known, str):
        known = _DTYPES.get(known.removeprefix("torch."), known)
    if known not in _DTYPES.values():
        raise UserError(f"torch_dtype must be torch.float32, torch.float16 or torch.bfloat16, not {given!r}.")
    return known


def device_of(device: Any, device_map: Any = None) -> torch.device:
    """The device of a model.

    Raises:
        UserError: device_map names several devices, the two contradict each other, or there is no such device.
    """
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is not None:
        try:
            mapped = torch.device(device_map)
        except (RuntimeError, TypeError):
            raise UserError(
                f"device_map is {device_map!r}; a model is on one device.", "Write device='cuda'."
            ) from None
        if torch.device(device) not in (torch.device("cpu"), mapped):
            raise UserError(f"device is {device!r} and device_map {device_map!r}.", "Give one of them.")
        device = mapped
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"There is no device {str(device)!r}: {reason}", "Write device='cpu'.") from None
    return found


def loading_options(folder: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a download, from the further arguments of ``from_pretrained``.

    Raises:
        UserError: An argument is not supported.
    """
    for name, value in given.items():
        if name == "scheduler" and value is not None:
            raise scheduler_refusal(value)
        if name == "use_safetensors" and value is False:
            raise UserError("use_safetensors is False, but model folders hold safetensors; pickles are not opened.")
        if name in (*_DOWNLOAD, *_IGNORED, "use_safetensors", "scheduler") or value is None or value is False:
            continue
        known = ("autoencoder", "torch_dtype", "dtype", "device", "device_map", *_DOWNLOAD)
        raise UserError(f"from_pretrained takes no {name}: {_LOADING.get(name, nearest(name, known))}.")
    if given.get("revision") is not None and Path(folder).is_dir():
        raise UserError(f"revision is {given['revision']!r}, but {folder} is a local folder, which has none.")
    return {name: given[name] for name in _DOWNLOAD if given.get(name) is not None}


def check_fields(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse arguments of other pipelines that are no fields.

    Raises:
        UserError: Says what to write instead.
    """
    for name in names:
        if name in _CALL and name not in known:
            raise UserError(f"{name} is neither an argument nor a field of the model.", _CALL[name])


def whole(value: Any, name: str, least: int = 1) -> int:
    """An argument as a whole number.

    Raises:
        UserError: It has another type, or is out of range.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        hint = "Conditions are given by name, such as class_='…'." if name == "num_images" else ""
        raise UserError(f"{name} must be a whole number, not {value!r}.", hint)
    if not least <= int(value) < 2**63:
        raise UserError(f"{name} must be from {least} to 2^63 − 1, not {value}.")
    return int(value)


def seeds_of(seeds: Any) -> list[int]:
    """Seeds, one per image.

    Raises:
        UserError: It is no list of whole numbers.
    """
    if isinstance(seeds, (np.ndarray, torch.Tensor)):
        seeds = seeds.tolist()
    if not isinstance(seeds, (Sequence, range)) or isinstance(seeds, (str, bytes)):
        raise UserError(f"seeds must be a list of whole numbers, one per image, not {seeds!r}.", "Or write seed=….")
    return [whole(seed, f"seeds[{i}]", least=0) for i, seed in enumerate(seeds)]


def sampler_of(sampler: Any, steps: Any) -> SamplerSettings:
    """Settings of a sampler, from its name or settings and its steps.

    Raises:
        UserError: It is neither.
    """
    if isinstance(sampler, SchedulerMixin) or (isinstance(sampler, type) and issubclass(sampler, SchedulerMixin)):
        raise scheduler_refusal(sampler)
    if sampler is not None and not isinstance(sampler, (str, SamplerSettings)):
        raise UserError(f"sampler must be a name ({', '.join(SAMPLERS)}) or SamplerSettings, not {sampler!r}.")
    chosen = sampler if isinstance(sampler, SamplerSettings) else SamplerSettings(name=sampler or "dpmpp_2m")  # type: ignore[arg-type]
    return SamplerSettings(chosen.name, whole(chosen.steps if steps is None else steps, "steps", least=0), chosen.eta)


def rows_of(
    schema: Schema, fields: Mapping[str, Any], num_images: int | None, seeds: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Values by field for every image; a list gives a value per image.

    Raises:
        UserError: The class is given twice or is no field, or the numbers of images disagree.
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
    """Refuse guidance that is no number, no mapping to numbers and no settings.

    Raises:
        UserError: Says what guidance takes.
    """
    if guidance is None or isinstance(guidance, GuidanceSettings):
        return
    scales = list(guidance.values()) if isinstance(guidance, Mapping) else [guidance]
    if not all(isinstance(scale, numbers.Real) and not isinstance(scale, bool) for scale in scales):
        raise UserError(
            f"guidance must be a number, numbers by field, or GuidanceSettings, not {guidance!r}.",
            "guidance=2.0, or guidance={'class': 2.0}.",
        )
