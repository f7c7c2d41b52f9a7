"""What `train --estimate` tells, against what really happens."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import small_model

from latent_medi import cli, config
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.training import estimate as estimating
from latent_medi.training.ema import Ema
from latent_medi.training.estimate import AUTOCAST, SavedBytes, build_denoiser, estimate, example, step_cost
from latent_medi.training.settings import EstimateSettings, TrainSettings

TINY, LATENT = (4, 8, 8), (4, 32, 32)
SCHEMA = estimating.stand_in_schema(["class", "site"], 0, 5)


def run_of(model: ModelSettings, **values: Any) -> EstimateSettings:
    return EstimateSettings(max_steps=1, model=model, **values)


def allocated(settings: TrainSettings, shape: tuple[int, int, int], schema: Schema | None, batch: int) -> dict[str, int]:
    """What a real forward pass leaves behind on the CPU, told by autograd's hooks and by torch's allocator, which knows
    nothing of autograd; and what the parameters, their gradients, AdamW and an average take."""
    denoiser = build_denoiser(settings, shape, schema).train()
    objective, dtype = Objective(settings.objective), AUTOCAST[settings.precision]
    inputs = example(denoiser, shape, batch, objective.timesteps)
    saved = SavedBytes(denoiser)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        # Hooks stay off here: they are what is checked.
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = diffusion_loss(denoiser, *inputs, objective).sum() / batch
    left = sum(event.self_cpu_memory_usage for event in profile.events())
    loss.backward()
    with saved.hooks(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        diffusion_loss(denoiser, *inputs, objective).sum().backward()
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return {
        "hooks": saved.total,
        "allocator": left,
        "weights": sum(p.untyped_storage().nbytes() for p in denoiser.parameters()),
        "gradients": sum(p.grad.untyped_storage().nbytes() for p in denoiser.parameters() if p.grad is not None),
        "optimizer": sum(t.untyped_storage().nbytes() for t in state),
        "averages": sum(p.untyped_storage().nbytes() for p in Ema(denoiser).module.parameters()),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "shape", "batch"),
    [(small_model(), TINY, 16), (ModelSettings(preset="S"), LATENT, 2)],
    ids=["tiny", "S"],
)
def test_activations_are_the_bytes_that_a_real_pass_saves(
    model: ModelSettings, shape: tuple[int, int, int], batch: int, precision: Any, checkpointing: bool
) -> None:
    settings = run_of(model, precision=precision, checkpoint_activations=checkpointing)
    cost, denoiser = step_cost(settings, shape, SCHEMA, batch, device="cpu")
    real = allocated(settings, shape, SCHEMA, batch)
    assert cost.saved == pytest.approx(real["hooks"], rel=0.10)
    assert cost.saved == pytest.approx(real["allocator"], rel=0.10)
    sizes = estimating.state_bytes(denoiser, 1)
    for key in ("weights", "gradients", "optimizer", "averages"):
        assert sizes[key] == real[key], key
