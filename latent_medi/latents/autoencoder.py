"""The frozen autoencoder: uint8 images to raw posterior moments, raw latents to uint8 images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latent_medi.core.checksums import verify_checksums, write_checksums
from latent_medi.core.device import HalvedBatch, check_precision, exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_json, read_object, write_json
from latent_medi.core.hub import is_hub_id
from latent_medi.core.json_types import check_config, check_types
from latent_medi.latents.networks import (
    KINDS,
    Moments,
    check_kind,
    deterministic,
    factor_of,
    moments_of,
    pixels_of,
    to_images,
    weight_hash,
)
from latent_medi.latents.taef2 import DECODER_FILE, ENCODER_FILE, AutoencoderTAEF2

HUB_NAMES = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse", "taesd": "madebyollin/taesd"}
"""Short names of autoencoders on the model hub."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type in which an autoencoder runs, by precision."""

DECODED_PIXELS = 8 * 256 * 256
"""Most pixels that a GPU decodes at a time: Stable Diffusion's decoder takes 1.5 GiB for 8 patches of 256 px, 12 for
64."""

_REMEDY = "Use precision=bf16, smaller patches, or another device."

PROVENANCE_FILE = "provenance.json"
"""File in the folder of an autoencoder that was trained here: what it was made from."""

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Autoencoder:
    """A frozen autoencoder. Raw latents are those of the model, without a scaling factor.

    If the memory of a device is full, the batch is halved from then on. In fp32 this changes rounding only, as does any
    other batch size.

    Args:
        model: An AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderTAEF2.
        source: Name, hub id or folder from which it was loaded.
        latents_of: See the attribute.

    Attributes:
        source: As given.
        kind: Class name of the model.
        hash: SHA-256 over its weights as fp32, for any precision.
        latent_channels: Channels C of a latent.
        factor: Pixels per latent pixel along an edge.
        deterministic: Whether it gives a latent instead of a posterior.
        latents_of: Hashes of the autoencoders from which its decoder alone was trained: it decodes their latents too.
        slicing: Whether it takes patches one by one, independent of the batch; set by :meth:`enable_slicing`.
    """

    def __init__(self, model: Any, source: str, latents_of: Sequence[str] = ()) -> None:
        self.kind = type(model).__name__
        check_kind(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.source = source
        self.hash, self.latents_of = weight_hash(model), list(latents_of)
        self.latent_channels = int(self.model.config["latent_channels"])
        self.factor = factor_of(self.model)
        self.deterministic = deterministic(model)
        self.slicing = False
        self._encoding, self._decoding = HalvedBatch("encoding", _REMEDY), HalvedBatch("decoding", _REMEDY)

    @property
    def device(self) -> torch.device:
        """Device on which it runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which it runs."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Autoencoder:
        """Move it to a device, a precision, or both; its hash stays the same."""
        self.model.to(device=device)
        if dtype is not None and dtype != self.dtype:
            nn.Module.to(self.model, dtype=dtype)  # diffusers' own warns about fp32 layers, but there are none
        return self

    def enable_slicing(self) -> Autoencoder:
        """Take patches one by one from now on, which needs the memory of one patch.

        Tiling, diffusers' other way to save memory, is not offered. It changes the latents of patches above the
        autoencoder's own size, because each tile is normalised separately, and has no effect on smaller patches.
        """
        self.slicing = True
        if hasattr(self.model, "enable_slicing"):
            self.model.enable_slicing()
        return self

    def _run(self, work: Callable[[torch.Tensor], Moments], x: torch.Tensor) -> Moments:
        """The result of ``work`` for all of ``x``, or for one after the other, as TAEF2 has no slicing of its own."""
        if not self.slicing or len(x) < 2 or self.kind != "AutoencoderTAEF2":
            return work(x)
        return torch.cat([work(one)[0] for one in x.split(1)]), None

    @property
    def description(self) -> dict[str, Any]:
        """The facts that identify it, JSON-able."""
        names = ("source", "kind", "hash", "latent_channels", "factor", "deterministic")
        found = {name: getattr(self, name) for name in names}
        return {**found, "latents_of": self.latents_of} if self.latents_of else found

    @torch.no_grad()
    @exact_fp32()
    def encode(self, images: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Posterior moments of images.

        Args:
            images: uint8 [n, H, W, 3], RGB, H and W multiples of :attr:`factor`.

        Returns:
            Mean fp32 [n, C, h, w], and standard deviation of the same shape or ``None`` for a deterministic
            autoencoder.

        Raises:
            UserError: Images have another shape or type, or the memory is too small for one of them.
        """
        if isinstance(images, np.ndarray) and not images.flags.writeable:
            images = images.copy()  # torch warns about read-only memory
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise UserError(f"Images to encode must be uint8 [n, H, W, 3], not {pixels.dtype} {list(pixels.shape)}.")
        if pixels.shape[1] % self.factor or pixels.shape[2] % self.factor:
            raise UserError(
                f"{pixels.shape[2]}×{pixels.shape[1]} images cannot be encoded: edges are multiples of {self.factor}."
            )
        if not len(pixels):
            shape = (0, self.latent_channels, pixels.shape[1] // self.factor, pixels.shape[2] // self.factor)
            none = torch.empty(shape, device=self.device)
            return none, None if self.deterministic else none
        parts = [m for _, m in self._encoding.over(len(pixels), lambda part, _: self._moments(pixels[part]))]
        if len(parts) == 1:
            return parts[0]
        stds = [std for _, std in parts if std is not None]
        return torch.cat([mean for mean, _ in parts]), torch.cat(stds) if stds else None

    def _moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = self._run(lambda part: moments_of(self.model, part, self.dtype), x)
        return mean.contiguous(), None if std is None else std.contiguous()

    @torch.no_grad()
    @exact_fp32()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images of raw latents fp32 [n, C, h, w]: uint8 [n, H, W, 3], rounded and clamped.

        A GPU decodes at most :data:`DECODED_PIXELS` at a time, independent of the batch of latents. The last part is
        padded, because a kernel may round differently for another number of patches.

        Raises:
            UserError: A pixel is not finite, or the memory is too small for one image.
        """
        height, width = (edge * self.factor for edge in latents.shape[-2:])
        if not len(latents):
            return np.empty((0, height, width, 3), np.uint8)
        most = 0 if self.device.type == "cpu" else max(1, DECODED_PIXELS // (height * width))
        parts = self._decoding.over(len(latents), lambda part, size: self._images(latents[part], size), most)
        return np.concatenate([images for _, images in parts])

    def _images(self, latents: torch.Tensor, size: int) -> np.ndarray:
        """Images of a part of the latents, padded to ``size`` for decoding."""
        count = len(latents)
        if count < size:
            latents = latents[torch.arange(size, device=latents.device).clamp(max=count - 1)]
        z = latents.to(device=self.device, dtype=self.dtype)
        x, _ = self._run(lambda part: (pixels_of(self.model, part), None), z)
        if not torch.isfinite(x).all():
            raise UserError(
                f"The autoencoder {self.source} gives pixels that are not finite in {self.dtype}.", "Run it in fp32."
            )
        return to_images(x[:count])


def in_own_memory(model: Any) -> Any:
    """The model with its weights copied out of the memory-mapped file, in place.

    Weights in a safetensors file are not aligned. On some processors matrix products of unaligned memory round
    differently, so a model read from disk would not reproduce the bits of the model that was written.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def latent_shape(autoencoder: Autoencoder, patch_size: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latent of a patch of ``patch_size`` pixels along an edge.

    Raises:
        UserError: The autoencoder does not take patches of this size.
    """
    if patch_size % autoencoder.factor:
        raise UserError(
            f"{autoencoder.source} takes patches of a multiple of {autoencoder.factor} px, not {patch_size} px."
        )
    size = patch_size // autoencoder.factor
    return autoencoder.latent_channels, size, size


def demo_folder() -> Path:
    """The folder of the demo's autoencoder, which the package includes."""
    return Path(__file__).resolve().parents[1] / "demo" / "weights" / "autoencoder"


def load_autoencoder(
    name_or_folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
        name_or_folder: "demo"; a short name of :data:`HUB_NAMES`; a folder with ``config.json`` and safetensors, or
            with the two TAEF2 files; or a hub id ``owner/name``. A folder takes precedence over a hub id.
        device: Device on which it runs.
        dtype: Precision in which it runs.

    Raises:
        UserError: It is not on this machine and cannot be downloaded (says how to get it), or its kind is not
            supported; or the GPU does not support the precision.
    """
    check_precision(dtype, device)
    name = str(name_or_folder)
    source, latents_of = name, []
    if name == "demo":
        model = _from_folder(demo_folder())
    elif Path(name).is_dir() and name not in HUB_NAMES:
        model, source = _from_folder(Path(name)), str(Path(name).resolve())
        latents_of = _latents_of(Path(name))
    elif name in HUB_NAMES or is_hub_id(name):
        model = _from_hub(name, HUB_NAMES.get(name, name))
    else:
        known = ", ".join(["demo", *HUB_NAMES])
        raise UserError(
            f"There is no autoencoder {name!r}: no such folder.",
            f"Give a folder, a hub id owner/name, or one of {known}.",
        )
    return Autoencoder(model, source, latents_of).to(device, dtype)


def _latents_of(folder: Path) -> list[str]:
    """Hashes of the autoencoders whose latents the one in a folder decodes too, from its provenance."""
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return []
    provenance = read_object(file)
    check_types(provenance, {"latents_of?": [str]}, file, "Copy the whole folder again.")
    return list(provenance.get("latents_of", []))


def _from_folder(folder: Path) -> nn.Module:
    verify_checksums(folder, "Copy the whole folder again.")  # folders of other programs have none
    if (folder / ENCODER_FILE).is_file() or (folder / DECODER_FILE).is_file():
        return AutoencoderTAEF2.from_state_dicts(folder / ENCODER_FILE, folder / DECODER_FILE)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no autoencoder: it has no config.json.",
            f"It needs config.json and {WEIGHTS_FILE}, or {ENCODER_FILE} and {DECODER_FILE}.",
        )
    kind = read_object(folder / "config.json").get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{folder} holds a {kind}, which is not a supported autoencoder; supported are {', '.join(KINDS)}."
        )
    check_config(folder / "config.json", KINDS[kind], "Copy the whole folder again.")
    # Files of other names would be pickles, which are never opened.
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}; pickled weights are not loaded.", "Convert the weights to safetensors."
        )
    try:
        model, loading = KINDS[kind].from_pretrained(
            str(folder), use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a wrong entry of its configuration raises any kind of error
        raise UserError(f"The autoencoder in {folder} cannot be loaded: {error}") from None
    refuse_missing(loading, folder)
    return in_own_memory(model)


def refuse_missing(loading: dict[str, Any], folder: Path) -> None:
    """Refuse a network whose files lack some weights, which diffusers would leave random.

    Args:
        loading: The loading info of ``from_pretrained``.
        folder: Folder of the network.

    Raises:
        UserError: Names the first missing weight.
    """
    if gone := sorted(loading["missing_keys"]):
        raise UserError(
            f"The weights in {folder} lack {len(gone)} tensors that its config.json needs, such as {gone[0]}.",
            "Copy the whole folder again.",
        )


def _from_hub(name: str, hub_id: str) -> nn.Module:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, allow_patterns=["config.json", WEIGHTS_FILE])
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"The autoencoder {name!r} ({hub_id}) is not on this machine and cannot be downloaded: {first_line(error)}",
            f"On a machine with a network, run `hf download {hub_id} config.json {WEIGHTS_FILE} --local-dir FOLDER`. "
            "Copy FOLDER to this machine, and give its path as the autoencoder.",
        ) from None
    return _from_folder(Path(folder))


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_autoencoder(autoencoder: Autoencoder, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a folder that :func:`load_autoencoder` reads, in its current precision, at once or not at all.

    Args:
        autoencoder: The autoencoder.
        folder: Folder to write.
        provenance: What it was made from, JSON-able; written with it as :data:`PROVENANCE_FILE`.
    """
    with atomic_path(folder) as temporary:
        autoencoder.model.save_pretrained(str(temporary), safe_serialization=True)
        forget_path(temporary / "config.json")
        if provenance is not None or autoencoder.latents_of:
            known = {"latents_of": autoencoder.latents_of} if autoencoder.latents_of else {}
            write_json(temporary / PROVENANCE_FILE, {**known, **(provenance or {})})
        write_checksums(temporary)


def forget_path(config: Path) -> None:
    """Remove the path from which a component was loaded, because equal models must have equal files."""
    values = read_json(config)
    if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
        write_json(config, values)
