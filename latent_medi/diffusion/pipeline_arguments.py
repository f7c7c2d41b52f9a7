"""Arguments of a pipeline's calls: checked, converted, and explained where other pipelines of diffusers differ."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.samplers import SAMPLERS, StepEnd
from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings
from latent_medi.latents.autoencoder import first_line
from latent_medi.metadata.schema import Schema
from latent_medi.shards.format.codec import SyntheticImage

_DTYPES = dict.fromkeys(("float32", "fp32"), torch.float32)
_DTYPES |= dict.fromkeys(("float16", "fp16", "half"), torch.float16)
_DTYPES |= dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16)

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
    "num_images_per_prompt": "Write num_images=….",
    "num_samples": "Write num_images=….",
    "batch_size": "Write num_images=… for how many, batch=… for how many at a time.",
    "prompt": "Write conditions by field, such as class_=….",
    "negative_prompt": "Write conditions by field, such as class_=….",
    "class_labels": "Write class_=…, a value by name.",
    "class_label": "Write class_=…, a value by name.",
    "eta": 'Write sampler=SamplerSettings("ddim", steps, eta).',
    "scheduler": "Write pipe.scheduler = …, or sampler=….",
    "latents": "pipe.generate_latents(conditions, noise) starts from given noise.",
    "height": "Leave it out: a model makes patches of one size.",
    "width": "Leave it out: a model makes patches of one size.",
    "return_dict": "Leave it out: the images are in pipe(…).images.",
    "callback": "Write callback_on_step_end=….",
    "callback_on_step_end_tensor_inputs": "Leave it out: callback_on_step_end is given the latents.",
    "cross_attention_kwargs": "Leave it out: the network attends to no text.",
}


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
        if name == "use_safetensors" and value is False:
            raise UserError("use_safetensors is False, but model folders hold safetensors; pickles are not opened.")
        if name in (*_DOWNLOAD, *_IGNORED, "use_safetensors") or value is None or value is False:
            continue
        known = ("autoencoder", "torch_dtype", "dtype", "device", "device_map", "scheduler", *_DOWNLOAD)
        raise UserError(f"from_pretrained takes no {name}: {_LOADING.get(name, nearest(name, known))}.")
    if given.get("revision") is not None and Path(folder).is_dir():
        raise UserError(f"revision is {given['revision']!r}, but {folder} is a local folder, which has none.")
    return {name: given[name] for name in _DOWNLOAD if given.get(name) is not None}


def arguments_of(call: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments but for those by any name."""
    return [name for name, p in signature(call).parameters.items() if p.kind != p.VAR_KEYWORD]


def fields_of(
    conditions: Mapping[str, Any] | None, keywords: Mapping[str, Any], arguments: Iterable[str], known: Sequence[str]
) -> dict[str, Any]:
    """Values by field, from ``conditions`` and from keywords that are no argument.

    Args:
        conditions: As given.
        keywords: Other keywords of the call.
        arguments: Names of the arguments.
        known: The model's fields.

    Raises:
        UserError: A field is given twice, a field's name could be meant as an argument, or a keyword is an argument of
            other pipelines.
    """
    if conditions is not None and not isinstance(conditions, Mapping):
        raise UserError(f"conditions must be values by field, not {conditions!r}.", "conditions={'class': '…'}")
    if conditions is None and (both := [name for name in arguments if name in known]):
        raise UserError(
            f"{both[0]} is a field of the model and an argument of the call.",
            f"Give all fields as conditions={{{both[0]!r}: …}}; then {both[0]}=… is the argument.",
        )
    fields = dict(conditions or {})
    if twice := [name for name in keywords if name in fields]:
        raise UserError(f"The field {twice[0]} is given twice, in conditions and as {twice[0]}=….")
    for name in keywords:
        if name in _CALL and name not in known:
            raise UserError(f"{name} is neither an argument nor a field of the model.", _CALL[name])
    return {**fields, **keywords}


def either(**given: Any) -> Any:
    """The one that is given of two names for an argument; ``None`` if neither is.

    Raises:
        UserError: Both are.
    """
    found = [name for name, value in given.items() if value is not None]
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} are the same argument.", "Give one of them.")
    return given[found[0]] if found else None


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


def seeds_of(seeds: Any, seed: Any, generator: Any) -> tuple[list[Any] | None, Any]:
    """What noise is drawn from: a seed or generator per image if a list is given, and the first seed or the generator.

    Raises:
        UserError: Seeds are no whole numbers, a generator is none of torch, or both are given.
    """
    first = whole(seed, "seed", least=0)
    if generator is not None:
        if seeds is not None or first:
            raise UserError("Seeds and a generator are given.", "Give one of them.")
        listed = list(generator) if isinstance(generator, (list, tuple)) else None
        for each in [generator] if listed is None else listed:
            if not isinstance(each, torch.Generator):
                raise UserError(f"generator must be a torch.Generator or a list of them, not {each!r}.")
        return listed, generator
    if seeds is None:
        return None, first
    if isinstance(seeds, (np.ndarray, torch.Tensor)):
        seeds = seeds.tolist()
    if not isinstance(seeds, (Sequence, range)) or isinstance(seeds, (str, bytes)):
        raise UserError(f"seeds must be a list of whole numbers, one per image, not {seeds!r}.", "Or write seed=….")
    return [whole(each, f"seeds[{i}]", least=0) for i, each in enumerate(seeds)], first


def sampler_of(sampler: Any, steps: Any, default: SamplerSettings) -> SamplerSettings:
    """Settings of a sampler, from its name or settings and its steps; ``default`` if no sampler is given.

    Raises:
        UserError: It is neither.
    """
    if sampler is not None and not isinstance(sampler, (str, SamplerSettings)):
        raise UserError(
            f"sampler must be a name ({', '.join(SAMPLERS)}) or SamplerSettings, not {sampler!r}.",
            "A scheduler of diffusers is set by pipe.scheduler = ….",
        )
    if isinstance(sampler, str):
        default = SamplerSettings(sampler)  # type: ignore[arg-type]
    chosen = sampler if isinstance(sampler, SamplerSettings) else default
    return SamplerSettings(chosen.name, whole(chosen.steps if steps is None else steps, "steps", least=0), chosen.eta)


def step_end_of(pipeline: Any, callback: Any) -> StepEnd | None:
    """diffusers' ``callback_on_step_end`` as the samplers call it.

    Raises:
        UserError: It is no function.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise UserError(f"callback_on_step_end must be a function, not {callback!r}.")

    def step_end(number: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        changed = callback(pipeline, number, timestep, {"latents": latents})
        if changed is not None and not isinstance(changed, Mapping):
            raise UserError(
                f"callback_on_step_end returned {type(changed).__name__}.", "Return {'latents': latents}, or nothing."
            )
        return latents if changed is None else changed.get("latents", latents)

    return step_end


def images_of(images: np.ndarray, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Images uint8 [N, H, W, 3] as "pil", "np" or "pt"."""
    if output_type == "pil":
        return [SyntheticImage.of(image) for image in images]
    scaled = images.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)


def rows_of(
    schema: Schema, fields: Mapping[str, Any], num_images: int | None, seeds: Sequence[Any] | None
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
        raise UserError(
            "num_images, seeds, generators and lists of values disagree about the number of images: "
            f"{', '.join(map(str, sorted(counts)))}."
        )
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
