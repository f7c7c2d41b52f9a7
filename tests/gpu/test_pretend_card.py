"""Whole commands on a card in name, where one tensor left on the CPU ends them, and the CPU's values where none is."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import make_cohort, random_images, random_model, stable_diffusion_vae
from pretend_card import CARD, Places, pretend_card
from safetensors.torch import save_file
from tiny_runs import FORMS, Models, furthest, greys, make_models, tensors_in, tiny_classifier, tiny_run

from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import SAMPLERS
from latent_medi.diffusion.settings import (
    AutoguidanceSettings,
    ClassifierGuidanceSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.features.networks import Network, Preprocessing
from latent_medi.latent_classifier.train import train_classifier
from latent_medi.latents import autoencoder as autoencoders
from latent_medi.latents import encode as encoding
from latent_medi.latents import store
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.encode import encode
from latent_medi.latents.settings import EncodeSettings, ReconstructionSettings
from latent_medi.latents.store import LatentStore
from latent_medi.planning.plan import Sample
from latent_medi.sampling.generate import generate
from latent_medi.sampling.image_sampler import ImageSampler
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.loop import train
from latent_medi.training.settings import EmaSettings, StreamSettings

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2")


@pytest.fixture
def card() -> Iterator[Places]:
    with pretend_card() as places:
        yield places


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tiny, tmp_path_factory.mktemp("models"))


def numbers(out: Path) -> list[list[str]]:
    """What a run logged of its losses."""
    rows = [
        [row["images"], row["loss"], row["grad_norm"]] for row in csv.DictReader((out / "log.csv").open(newline=""))
    ]
    return rows + list(csv.reader((out / "losses.csv").open(newline="")))


def test_the_card_in_name_refuses_what_a_card_refuses(card: Places) -> None:
    """The other tests rest on this."""
    layer = torch.nn.Linear(3, 2)
    x = torch.ones(4, 3)
    here = layer(x).sum()
    layer.to("cuda")
    assert next(layer.parameters()).device == CARD
    for mixed in (
        lambda: layer(x),
        lambda: layer(x.cuda()) + torch.ones(4, 2),
        lambda: here.add_(layer(x.cuda()).sum()),
        lambda: torch.stack([torch.zeros(()), torch.zeros((), device="cuda")]),
        lambda: torch._foreach_lerp_([torch.zeros(3)], [torch.ones(3, device="cuda")], 0.5),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"same device|generator"):
            mixed()
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        layer(x.cuda()).detach().numpy()
    loss = (layer(x.cuda()) * 2.0).sum() + torch.tensor(1.0)
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.device == loss.device == torch.zeros_like(loss).device == CARD
    assert torch.equal(layer.weight.grad.cpu(), torch.full((2, 3), 8.0))
    assert x.device.type == loss.cpu().device.type == "cpu"


# ---- training


@pytest.mark.parametrize(
    "values",
    [
        {"ema": EmaSettings(also=[0.05])},
        {"resident": "device"},
        pytest.param(
            {"resident": "device", "balance": ["site"], "channels_last": True, "checkpoint_activations": True},
            marks=pytest.mark.slow,
        ),
        {"latents": "", "stream": StreamSettings(views=8, device_batch=3, workers=1)},
    ],
    ids=["ram", "device", "balanced", "streamed"],
)
def test_training_on_a_card_is_training_on_the_cpu(
    tiny: Path, autoencoder: Autoencoder, tmp_path: Path, values: dict[str, Any]
) -> None:
    """Batches, both passes, clipping, optimizer, averages, loss table, checkpoints, and a model at the end."""
    if "latents" in values:
        values = {**values, "autoencoder": autoencoder.source}
    settings = tiny_run(tiny, tmp_path / "there", **values)
    with pretend_card() as places:
        train(settings)
        assert places.most > 100  # it was used
    train(replace(settings, out=str(tmp_path / "here")))
    last = "checkpoints/images-000000000016"
    for part in (last, "model"):
        assert furthest(tensors_in(tmp_path / "there" / part), tensors_in(tmp_path / "here" / part)) < 1e-5
    assert len(numbers(tmp_path / "there")) == len(numbers(tmp_path / "here"))


@pytest.mark.slow
def test_a_run_on_a_card_goes_on_there(tiny: Path, tmp_path: Path) -> None:
    here, whole = tiny_run(tiny, tmp_path / "whole"), tmp_path / "whole"
    train(here)
    torn = tmp_path / "torn"
    with pretend_card():
        train(replace(here, out=str(torn)))
        for gone in (torn / "model", torn / "checkpoints" / "images-000000000016"):
            for file in sorted(gone.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            gone.rmdir()
        train(replace(here, out=str(torn)))
    assert furthest(tensors_in(torn / "model"), tensors_in(whole / "model")) < 1e-5


def test_previews_are_made_on_a_card(tiny: Path, tmp_path: Path, card: Places) -> None:
    train(tiny_run(tiny, tmp_path, preview_every_images=16, preview_images=4, preview_steps=2))
    assert list((tmp_path / "previews").glob("*.png"))


@pytest.mark.parametrize("resident", ["ram", pytest.param("device", marks=pytest.mark.slow)])
def test_the_classifier_trains_on_a_card(tiny: Path, tmp_path: Path, resident: str) -> None:
    settings = tiny_classifier(tiny, tmp_path / "there", resident=resident)
    with pretend_card() as places:
        train_classifier(settings)
        assert places.most > 100
    train_classifier(replace(settings, out=str(tmp_path / "here")))
    there = tensors_in(tmp_path / "there" / "classifier")
    assert furthest(there, tensors_in(tmp_path / "here" / "classifier")) < 1e-5


def test_latents_lie_on_the_card_if_they_are_to(tiny: Path, card: Places) -> None:
    here, there = LatentStore(tiny / "latents", "ram"), LatentStore(tiny / "latents", "device", "cuda")
    for name, expected in zip(("mean", "std"), here.moments([5, 3, 3]), strict=True):
        values = dict(zip(("mean", "std"), there.moments([5, 3, 3]), strict=True))[name]
        assert values is not None
        assert expected is not None
        assert values.device == CARD
        assert torch.equal(values.cpu(), expected)
    for ours, theirs in zip(there.statistics(range(20)), here.statistics(range(20)), strict=True):
        assert ours.device.type == "cpu"
        assert torch.allclose(ours, theirs)
    assert store.choose_residence(there.nbytes, "cuda") == "device"


# ---- sampling


def images_of(pipeline: MediPipeline, settings: GenerateSettings) -> np.ndarray:
    """Three images in batches of two, so that the last batch is filled up."""
    fields: dict[str, str | float] = {"class": "tumour", "site": "aster", "age": 50.0}
    samples = [Sample(0, i, i, fields) for i in range(3)]
    assert pipeline.autoencoder.device == pipeline.unet.device  # or images are decoded on the CPU
    return np.stack([image for _, image in ImageSampler(pipeline, settings).images(samples)])


def assert_same_images(there: np.ndarray, here: np.ndarray) -> None:
    """But for the rounding of another layout in memory."""
    share, largest = greys(there, here)
    assert largest <= 1
    assert share > 0.99


@pytest.mark.parametrize(
    "name",
    [n if n in ("dpmpp_2m", "heun") else pytest.param(n, marks=pytest.mark.slow) for n in SAMPLERS],
)
def test_every_sampler_and_guidance_runs_on_a_card(models: Models, name: str) -> None:
    objective = ObjectiveSettings(schedule="linear", zero_terminal_snr=False)  # goes with every sampler

    def every_form(device: str) -> list[np.ndarray]:
        kept = MediPipeline.from_pretrained(models.strong)
        parts = (kept.denoiser, objective, kept.autoencoder, kept.shift, kept.scale)
        pipeline = MediPipeline.from_parts(*parts).to(device)
        sampler = SamplerSettings(name, 2, eta=0.5 if name == "ddim" else 0.0)
        return [
            images_of(pipeline, GenerateSettings(sampler=sampler, guidance=form, device_batch=2))
            for form in FORMS.values()
        ]

    with pretend_card() as places:
        there = every_form("cuda")
        assert places.most > 100
    for ours, theirs in zip(there, every_form("cpu"), strict=True):
        assert_same_images(ours, theirs)


@pytest.mark.parametrize("name", ["dpmpp_2m", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_guides_run_on_a_card(models: Models, name: str) -> None:
    classifier = ClassifierGuidanceSettings(str(models.classifier), 5.0)
    weaker = AutoguidanceSettings(str(models.weak), 2.0)
    common: dict[str, Any] = {"sampler": SamplerSettings(name, 4), "guidance": FORMS["chain"], "device_batch": 2}
    guides: list[dict[str, Any]] = [
        {"classifier": classifier},
        {"autoguidance": weaker},
        {"classifier": classifier, "autoguidance": weaker},
    ]

    def every_guide(device: str) -> list[np.ndarray]:
        pipeline = MediPipeline.from_pretrained(models.strong, device=device)
        return [images_of(pipeline, GenerateSettings(**common, **guide)) for guide in guides]

    with pretend_card():
        there = every_guide("cuda")
    for ours, theirs in zip(there, every_guide("cpu"), strict=True):
        assert_same_images(ours, theirs)


def test_a_plan_is_made_on_a_card(models: Models, tmp_path: Path) -> None:
    fields = {"class": "tumour", "site": "aster", "age": "50"}
    settings = GenerateSettings(model=str(models.strong), n=3, fields=fields, device_batch=2)
    settings.sampler.steps = 2
    sets = []
    with pretend_card() as places:
        sets.append(generate(replace(settings, out=str(tmp_path / "there"))))
        assert places.most > 100
    sets.append(generate(replace(settings, out=str(tmp_path / "here"))))
    there, here = (made.read(np.arange(3)) for made in sets if made is not None)
    assert_same_images(there, here)


# ---- autoencoders and feature encoders


@pytest.mark.parametrize(
    ("kind", "views", "slicing"),
    [(KINDS[0], 1, False), pytest.param(KINDS[0], 8, True, marks=pytest.mark.slow), (KINDS[2], 1, True)],
)
def test_encoding_runs_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, views: int, slicing: bool
) -> None:
    def save_from_ram(tensors: dict[str, torch.Tensor], path: str) -> None:
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}  # a shard's latents fill no card
        save_file(tensors, path)

    monkeypatch.setattr(encoding, "save_file", save_from_ram)
    make_cohort(tmp_path / "data", ("aster", "birch"), patches=12)
    save_autoencoder(Autoencoder(random_model(kind), kind), tmp_path / "autoencoder")
    settings = EncodeSettings(
        str(tmp_path / "data"),
        str(tmp_path / "there"),
        str(tmp_path / "autoencoder"),
        device_batch=8,
        slicing=slicing,
        views=views,
        reconstruction_error=ReconstructionSettings(8),
    )
    with pretend_card() as places:
        encode(settings)
        assert places.most > 20
    encode(replace(settings, out=str(tmp_path / "here")))
    # The same but for a rounding to fp16.
    assert furthest(tensors_in(tmp_path / "there"), tensors_in(tmp_path / "here")) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_autoencoders_work_where_they_were_moved_to(card: Places, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoders, "DECODED_PIXELS", 2 * 32 * 32, raising=False)  # so that a part is filled up
    there = Autoencoder(random_model(kind), kind).to("cuda")
    here = Autoencoder(random_model(kind), kind)
    images = random_images(3)
    for ours, theirs in zip(there.encode(images), here.encode(images), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.device == CARD
            assert torch.allclose(ours.cpu(), theirs, atol=1e-6)
    latents = here.encode(images)[0]
    for where in ("cpu", "cuda"):
        assert greys(there.decode(latents.to(where)), here.decode(latents))[1] <= 1


@pytest.mark.slow
def test_the_autoencoder_of_stable_diffusion_runs_on_a_card(tmp_path: Path) -> None:
    folder, images = str(stable_diffusion_vae(tmp_path / "autoencoder")), random_images(2)
    here = load_autoencoder(folder)
    mean, std = here.encode(images)
    assert std is not None
    decoded = here.decode(mean)
    with pretend_card() as places:
        there = load_autoencoder(folder, "cuda")
        ours = [moments.cpu() for moments in there.encode(images) if moments is not None]
        assert greys(there.decode(mean), decoded)[1] <= 1
        assert places.most > 200
    assert furthest(dict(enumerate(ours)), dict(enumerate([mean, std]))) < 1e-4


class Pooled(torch.nn.Module):
    """A network of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean((2, 3))


@pytest.mark.parametrize("channel", ["rgb", "haematoxylin"])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_feature_encoders_run_on_a_card(card: Places, channel: str, when: str) -> None:
    how = Preprocessing(24, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bicubic")

    def build(device: str) -> list[ImageEncoder]:
        network = Network("pooled", Pooled(), 5, how, "none")
        encoders = [ImageEncoder(network, device), load_encoder("demo", device=device)]
        return encoders if channel == "rgb" else [colour_free(each) for each in encoders]

    images = random_images(3, 64)
    for there, here in zip(build("cuda" if when == "at once" else "cpu"), build("cpu"), strict=True):
        ours = there.features([images], "cuda" if when == "later" else None)
        assert next(there.module.parameters()).device == CARD
        np.testing.assert_allclose(ours, here.features([images]), atol=1e-5)
        assert len(there.fingerprint) == 64
