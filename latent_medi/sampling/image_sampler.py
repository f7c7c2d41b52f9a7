"""From samples to images: batches, guides, and what happens when a device's memory is full."""

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
from latent_medi.diffusion.guidance import Autoguidance, ClassifierGuidance, evaluations
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.latent_classifier.network import LatentClassifier
from latent_medi.metadata.schema import Field, Schema
from latent_medi.metadata.seen import together
from latent_medi.planning.plan import Sample
from latent_medi.sampling.settings import GenerateSettings


class Maker:
    """Makes the images of samples, each a function of the model, the settings, its condition and its own seed.

    Args:
        pipeline: The model, on its device.
        settings: Sampler, guidance, batch and precision.

    Attributes:
        seen: Which combinations the model and what guides it were shown, see :mod:`latent_medi.metadata.seen`.

    Raises:
        UserError: A guide that does not go with the model, or a precision that the GPU does not have.
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
            self._guide(self.classifier.values[:1])  # a wrong interval is told now

        self.seen = together(*shown)

    @property
    def schema(self) -> Schema:
        """The fields that a plan may give: the model's, and the classifier's."""
        known = self.pipeline.schema
        if self.classifier is None or self.classifier.field in known.names:
            return known
        kind: Literal["class", "categorical"] = "categorical" if known.class_field else "class"
        return Schema((Field(self.classifier.field, kind, self.classifier.values), *known.fields))

    def _guide(self, wanted: Sequence[str]) -> ClassifierGuidance:
        assert self.classifier is not None
        chosen = self.settings.classifier
        return ClassifierGuidance(self.classifier.log_probability(wanted), chosen.scale, chosen.interval)

    def check_wanted(self, plan: pd.DataFrame) -> None:
        """Refuse a plan whose rows do not say what the classifier is to guide to.

        Raises:
            UserError: Names the first such row.
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
        """What the images depend on beside the plan and the model, JSON-able."""
        guidance = json.loads(json.dumps(asdict(self.settings.guidance)))  # with lists, as it will be read again
        if not guidance["rescale"]:
            del guidance["rescale"]  # as it was before there was one: a folder that was begun then goes on
        described: dict[str, Any] = {"sampler": asdict(self.settings.sampler), "guidance": guidance}
        if self.weak is not None:
            interval = list(self.weak.interval)
            described["autoguidance"] = {"model": self._weak_hash, "scale": self.weak.scale, "interval": interval}
        if self.classifier is not None:
            chosen = self.settings.classifier
            described["classifier"] = {
                "model": self.classifier.hash, "field": self.classifier.field, "scale": chosen.scale,
                "interval": list(chosen.interval),
            }  # fmt: skip
        return described

    def told(self) -> str:
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

        A full memory halves the batch, and the same samples are made again. In fp32 they then differ by a grey level
        at most; in bf16 and fp16 they look alike.

        Raises:
            UserError: The memory is too small for a single image.
        """
        for part, images in self._batches.over(len(samples), lambda part, size: self._batch(samples[part], size)):
            yield from zip(samples[part], images, strict=True)

    def _batch(self, part: Sequence[Sample], size: int) -> np.ndarray:
        pipeline, settings = self.pipeline, self.settings
        noise, generators = draw_noise([sample.seed for sample in part], pipeline.latent_shape)
        names, guide = pipeline.schema.names, None
        if self.classifier is not None:
            wanted = [str(sample.fields[self.classifier.field]) for sample in part]
            guide = self._guide([*wanted, *wanted[-1:] * (size - len(part))])
        told = [{name: value for name, value in sample.fields.items() if name in names} for sample in part]
        latents = pipeline.generate_latents(
            pipeline.conditions(told),
            noise,
            settings.sampler,
            settings.guidance,
            generators,
            batch=size,
            pad=True,
            precision=settings.precision,
            weak=self.weak,
            classifier=guide,
        )
        # The decoder, too, is given full batches: a kernel may round differently for another batch size.
        filled = latents[torch.arange(size).clamp(max=len(part) - 1)]
        return pipeline.decode(filled.to(pipeline.unet.device))[: len(part)]


def check_weaker(strong: MediPipeline, weak: MediPipeline, name: str) -> None:
    """Refuse a weaker model that does not speak of the same latents and conditions.

    Raises:
        UserError: Names what differs.
    """
    same = {
        "whitening of the latents": torch.equal(strong.shift, weak.shift) and torch.equal(strong.scale, weak.scale),
        "noise schedule": dict(strong.scheduler.config) == dict(weak.scheduler.config),
        "fields": strong.schema == weak.schema,
        "shape of latents": strong.latent_shape == weak.latent_shape,
    }
    if different := [what for what, equal in same.items() if not equal]:
        raise UserError(
            f"{name} cannot guide this model: another {' and another '.join(different)}.",
            "A weaker version of the same model can: `latent-medi average` writes one.",
        )
