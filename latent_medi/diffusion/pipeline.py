"""The pipeline of a model: loading, saving, publishing, and images for conditions given by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from latent_medi.core.device import check_precision, exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.diffusion.adapters import attach, merge, open_adapter
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, lay_out
from latent_medi.diffusion.guidance import Guidance, check_guidance, guidance_of
from latent_medi.diffusion.model_folder import adapted_hash, hash_model, read_model
from latent_medi.diffusion.objective import settings_of
from latent_medi.diffusion.pipeline_arguments import (
    arguments_of,
    check_guidance_argument,
    device_of,
    dtype_of,
    either,
    fields_of,
    images_of,
    loading_options,
    rows_of,
    sampler_of,
    seeds_of,
    step_end_of,
    whole,
)
from latent_medi.diffusion.pipeline_base import PipelineBase
from latent_medi.diffusion.samplers import (
    StepCallback,
    StepEnd,
    draw_noise,
    make_sampler,
    sample_latents,
    scheduler_of,
)
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import merge_records

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MediPipeline(PipelineBase):
    """A trained model: network, conditioner, noise schedule, autoencoder and the whitening of its latents.

    Args:
        unet: The network, with averaged weights.
        scheduler: What samples unless a call names another sampler, on the noise schedule of the training.
        conditioning: ``None`` for an unconditional model.
        autoencoder: Decodes its latents into images.
        shift: fp32 [C]; subtracted from raw latents in training.
        scale: fp32 [C]; then divided by.
        objective: Its training objective, for further training; unset: derived from the scheduler.
        provenance: JSON-able facts about its training, such as the dataset's name and mpp.
    """

    _optional_components = ["conditioning"]  # noqa: RUF012 - the base class's convention
    unet: UNet2DModel
    conditioning: MetadataConditioner | None
    model_cpu_offload_seq = "conditioning->unet"  # type: ignore[assignment]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any,
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
                "`from latent_medi import MediPipeline`, then MediPipeline.from_pretrained(folder) reads all of it; "
                "DiffusionPipeline.from_pretrained does not.",
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
        conditions: Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        **fields: Any,
    ) -> ImagePipelineOutput:
        """Images for conditions given by name: ``pipe(class_="gleason4", site="radboud", num_images=4).images``.

        Args:
            num_images: Number of images; unset: as many as seeds, generators or listed values, else 1.
            steps: Steps of the sampler; 20 by default.
            sampler: Its name or settings; unset: what ``pipe.scheduler`` is, DPM-Solver++ by default.
            guidance: One guidance scale for all fields or one by field (chain), or settings; none by default.
            seeds: One per image; unset: ``seed``, ``seed + 1``, …
            seed: Seed of the first image.
            output_type: "pil", whose files are marked as synthetic; "np" for fp32 [n, H, W, 3] and "pt" for fp32
                [n, 3, H, W], from 0 to 1; or "latent" for whitened latents fp32 [n, C, h, w], which
                :meth:`decode` takes.
            batch: Images at a time.
            conditions: Values by field, for fields with any name.
            num_inference_steps: diffusers' name of ``steps``.
            guidance_scale: diffusers' name of ``guidance``.
            generator: In place of seeds: one generator that all images draw from in turn, or one per image.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, {"latents": latents})`` after every
                evaluation of the network on a batch; may return the mapping with other latents.
            fields: Value by field; ``class_`` is the class field, whatever its name. A list gives a value per image. A
                field that is left out is null, which the model must have been trained with.

        Raises:
            UserError: A field or value is unknown (names the closest), or the model was not trained for the conditions
                or the guidance.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type is 'pil', 'np', 'pt' or 'latent', not {output_type!r}.")
        fields = fields_of(conditions, fields, arguments_of(MediPipeline.__call__), self.schema.names)
        scales = either(guidance=guidance, guidance_scale=guidance_scale)
        check_guidance_argument(scales)
        chosen = sampler_of(sampler, either(steps=steps, num_inference_steps=num_inference_steps), self.default_sampler)
        batch, count = whole(batch, "batch"), None if num_images is None else whole(num_images, "num_images")
        listed, first = seeds_of(seeds, seed, generator)
        rows = rows_of(self.schema, fields, count, listed)
        if listed is None:
            listed = [first + i if generator is None else generator for i in range(len(rows))]
        noise, generators = draw_noise(listed, self.latent_shape)
        latents = self.generate_latents(
            self.conditions(rows),
            noise,
            chosen,
            guidance_of(scales),
            generators,
            batch,
            step_end=step_end_of(self, callback_on_step_end),
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)  # type: ignore[arg-type]
        images = np.concatenate([self.decode(latents[i : i + batch]) for i in range(0, len(latents), batch)])
        return ImagePipelineOutput(images=images_of(images, output_type))  # type: ignore[arg-type]

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
        step_end: StepEnd | None = None,
    ) -> torch.Tensor:
        """Whitened latents of N samples.

        Args:
            conditions: Of N samples over :attr:`schema`; ``None`` for an unconditional model.
            noise: fp32 [N, C, h, w]; from :func:`~latent_medi.diffusion.samplers.draw_noise`.
            sampler: Sampler and steps; unset: :attr:`default_sampler`.
            guidance: What guides the samples: the fields alone, or other models too.
            generators: One per sample, for samplers that add noise.
            batch: Samples at a time; unset: all.
            pad: Fill a short batch up to ``batch`` with copies of its last sample, so that a sample comes out bit for
                bit the same whatever else is generated.
            precision: Arithmetic inside the network: "fp32" (that of its weights), "bf16" or "fp16".
            callback: Called at each evaluation of the network.
            keep_layout: Leave the weights' memory layout as it is instead of taking the fastest, for weights that a
                training run shares.
            step_end: Called after each evaluation of the network on a batch; returns the latents to go on with.

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
        scheduler = make_sampler(self.scheduler.config, sampler or self.default_sampler)
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
                step_end=step_end,
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

    # ---- loading

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
            kwargs: As for other pipelines: ``dtype`` and ``device_map`` (one device) for the two above; ``scheduler``;
                ``cache_dir``, ``revision``, ``token``, ``local_files_only`` and ``force_download`` of a hub id.

        Raises:
            UserError: Something is absent or damaged, the autoencoder is not the one of the training, or an argument is
                not supported.
        """
        dtype = dtype_of(kwargs.pop("dtype", None) or torch_dtype)
        place, sampler = device_of(device, kwargs.pop("device_map", None)), kwargs.pop("scheduler", None)
        parts = read_model(folder, autoencoder, dtype, place, loading_options(folder, kwargs))
        carried = parts.pop("carried")
        parts["scheduler"] = scheduler_of(settings_of(parts["scheduler"].config), SamplerSettings.name)
        pipeline = cls(**parts)
        if sampler is not None:
            pipeline.scheduler = sampler
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
        networks = denoiser.unet, scheduler_of(objective, SamplerSettings.name), denoiser.conditioner
        return MediPipeline(*networks, autoencoder, shift, scale, objective, provenance)


# DiffusionPipeline.from_pretrained looks up the class of a folder in diffusers, and finds this one, whose error says
# how to read the whole folder.
setattr(diffusers, MediPipeline.__name__, MediPipeline)
