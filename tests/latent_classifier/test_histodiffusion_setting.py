"""HistoDiffusion's own setting, as its configurations have it: ε on its schedule, L1, guidance of scale 10."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from latent_medi.core import config
from latent_medi.diffusion.guidance import ClassifierGuidance, Guidance
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.diffusion.settings import SamplerSettings
from latent_medi.latent_classifier.network import LatentClassifier
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latent_classifier.train import train_classifier
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings

Both = tuple[MediPipeline, LatentClassifier]
SMALL = ["block_out_channels=[16, 32]", "layers_per_block=1", "attention_head_dim=16", "norm_num_groups=8"]
EVERYWHERE = (1e-9, 1.0)
SAMPLER = SamplerSettings("ddim", 50, eta=1.0)


@pytest.fixture(scope="module")
def both(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The unconditional model and its classifier, their networks small and their runs short."""
    out = tmp_path_factory.mktemp("histodiffusion")
    where = [f"data={coloured / 'data'}", f"latents={coloured / 'latents'}"]
    words = ["--config", "histodiffusion/pretrained", *where, f"out={out / 'model'}", "max_steps=40"]
    words += ["warmup_images=160", "lr=1e-3", "log_every_images=80", "model.attention=[false, true]"]
    model = train(config.parse(TrainSettings, [*words, *(f"model.{word}" for word in SMALL)]))
    losses = [float(row["loss"]) for row in read_log(out / "model" / "log.csv")]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    words = ["--config", "histodiffusion/latent_classifier", *where, f"model={model}", f"out={out / 'classifier'}"]
    words += ["max_steps=250", "lr=2e-3", "network.attention=[false, true]"]
    trained = train_classifier(config.parse(ClassifierSettings, [*words, *(f"network.{word}" for word in SMALL)]))
    return MediPipeline.from_pretrained(model), LatentClassifier.from_pretrained(trained["classifier"])


def generate(both: Both, value: str | None, scale: float = 10.0) -> torch.Tensor:
    pipeline, classifier = both
    noise, generators = draw_noise(range(8), pipeline.latent_shape)
    guidance = Guidance()
    if value is not None:
        guided = ClassifierGuidance(classifier.log_probability([value]), scale, EVERYWHERE)
        guidance = Guidance(classifier=guided)
    return pipeline.generate_latents(None, noise, SAMPLER, guidance, generators)


def test_guided_samples_are_finite_and_the_classifier_finds_their_class(both: Both) -> None:
    _, classifier = both
    for number, value in enumerate(classifier.values):
        latents = generate(both, value)
        assert torch.isfinite(latents).all()
        found = classifier.probabilities(latents, torch.zeros(len(latents), dtype=torch.long))[:, number]
        without = classifier.probabilities(generate(both, None), torch.zeros(8, dtype=torch.long))[:, number]
        assert found.mean() > without.mean() + 0.05, value


def test_a_scale_of_zero_is_no_guidance_bit_for_bit(both: Both) -> None:
    assert torch.equal(generate(both, "benign", 0.0), generate(both, None))
