"""The pipeline of a model: loading, saving, publishing, and images for conditions given by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image

from latent_medi.core.device import check_precision, exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path
from latent_medi.diffusion.adapters import attach, merge, open_adapter
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, lay_out
from latent_medi.diffusion.guidance import Guidance, check_guidance, guidance_of
from latent_medi.diffusion.model_card import model_card
from latent_medi.diffusion.model_folder import adapted_hash, complete_model, hash_model, read_model
from latent_medi.diffusion.objective import make_scheduler, settings_of
from latent_medi.diffusion.pipeline_arguments import (
    check_fields,
    check_guidance_argument,
    device_of,
    dtype_of,
    loading_options,
    rows_of,
    sampler_of,
    seeds_of,
    whole,
)
from latent_medi.diffusion.pipeline_base import PipelineBase
from latent_medi.diffusion.samplers import StepCallback, draw_noise, make_sampler, sample_latents
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import merge_records

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MediPipeline(PipelineBase):
    """A trained model: network, conditioner, noise schedule, autoencoder and the whitening of its latents.

    Args:
        unet: The network, with averaged weights.
        scheduler: Configuration of the noise schedule it was trained on.
        conditioning: ``None`` for an unconditional model.
        autoencoder: Decodes its latents into images.
        shift: fp32 [C]; subtracted from raw latents in training.
        scale: fp32 [C]; then divided by.
        objective: Its training objective, for further training; unset: derived from the scheduler.
        provenance: JSON-able facts about its training, such as the dataset's name and mpp.
    """

    _optional_components = ["conditioning"]  # noqa: RUF012 - the base class's convention
    unet: UNet2DModel
    scheduler: DDPMScheduler
    conditioning: MetadataConditioner | None
    model_cpu_offload_seq = "conditioning->unet"  # type: ignore[assignment]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        conditioning: MetadataConditioner | None = None,
        autoencoder: Autoencoder | None = None,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        objective: ObjectiveSettings | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if autoencoder is None or shift is None or scale is None:
            raise UserError(
                "A pipeline needs its autoencoder, and the shift and scale of its latents.",
                "MediPipeline.from_pretrained(folder) reads them; DiffusionPipeline does not.",
            )
        channels = unet.config["in_channels"]
        if channels != autoencoder.latent_channels or len(shift) != channels or len(scale) != channels:
            raise UserError(
                f"The network takes latents of {channels} channels; the autoencoder {autoencoder.source} has "
                f"{autoencoder.latent_channels}, shift {len(shift)} and scale {len(scale)}."
            )
        self.register_modules(unet=unet, scheduler=scheduler, conditioning=conditioning)
        self.autoencoder = autoencoder
        self.shift, self.scale = shift.float().cpu(), scale.float().cpu()
        self.objective = objective or settings_of(scheduler.config)
        self.provenance = dict(provenance or {})
        self._carries_autoencoder = False  # whether it was read from the model folder
        self.denoiser = Denoiser(unet, conditioning).eval()
        self._adapters: list[tuple[str, float]] = []  # hash and scale of each, in order
        self._base_hash = ""  # of the model without them

    @property
    def schema(self) -> Schema:
        """Its fields; none for an unconditional model."""
        return Schema() if self.conditioning is None else self.conditioning.schema

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config["in_channels"], height, width

    @property
    def patch_size(self) -> int:
        """Edge of an image in pixels."""
        return self.latent_shape[1] * self.autoencoder.factor

    @property
    def model_hash(self) -> str:
        """SHA-256 over all that images depend on: weights, fields, schedule, autoencoder, whitening, adapters."""
        if self._adapters:
            return adapted_hash(self._base_hash, self._adapters)
        unet = getattr(self.unet, "_orig_mod", self.unet)  # compiled or not
        return hash_model(unet, self.conditioning, self.scheduler.config, self.autoencoder.hash, self.shift, self.scale)

    # ---- adapters

    def load_adapter(self, folder: str | Path, scale: float = 1.0) -> None:
        """Stack a low-rank adapter on the model; values that it adds to a field can then be used as conditions.

        Args:
            folder: Its folder, or a hub id ``owner/name``.
            scale: Factor of its update of the network, 1 as trained; the vectors of added values are not scaled.

        Raises:
            UserError: It belongs to another model, adds a value that the model has, is damaged, or peft is not
                installed.
        """
        if not math.isfinite(scale):
            raise UserError(f"The scale of the adapter {folder} must be finite, not {scale}.")
        adapter, base = open_adapter(folder), self._base_hash or self.model_hash
        attach(adapter, self.denoiser, base, [*(s for _, s in self._adapters), float(scale)])
        self._base_hash = base
        self._adapters.append((adapter.hash, float(scale)))
        self.provenance = {**self.provenance, "seen": merge_records(self.provenance.get("seen"), adapter.seen)}

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """Hash and scale of every stacked adapter, in order."""
        return list(self._adapters)

    def merge_adapters(self) -> None:
        """Merge the adapters into the weights, so that the model can be saved; predictions change by rounding only."""
        if not self._adapters:
            return
        merge(self.unet)
        merged = [{"hash": digest, "scale": scale} for digest, scale in self._adapters]
        self.provenance = {**self.provenance, "merged_adapters": {"model": self._base_hash, "adapters": merged}}
        self._adapters, self._base_hash = [], ""

    def to(self, *args: Any, **kwargs: Any) -> MediPipeline:
        """Move the networks to a device (and the denoiser to a dtype)."""
        super().to(*args, **kwargs)
        self.autoencoder.to(self.unet.device)
        return self

    # ---- generating images

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        steps: int | None = None,
        sampler: str | SamplerSettings | None = None,
        guidance: float | Mapping[str, float] | GuidanceSettings | None = None,
        seeds: Sequence[int] | None = None,
        seed: int = 0,
        output_type: str = "pil",
        batch: int = 16,
        **fields: Any,
    ) -> ImagePipelineOutput:
        """Images for conditions given by name: ``pipe(class_="gleason4", site="radboud", num_images=4).images``.

        Args:
            num_images: Number of images; unset: as many as seeds or listed values, else 1.
            steps: Steps of the sampler.
            sampler: Its name or settings; DPM-Solver++ with 20 steps by default.
            guidance: One guidance scale for all fields or one by field (chain), or settings; none by default.
            seeds: One per image; unset: ``seed``, ``seed + 1``, …
            seed: Seed of the first image.
            output_type: "pil", or "np" for uint8 [n, H, W, 3].
            batch: Images at a time.
            fields: Value by field; ``class_`` is the class field, whatever its name. A list gives a value per image. A
                field that is left out is null, which the model must have been trained with.

        Raises:
            UserError: A field or value is unknown (names the closest), or the model was not trained for the conditions
                or the guidance.
        """
        if output_type not in ("pil", "np"):
            raise UserError(f"output_type is 'pil' or 'np', not {output_type!r}.")
        check_fields(list(fields), self.schema.names)
        check_guidance_argument(guidance)
        chosen, batch, first = sampler_of(sampler, steps), whole(batch, "batch"), whole(seed, "seed", least=0)
        given = None if seeds is None else seeds_of(seeds)
        count = None if num_images is None else whole(num_images, "num_images")
        rows = rows_of(self.schema, fields, count, given)
        seeds = list(range(first, first + len(rows))) if given is None else given
        noise, generators = draw_noise(seeds, self.latent_shape)
        latents = self.generate_latents(self.conditions(rows), noise, chosen, guidance_of(guidance), generators, batch)
        images = np.concatenate([self.decode(latents[i : i + batch]) for i in range(0, len(latents), batch)])
        return ImagePipelineOutput(images=[Image.fromarray(i) for i in images] if output_type == "pil" else images)

    def conditions(self, rows: Any) -> Conditions | None:
        """Conditions of rows of values by name; a field not given is null. ``None`` for an unconditional model.

        Raises:
            UserError: The model does not have a field or value.
        """
        if self.conditioning is not None:
            return Conditions.from_schema(self.schema, rows, absent="null")
        if named := sorted({str(n) for row in (rows if isinstance(rows, list) else [{}]) for n in row}):
            raise UserError(f"The model is unconditional; it has no field {', '.join(named)}.")
        return None

    @torch.no_grad()
    @exact_fp32()
    def generate_latents(
        self,
        conditions: Conditions | None,
        noise: torch.Tensor,
        sampler: SamplerSettings | None = None,
        guidance: Guidance | GuidanceSettings | None = None,
        generators: Sequence[torch.Generator] | None = None,
        batch: int | None = None,
        pad: bool = False,
        precision: str = "fp32",
        callback: StepCallback | None = None,
        keep_layout: bool = False,
    ) -> torch.Tensor:
        """Whitened latents of N samples.

        Args:
            conditions: Of N samples over :attr:`schema`; ``None`` for an unconditional model.
            noise: fp32 [N, C, h, w]; from :func:`~latent_medi.diffusion.samplers.draw_noise`.
            sampler: Sampler and steps.
            guidance: What guides the samples: the fields alone, or other models too.
            generators: One per sample, for samplers that add noise.
            batch: Samples at a time; unset: all.
            pad: Fill a short batch up to ``batch`` with copies of its last sample, so that a sample comes out bit for
                bit the same whatever else is generated.
            precision: Arithmetic inside the network: "fp32" (that of its weights), "bf16" or "fp16".
            callback: Called at each evaluation of the network.
            keep_layout: Leave the weights' memory layout as it is instead of taking the fastest, for weights that a
                training run shares.

        Returns:
            fp32 [N, C, h, w] on the CPU.

        Raises:
            UserError: The sampler does not support the model's objective, or the model was not trained for the
                conditions or the guidance.
        """
        guidance = Guidance.of(guidance)
        if precision not in _DTYPES:
            raise UserError(f"precision is 'fp32', 'bf16' or 'fp16', not {precision!r}.")
        check_precision(precision, self.unet.device)
        scheduler = make_sampler(self.scheduler.config, sampler or SamplerSettings())
        check_guidance(guidance.fields, self.conditioning, conditions)
        self.denoiser.eval()
        networks = [self.unet, *([] if guidance.weak is None else [guidance.weak.denoiser.unet])]
        for network in [] if keep_layout else networks:
            lay_out(network, half=precision != "fp32")
        count, device = len(noise), self.unet.device
        batch = batch or max(count, 1)
        parts = []
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            index = torch.arange(start, start + batch if pad else stop).clamp(max=stop - 1)
            drawn = None
            if generators is not None:
                # Copies that fill a batch get generators of their own, so that they do not draw from the last sample's.
                drawn = [*generators[start:stop], *(torch.Generator() for _ in range(len(index) - (stop - start)))]
            latents = sample_latents(
                self.denoiser,
                None if conditions is None else conditions.rows(index).to(device),
                noise[index].to(device),
                scheduler,
                guidance,
                drawn,
                dtype=_DTYPES[precision],
                callback=callback,
            )
            parts.append(latents[: stop - start].float().cpu())
        return torch.cat(parts) if parts else noise.float().cpu()

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Whitened latents fp32 [N, C, h, w] to images uint8 [N, H, W, 3]."""
        shift, scale = (v.view(-1, 1, 1).to(latents.device) for v in (self.shift, self.scale))
        return self.autoencoder.decode(latents.float() * scale + shift)

    def encode(self, images: np.ndarray, seeds: Sequence[int] | None = None) -> torch.Tensor:
        """Images uint8 [N, H, W, 3] to whitened latents fp32 [N, C, h, w]: the posterior mean, or a sample per seed."""
        mean, std = self.autoencoder.encode(images)
        mean = mean.cpu()
        if seeds is not None and std is not None:
            mean = mean + std.cpu() * draw_noise(seeds, mean.shape[1:])[0]
        return (mean - self.shift.view(-1, 1, 1)) / self.scale.view(-1, 1, 1)

    # ---- saving and loading

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, include_autoencoder: bool | None = None, **kwargs: Any
    ) -> None:
        """Write the model folder, at once or not at all; safetensors and JSON only.

        Args:
            save_directory: The folder; an older model there is replaced.
            include_autoencoder: Whether to store the autoencoder's weights with it; unset: if it was read from a model
                folder, or from a folder of this machine, which other machines do not have.
            kwargs: ``push_to_hub=True`` with ``repo_id`` and so on also publishes it.

        Raises:
            UserError: The folder holds something that is not a model, or adapters are stacked on the model.
        """
        folder = Path(save_directory)
        if self._adapters:
            raise UserError(
                "A model with stacked adapters cannot be saved; the adapters have folders of their own.",
                "Call merge_adapters() first.",
            )
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} is not empty and holds no model.", "Choose another folder.")
        push = kwargs.pop("push_to_hub", False)
        if kwargs.pop("safe_serialization", True) is not True:
            raise UserError("A model is written as safetensors only.")
        inside = self._carries_autoencoder or Path(self.autoencoder.source).is_dir()
        inside = inside if include_autoencoder is None else include_autoencoder
        with atomic_path(folder) as temporary:
            super().save_pretrained(str(temporary), safe_serialization=True)
            complete_model(temporary, self, model_card(self, folder.name), inside)
        if push:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        autoencoder: Autoencoder | str | Path | None = None,
        torch_dtype: torch.dtype | str | None = torch.float32,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> MediPipeline:
        """Load a model. Nothing that a folder names is imported, and no pickle is opened.

        Args:
            folder: Model folder, or a hub id ``owner/name``.
            autoencoder: The loaded autoencoder, or its name or folder; unset: that in the folder, else that of the
                training.
            torch_dtype: Precision of the denoiser's weights: fp32, fp16 or bf16, as a dtype or its name.
            device: Where to put everything.
            kwargs: As for other pipelines: ``dtype`` and ``device_map`` (one device) for the two above; ``cache_dir``,
                ``revision``, ``token``, ``local_files_only`` and ``force_download`` of a hub id.

        Raises:
            UserError: Something is absent or damaged, the autoencoder is not the one of the training, or an argument is
                not supported.
        """
        dtype = dtype_of(kwargs.pop("dtype", None) or torch_dtype)
        place = device_of(device, kwargs.pop("device_map", None))
        parts = read_model(folder, autoencoder, dtype, place, loading_options(folder, kwargs))
        carried = parts.pop("carried")
        pipeline = cls(**parts)
        pipeline._carries_autoencoder = carried
        return pipeline.to(place)

    @staticmethod
    def from_parts(
        denoiser: Denoiser,
        objective: ObjectiveSettings,
        autoencoder: Autoencoder,
        shift: torch.Tensor,
        scale: torch.Tensor,
        provenance: Mapping[str, Any] | None = None,
    ) -> MediPipeline:
        """The pipeline of a denoiser after training."""
        networks = denoiser.unet, make_scheduler(objective), denoiser.conditioner
        return MediPipeline(*networks, autoencoder, shift, scale, objective, provenance)


# DiffusionPipeline.from_pretrained looks up the class of a folder in diffusers, and finds this one, whose error says
# how to read the whole folder.
setattr(diffusers, MediPipeline.__name__, MediPipeline)
