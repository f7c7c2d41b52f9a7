"""The verbs that train, encode and classify: each takes its settings, prints, and returns the result as JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError

if TYPE_CHECKING:
    from latent_medi.autoencoder.settings import AutoencoderSettings
    from latent_medi.image_classifier.settings import (
        ClassifySettings,
        CompareClassifiersSettings,
        ImageClassifierSettings,
    )
    from latent_medi.latent_classifier.settings import ClassifierSettings
    from latent_medi.latents.settings import EncodeSettings
    from latent_medi.training.settings import AverageSettings, EstimateSettings, TrainSettings

Printed = dict[str, Any]


def autoencoder(settings: AutoencoderSettings) -> Printed:
    from latent_medi.autoencoder.train import train_autoencoder

    return train_autoencoder(settings)


def encode(settings: EncodeSettings) -> Printed:
    from latent_medi.latents.encode import encode
    from latent_medi.latents.info import read_info

    out = encode(settings)
    return {"latents": str(out), "floor": read_info(out).get("floor")}


def train(settings: TrainSettings) -> Printed:
    import torch

    from latent_medi.training.loop import train

    try:
        made = train(settings)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device's memory is full: {str(error).splitlines()[0]}",
            "Lower device_batch (the update stays the same), or set resident=ram, checkpoint_activations=true, "
            "optimizer=adamw8bit. `latent-medi train --estimate` lists what needs how much memory.",
        ) from None
    return {made.name: str(made)}  # "model", or "adapter" of a run with lora


def estimate(settings: EstimateSettings) -> Printed:
    from latent_medi.training.estimate.report import estimate, estimate_text

    result = estimate(settings)
    print(estimate_text(result))
    return result


def classifier(settings: ClassifierSettings) -> Printed:
    from latent_medi.latent_classifier.train import train_classifier

    return train_classifier(settings)


def image_classifier(settings: ImageClassifierSettings) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.scores import scores_text
    from latent_medi.image_classifier.train import train_image_classifier

    folder, scores = train_image_classifier(settings)
    if scores is not None and os.environ.get("RANK", "0") == "0":
        print(scores_text(scores))
    return {"model": str(folder), "scores": encode(scores)}


def compare_classifiers(settings: CompareClassifiersSettings) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.compare import compare_classifiers
    from latent_medi.image_classifier.comparison import comparison_text

    found = compare_classifiers(settings)
    if os.environ.get("RANK", "0") == "0":
        print(comparison_text(found))
    result: Printed = encode(found)
    return result


def classify(settings: ClassifySettings) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.classify import classify
    from latent_medi.image_classifier.scores import scores_text

    done = classify(settings)
    if os.environ.get("RANK", "0") == "0":
        if done.scores is not None:
            print(scores_text(done.scores))
        print(f"{counted(done.patches, 'patch')} classified, written to {settings.out}")
    return {"table": settings.out, "patches": done.patches, "scores": encode(done.scores)}


def average(settings: AverageSettings) -> Printed:
    from latent_medi.training.run_folder import write_average

    return {"model": str(write_average(settings))}
