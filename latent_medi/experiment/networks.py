"""The networks of an experiment's models before they are trained: their size, and what sampling them takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import settings_of
from latent_medi.diffusion.samplers import network_evaluations
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.models import Model
from latent_medi.metadata.schema import Schema
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.estimate.step_cost import build_denoiser
from latent_medi.training.settings import EstimateSettings, TrainSettings


@dataclass(frozen=True)
class Network:
    """A model's network.

    Args:
        settings: Its training settings; of a model that is trained already its folder alone, as ``init_from``.
        shape: (C, h, w) of a latent.
        schema: Its fields, or ``None``.
        on_meta: The network without memory for its weights; ``None`` where it cannot be known.
    """

    settings: EstimateSettings
    shape: tuple[int, int, int]
    schema: Schema | None
    on_meta: Denoiser | None

    @property
    def parameters(self) -> int:
        """Its parameters."""
        return sum(p.numel() for p in self.on_meta.parameters()) if self.on_meta is not None else 0

    def sampling(self, e: Experiment, model: Model) -> tuple[GenerateSettings, int]:
        """A model's sampling settings, and the evaluations of its network for one image."""
        settings = config.make(GenerateSettings, e.generation(model), "generate")
        objective = self.settings.objective
        if model.source is not None and model.source.scheduler is not None:
            objective = settings_of(model.source.scheduler)
        schema = self.schema or Schema(())
        each = network_evaluations(objective, settings.sampler, settings.guidance, schema)
        return settings, each + (settings.sampler.steps if settings.autoguidance.model else 0)


def network_of(
    e: Experiment, model: Model, shape: tuple[int, int, int] | None, schema: Schema | None, processes: int
) -> Network | None:
    """The network of a model; ``None`` where the shape of its latents is not known.

    Args:
        e: The experiment.
        model: The model.
        shape: (C, h, w) of a latent.
        schema: The dataset's fields, if they are known.
        processes: Devices that share its global batch.
    """
    if shape is None:
        return None
    if model.source is not None:
        known = model.source.conditioner.schema if model.source.conditioner is not None else None
        given = EstimateSettings(init_from=str(model.folder), max_steps=1, processes=processes)
        return Network(given, shape, known, _built(given, shape, known))
    own = config.make(TrainSettings, model.training or {}, model.name)
    settings = EstimateSettings(**{f.name: getattr(own, f.name) for f in fields(own)}, processes=processes)
    names = model.fields
    if schema is not None:
        schema = schema if names is None else schema.subset([n for n in schema.named(names) if n in schema.names])
    known = schema if schema is not None and schema.fields else None
    first = model
    while first.parent is not None:
        first = first.parent
    architecture = settings
    if first is not model and first.source is None:  # whose folder is yet to be made
        root = config.make(TrainSettings, first.training or {}, first.name)
        architecture = replace(settings, init_from="", model=root.model, lora=None, train_parts=None, override=[])
    elif first.source is not None:
        architecture = replace(settings, init_from=str(first.folder))
    return Network(architecture, shape, known, _built(architecture, shape, known))


def _built(settings: EstimateSettings, shape: tuple[int, int, int], schema: Schema | None) -> Denoiser | None:
    try:
        with torch.device("meta"):
            return build_denoiser(settings, shape, schema)
    except UserError:  # the checks before the first stage say what is wrong
        return None
