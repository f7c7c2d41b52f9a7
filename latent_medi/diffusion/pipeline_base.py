"""The base of a pipeline: its components can be set, listed and shared as in other pipelines of diffusers."""

from __future__ import annotations

from typing import Any, Self

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from latent_medi.core.errors import UserError
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.pipeline_arguments import dtype_of, loading_options, scheduler_refusal


class PipelineBase(DiffusionPipeline):
    """A diffusers pipeline of a denoiser and its adapters."""

    _adapters: list[tuple[str, float]]
    _base_hash: str
    _carries_autoencoder: bool

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component, such as ``pipe.unet = torch.compile(pipe.unet)``.

        Raises:
            UserError: It is a scheduler, which does not choose the sampler here; or a network under stacked adapters.
        """
        made = "denoiser" in self.__dict__
        if made and name == "scheduler" and value is not self.scheduler:
            raise scheduler_refusal(value)
        if made and name in ("unet", "conditioning"):
            if self._adapters:
                raise UserError(f"{name} cannot be set under stacked adapters.", "Call merge_adapters() first.")
            parts = {"unet": self.unet, "conditioning": self.conditioning, name: value}
            super().__setattr__("denoiser", Denoiser(parts["unet"], parts["conditioning"]).eval())
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of another pipeline of the same model: ``MediPipeline(**pipe.components)``."""
        names = ("unet", "scheduler", "conditioning", "autoencoder", "shift", "scale", "objective", "provenance")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Another pipeline of the same weights, stacked adapters included.

        Args:
            pipeline: A pipeline of this class.
            kwargs: ``torch_dtype``, as for :meth:`from_pretrained`.

        Raises:
            UserError: It is a pipeline of another class, or an argument is not supported.
        """
        if not isinstance(pipeline, PipelineBase):
            raise UserError(f"A {type(pipeline).__name__} is no MediPipeline.", "Use MediPipeline.from_pretrained.")
        wanted = [kwargs.pop(name, None) for name in ("torch_dtype", "dtype")]
        loading_options("", kwargs)
        made = cls(**pipeline.components)
        made._adapters, made._base_hash = list(pipeline._adapters), pipeline._base_hash
        made._carries_autoencoder = pipeline._carries_autoencoder
        return made.to(dtype_of(wanted[0] or wanted[1])) if any(wanted) else made
