"""From samples of a plan to images: batches, guidance models, and smaller batches when a device's memory is full."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from latent_medi.core.device import HalvedBatch, check_precision
from latent_medi.core.errors import UserError
from latent_medi.diffusion.guidance import Autoguidance, ClassifierGuidance, Guidance, evaluations
from latent_medi.diffusion.objective import settings_of
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.latent_classifier.network import LatentClassifier
from latent_medi.metadata.schema import Field, Schema
from latent_medi.metadata.training_record import merge_records
from latent_medi.planning.plan import Sample
from latent_medi.sampling.settings import GenerateSettings


class ImageSampler:
    """Generates images of samples. Each depends on the model, the settings, its condition and its own seed alone.

    Args:
        pipeline: The model, on its device.
        settings: Sampler, guidance, batch and precision.

    Attributes:
        seen: Record of the combinations that the model and its guidance models were trained on, see
            :mod:`latent_medi.metadata.training_record`.

    Raises:
        UserError: A guidance model does not fit the model, or the GPU does not have the precision.
    """

    def __init__(self, pipeline: MediPipeline, settings: GenerateSettings) -> None:
        check_precision(settings.precision, pipeline.unet.device)
        self.pipeline, self.settings = pipeline, settings
        remedy = "Use precision=bf16, fewer guidance branches, or another device."
        self._batches = HalvedBatch("sampling", remedy, settings.device_batch)
        self.weak: Autoguidance | None = None
        self._weak_hash = ""
        shown = [pipeline.provenance.get("seen")]
        if settings.autoguidance.model:
            # On the same device, since the autoencoder, which the two share, goes where the second is put.
            other = MediPipeline.from_pretrained(
                settings.autoguidance.model, autoencoder=pipeline.autoencoder, device=pipeline.unet.device
            )
            check_weaker(pipeline, other, settings.autoguidance.model)
            self.weak = Autoguidance(other.denoiser, settings.autoguidance.scale, settings.autoguidance.interval)
            self._weak_hash = other.model_hash
            shown.append(other.provenance.get("seen"))

        self.classifier: LatentClassifier | None = None
        if settings.classifier.model:
            self.classifier = LatentClassifier.from_pretrained(settings.classifier.model, pipeline.unet.device)
            self.classifier.check_model(pipeline)
            shown.append(self.classifier.provenance.get("seen"))
            self._guidance(self.classifier.values[:1])  # refuses a wrong interval now

        self.seen = merge_records(*shown)

    @property
    def schema(self) -> Schema:
        """The fields that a plan may give: the model's, and the classifier's."""
        known = self.pipeline.schema
        if self.classifier is None or self.classifier.field in known.names:
            return known
        kind: Literal["class", "categorical"] = "categorical" if known.class_field else "class"
        return Schema((Field(self.classifier.field, kind, self.classifier.values), *known.fields))

    def _guidance(self, values: Sequence[str]) -> ClassifierGuidance:
        assert self.classifier is not None
        chosen = self.settings.classifier
        return ClassifierGuidance(self.classifier.log_probability(values), chosen.scale, chosen.interval)

    def check_classifier_values(self, plan: pd.DataFrame) -> None:
        """Check that each row of a plan has a value that the classifier can guide to.

        Raises:
            UserError: Names the first row without one.
        """
        if self.classifier is None:
            return
        name = self.classifier.field
        values = plan[name] if name in plan.columns else pd.Series("", index=plan.index)
        for i, (value, count) in enumerate(zip(values, plan["count"], strict=True), 1):
            if count and value not in self.classifier.values:
                raise UserError(
                    f"The plan, row {i}: {name} is {value!r}, and the classifier guides to "
                    f"{', '.join(self.classifier.values)}.",
                    f"Give the plan a column {name} with these values, or leave out classifier.model.",
                )

    def description(self) -> dict[str, Any]:
        """Everything but the plan and the model that the images depend on, JSON-able."""
        guidance = json.loads(json.dumps(asdict(self.settings.guidance)))  # lists instead of tuples, as JSON is read
        if not guidance["rescale"]:
            del guidance["rescale"]  # earlier versions had none; their unfinished folders can still be completed
        described: dict[str, Any] = {"sampler": asdict(self.settings.sampler), "guidance": guidance}
        if self.weak is not None:
            interval = list(self.weak.interval)
            described["autoguidance"] = {"model": self._weak_hash, "scale": self.weak.scale, "interval": interval}
        if self.classifier is not None:
            chosen = self.settings.classifier
            described["classifier"] = {
                "model": self.classifier.hash,
                "field": self.classifier.field,
                "scale": chosen.scale,
                "interval": list(chosen.interval),
            }
        return described

    def cost_text(self) -> str:
        """The work per image, in words."""
        sampler, guidance = self.settings.sampler, self.settings.guidance
        branches = evaluations(guidance, self.pipeline.schema)
        low, high = guidance.interval
        words = f"{sampler.name}, {sampler.steps} steps, {branches} evaluation{'s' if branches > 1 else ''} per step"
        if branches > 1:
            words += f" (guidance {guidance.form}" + (f", ᾱ {low:g} to {high:g})" if (low, high) != (0, 1) else ")")
        words += ", one more of the weaker model" if self.weak is not None else ""
        return words + (f", the classifier of {self.classifier.field}" if self.classifier is not None else "")

    def images(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
        """Each sample with its image, uint8 [H, W, 3], in their order.

        When memory is full, the batch is halved and its samples are generated again. In fp32 they then differ by one
        grey level at most; in bf16 and fp16 by more, though not visibly.

        Raises:
            UserError: Memory is too small for a single image.
        """
        for part, images in self._batches.over(len(samples), lambda part, size: self._batch(samples[part], size)):
            yield from zip(samples[part], images, strict=True)

    def _batch(self, part: Sequence[Sample], size: int) -> np.ndarray:
        pipeline, settings = self.pipeline, self.settings
        noise, generators = draw_noise([sample.seed for sample in part], pipeline.latent_shape)
        names, guidance = pipeline.schema.names, None
        if self.classifier is not None:
            values = [str(sample.fields[self.classifier.field]) for sample in part]
            guidance = self._guidance([*values, *values[-1:] * (size - len(part))])
        conditions = [{name: value for name, value in sample.fields.items() if name in names} for sample in part]
        latents = pipeline.generate_latents(
            pipeline.conditions(conditions),
            noise,
            settings.sampler,
            Guidance(settings.guidance, self.weak, guidance),
            generators,
            batch=size,
            pad=True,
            precision=settings.precision,
        )
        # The decoder also gets full batches, since a kernel may round differently for another batch size.
        filled = latents[torch.arange(size).clamp(max=len(part) - 1)]
        return pipeline.decode(filled.to(pipeline.unet.device))[: len(part)]


def check_weaker(strong: MediPipeline, weak: MediPipeline, name: str) -> None:
    """Check that a weaker model has the same latents, noise schedule and fields as the model that it guides.

    Raises:
        UserError: Names what differs.
    """
    same = {
        "whitening of the latents": torch.equal(strong.shift, weak.shift) and torch.equal(strong.scale, weak.scale),
        "noise schedule": settings_of(strong.scheduler.config) == settings_of(weak.scheduler.config),
        "fields": strong.schema == weak.schema,
        "shape of latents": strong.latent_shape == weak.latent_shape,
    }
    if different := [what for what, equal in same.items() if not equal]:
        raise UserError(
            f"{name} cannot guide this model: another {' and another '.join(different)}.",
            "A weaker version of the same model can: `latent-medi average` writes one.",
        )
