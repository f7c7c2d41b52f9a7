"""What torch's own fake tensors say of a card that is not there; of a second device without values; and which numbers
are kept in fp32 where a network computes in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parts import random_images, random_model, small_model
from tiny_runs import FORMS, Models, make_models, tensors_in, tiny_run
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.guidance import Autoguidance, Guidance
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise, make_sampler
from latent_medi.diffusion.settings import DropoutSettings, ObjectiveSettings, SamplerSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.store import LatentStore
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import loop, updates
from latent_medi.training.data import open_data
from latent_medi.training.ema import Ema
from latent_medi.training.estimate.step_cost import build_denoiser
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.settings import TrainSettings

CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def schema(tiny: Path) -> Schema:
    return PatchDataset.open(tiny / "data").schema


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tiny, tmp_path_factory.mktemp("models"))


# ---- fake tensors of a card


def on_fake_card(schema: Schema) -> tuple[TrainSettings, Denoiser, torch.Tensor, torch.Tensor, Conditions]:
    """Settings, and a denoiser, latents, timesteps and conditions of four images; to be called within the mode."""
    settings = TrainSettings(data="", out="", model=small_model())
    with torch.device(CARD):
        denoiser = build_denoiser(settings, (4, 8, 8), schema)
        codes = torch.ones(4, len(schema.fields), dtype=torch.int64)
        conditions = Conditions(codes, torch.zeros_like(codes, dtype=torch.float32))
        return settings, denoiser, torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.int64), conditions


def test_a_training_step_stays_on_a_fake_card(schema: Schema) -> None:
    """All but the backward pass, for which autograd wants a card's own threads."""
    with FakeTensorMode() as mode:
        vars(mode)["__deepcopy__"] = lambda memo: mode  # or the average would belong to a mode of its own
        settings, denoiser, x, t, conditions = on_fake_card(schema)
        ema, optimizer = Ema(denoiser), build_optimizer(denoiser.parameters(), settings)
        objective = Objective(ObjectiveSettings())
        assert diffusion_loss(denoiser, x, torch.randn_like(x), t, conditions, objective).device == CARD
        for parameter in denoiser.parameters():
            parameter.grad = torch.zeros_like(parameter)
        accelerator: Any = SimpleNamespace(unscale_gradients=lambda: None)
        norm = updates.clip_gradients(accelerator, list(denoiser.parameters()), 1.0)
        assert norm.device == CARD
        optimizer.step()
        ema.update(denoiser, 0.9)
        with pytest.raises(RuntimeError, match="device"):
            denoiser(x.cpu(), t, conditions)


# ---- a second device


def test_resident_latents_are_on_the_device(tiny: Path) -> None:
    """On torch's device without memory, which nothing can be brought back from."""
    settings = tiny_run(tiny, tiny, resident="device")
    data = open_data(settings, None, torch.device("meta"))
    assert isinstance(data.store, LatentStore)
    assert data.store.resident == "device"
    mean, std = data.store.moments([3, 1, 3])
    assert std is not None
    for moments in (mean, std):
        assert (moments.device.type, moments.dtype, moments.shape) == ("meta", torch.float32, (3, 4, 8, 8))
    batch = data.batch(0, 8, 0, 1000, DropoutSettings(), 0, 1)
    assert batch.latents.device.type == "meta"
    assert batch.latents.dtype == torch.float32
    for part in batch.parts(4, torch.device("meta")):
        assert part.conditions is not None
        known = (part.latents, part.noise, part.timesteps, part.conditions.codes, part.conditions.values)
        assert {each.device.type for each in known} == {"meta"}


# ---- precision


@contextmanager
def watching_layers() -> Iterator[dict[str, set[torch.dtype]]]:
    """Types that go into denoisers, come out of convolutions and linear layers within them, and out of denoisers."""
    seen: dict[str, set[torch.dtype]] = {"in": set(), "inside": set(), "weights": set()}
    within = []

    def before(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Denoiser):
            within.append(module)
            seen["in"].add(inputs[0].dtype)

    def after(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Denoiser):
            within.pop()
        elif within and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            seen["inside"].add(output.dtype)
            seen["weights"].add(module.weight.dtype)

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_training_computes_the_network_alone_in_half_precision(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, inside: torch.dtype
) -> None:
    seen: dict[str, set[torch.dtype]] = {"latents": set(), "prediction": set(), "loss": set(), "gradients": set()}

    def noted_loss(denoiser: Any, x0: torch.Tensor, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        def noted(*inputs: Any) -> torch.Tensor:
            prediction = denoiser(*inputs)
            seen["prediction"].add(prediction.dtype)
            return prediction

        loss = diffusion_loss(noted, x0, noise, *rest)
        seen["latents"] |= {x0.dtype, noise.dtype}
        seen["loss"].add(loss.dtype)
        return loss

    clip = updates.clip_gradients

    def noted_clip(accelerator: Any, parameters: Any, limit: float) -> torch.Tensor:
        seen["gradients"] |= {p.grad.dtype for p in parameters}
        return clip(accelerator, parameters, limit)

    monkeypatch.setattr(loop, "diffusion_loss", noted_loss)
    monkeypatch.setattr(updates, "clip_gradients", noted_clip)
    with watching_layers() as layers:
        loop.train(tiny_run(tiny, tmp_path, precision=precision))
    assert layers == {"in": {torch.float32}, "inside": {inside}, "weights": {torch.float32}}
    assert all(found == {torch.float32} for found in seen.values()), seen
    # Weights, averages and moments as they were saved, and the model.
    for folder in ("checkpoints/images-000000000016", "model"):
        saved = {v.dtype for k, v in tensors_in(tmp_path / folder).items() if v.is_floating_point()}
        assert saved == {torch.float32}


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "ddpm"])
@pytest.mark.parametrize("form", ["none", "rescaled"])
def test_sampling_computes_the_network_alone_in_half_precision(models: Models, name: str, form: str) -> None:
    pipeline, weak = (MediPipeline.from_pretrained(folder) for folder in (models.strong, models.weak))
    seen: set[torch.dtype] = set()
    noise, generators = draw_noise([0, 1], pipeline.latent_shape)
    with watching_layers() as layers:
        latents = pipeline.generate_latents(
            pipeline.conditions([{"class": "tumour", "site": "aster", "age": "50"}] * 2),
            noise,
            SamplerSettings(name, 3),
            Guidance(FORMS[form], weak=Autoguidance(weak.denoiser, 2.0)),
            generators,
            precision="bf16",
            callback=lambda alpha_bar, x_t, clean: seen.update([x_t.dtype, clean.dtype]),
        )
    assert layers == {"in": {torch.float32}, "inside": {torch.bfloat16}, "weights": {torch.float32}}
    assert seen == {latents.dtype} == {torch.float32}
    sampler = make_sampler(pipeline.scheduler.config, SamplerSettings(name, 3))
    assert all(t.dtype != torch.bfloat16 for t in vars(sampler).values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTAEF2"])
def test_autoencoders_take_and_give_fp32_in_half_precision(kind: str) -> None:
    half, whole = Autoencoder(random_model(kind), kind).to(dtype=torch.bfloat16), Autoencoder(random_model(kind), kind)
    images = random_images(2)
    for ours, theirs in zip(half.encode(images), whole.encode(images), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)
            assert not torch.equal(ours, theirs)
    latents = whole.encode(images)[0]
    assert np.abs(half.decode(latents).astype(int) - whole.decode(latents).astype(int)).mean() < 3
