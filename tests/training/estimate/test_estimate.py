"""What `train --estimate` tells, against what really happens."""

from __future__ import annotations

import gc
import json
import resource
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from parts import small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_medi import cli
from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.latents.info import read_info
from latent_medi.latents.store import LatentStore
from latent_medi.training.checkpoint import optimizer_tensors
from latent_medi.training.ema import Ema
from latent_medi.training.estimate import report as estimating
from latent_medi.training.estimate.measured import measured_text, read_measured
from latent_medi.training.estimate.report import estimate
from latent_medi.training.estimate.step_cost import (
    AUTOCAST,
    SavedBytes,
    build_denoiser,
    example,
    state_bytes,
    step_cost,
)
from latent_medi.training.settings import EstimateSettings, TrainSettings

TINY, LATENT = (4, 8, 8), (4, 32, 32)
SCHEMA = estimating.stand_in_schema(["class", "site"], 0, 5)


def run_of(model: ModelSettings, **values: Any) -> EstimateSettings:
    return EstimateSettings(max_steps=1, model=model, **values)


def real_pass(settings: TrainSettings, shape: tuple[int, int, int], batch: int) -> dict[str, int]:
    """A real forward and backward pass on the CPU: what autograd's hooks count; what the forward pass leaves behind,
    and the fullest moment of all, told by torch's allocator, which knows nothing of autograd."""
    denoiser = build_denoiser(settings, shape, SCHEMA).train()
    objective, dtype = Objective(settings.objective), AUTOCAST[settings.precision]
    inputs = example(denoiser, shape, batch, objective.timesteps)
    for parameter in denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    saved = SavedBytes(denoiser)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with saved.hooks(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = diffusion_loss(denoiser, *inputs, objective).sum() / batch
        hooks = saved.total
        saved.release()
        with torch.profiler.record_function("backward begins"):
            pass
        loss.backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begins = next(event.start_ns() for event in events if event.name() == "backward begins")
    changes = [(event.start_ns() < begins, event.nbytes()) for event in events if event.name() == "[memory]"]
    return {
        "hooks": hooks,
        "left": sum(change for forward, change in changes if forward),
        "peak": max(accumulate(change for _, change in changes)),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "shape", "batch"),
    [
        pytest.param(small_model(), TINY, 64, id="tiny"),
        pytest.param(ModelSettings(preset="S"), LATENT, 4, id="S", marks=pytest.mark.slow),
    ],
)
def test_activations_are_the_bytes_that_a_real_pass_saves(
    model: ModelSettings, shape: tuple[int, int, int], batch: int, precision: Any, checkpointing: bool
) -> None:
    settings = run_of(model, precision=precision, checkpoint_activations=checkpointing)
    cost, _ = step_cost(settings, shape, SCHEMA, batch, device="cpu")
    real = real_pass(settings, shape, batch)
    assert cost.saved == pytest.approx(real["hooks"], rel=0.04)
    assert cost.saved == pytest.approx(real["left"], rel=0.05)
    assert cost.saved + cost.passing == pytest.approx(real["peak"], rel=0.06 if model.preset else 0.10)


def test_state_is_exact() -> None:
    settings = run_of(small_model())
    _, fake = step_cost(settings, TINY, SCHEMA, 2)
    real = build_denoiser(settings, TINY, SCHEMA)
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(real.parameters(), fused=True)
    optimizer.step()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    weights = size(real.parameters())
    assert state_bytes(fake, 3) == {
        "weights": weights,
        "gradients": size(p.grad for p in real.parameters() if p.grad is not None),
        "optimizer": size(tensor for entry in optimizer.state.values() for tensor in entry.values()),
        "averages": 3 * size(Ema(real).module.parameters()),
        "ddp_buckets": 0,
    }
    # Frozen tensors have neither gradient nor optimizer state.
    fake.unet.requires_grad_(False)
    trained = sum(p.numel() for p in fake.conditioner.parameters())
    assert state_bytes(fake, 1)["gradients"] == 4 * trained
    assert state_bytes(fake, 1)["weights"] == weights


def test_types_are_those_that_autocast_chooses_on_a_gpu() -> None:
    """Torch's own rules for CUDA, which fake tensors follow in a forward pass even without a GPU, but for attention."""
    settings = run_of(replace(small_model(), attention=[False, False], mid_attention=False), precision="bf16")
    cost, _ = step_cost(settings, TINY, SCHEMA, 64)
    on_cpu, _ = step_cost(settings, TINY, SCHEMA, 64, device="cpu")
    with FakeTensorMode(), torch.device("cuda"):
        denoiser = build_denoiser(settings, TINY, SCHEMA).train()
        objective = Objective(settings.objective)
        inputs = example(denoiser, TINY, 64, objective.timesteps)
        saved = SavedBytes(denoiser)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with saved.hooks():
                loss = diffusion_loss(denoiser, *inputs, objective).sum()
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        assert loss.device.type == "cuda"
        assert cost.saved == pytest.approx(saved.total, rel=0.03)
    assert cost.saved > 1.2 * on_cpu.saved


def test_work_per_image_is_that_of_the_network() -> None:
    settings = run_of(ModelSettings(preset="S"), precision="bf16")
    cost, _ = step_cost(settings, LATENT, None, 2)
    assert cost.forward_flops / 2 == pytest.approx(2 * 7.9e9, rel=0.03)  # 7.9 G multiplications and additions
    assert cost.flops == pytest.approx(3 * cost.forward_flops, rel=0.02)
    again, _ = step_cost(replace(settings, checkpoint_activations=True), LATENT, None, 2)
    assert again.forward_flops == cost.forward_flops
    assert 1.15 < again.flops / cost.flops < 1.34  # residual blocks once more
    assert again.saved < 0.5 * cost.saved


def test_command_line_tells_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "estimate.json"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = [
        "--config",
        "presets/24gb",
        "--estimate",
        "device_batch=16",
        f"out={tmp_path / 'run'}",
        "--json",
        str(told),
    ]
    assert cli.main(["train", *words]) == 0
    # The weights alone would be 1.4 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 0.5 * 2**20
    assert not (tmp_path / "run").exists()
    text, result = capsys.readouterr().out, json.loads(told.read_text())
    assert "373,208,324 parameters" in text
    assert f"{result['bytes']['peak']:,} B" in text
    assert "estimated:" in text
    if not torch.cuda.is_available():
        assert "measured on this GPU" not in text
        assert result["measured"] is None
    told_before = measured_text(read_measured(), "L")
    assert all(line in text for line in told_before)
    sizes = dict(result["bytes"])
    assert sizes.pop("peak") == sum(sizes.values())
    assert result["estimated_images_per_s"] == pytest.approx(
        0.35 * result["card_tflops"] * 1e12 / result["flops_per_image"]
    )


def test_data_that_are_there_are_used(tiny: Path) -> None:
    settings = run_of(small_model(), data=str(tiny / "data"), latents=str(tiny / "latents"), global_batch=8)
    result = estimate(settings)
    assert result["latent_shape"] == [4, 8, 8]
    assert str(tiny / "data") in result["data"]
    # benign, tumour; aster, birch, NA; age: embeddings of 22, 21 and 21 of the 64 channels.
    same = estimate(replace(settings, data="", latents="", latent_shape=(4, 8, 8), stand_in_fields=0))
    assert result["parameters"] - same["parameters"] == 4 * 22 + 5 * 21 + (2 * 21 + 33 * 21)
    unconditional = estimate(replace(settings, model=replace(small_model(), fields=[])))
    assert unconditional["parameters"] == same["parameters"]


def test_latents_and_models_that_are_yet_to_come_count(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that the named autoencoder will make, a model of the hub to start from, and the length of the run."""
    stored = LatentStore(tiny / "latents").nbytes
    there = run_of(small_model(), data=str(tiny / "data"), latents=str(tiny / "latents"), global_batch=8)
    source = read_info(tiny / "latents")["autoencoder"]["source"]
    to_come = replace(there, latents=str(tmp_path / "latents"), autoencoder=source, resident="device")
    result = estimate(to_come)
    assert result["latent_shape"] == [4, 8, 8]
    assert stored <= result["bytes"]["latents"] < 1.05 * stored  # with the headers of the files
    assert result["files"] == estimate(replace(there, autoencoder=source))["files"]
    longer = estimate(replace(to_come, max_steps=0, max_images=8_000))
    assert longer["images"] == 8_000
    if longer["measured"] is None:
        assert longer["hours"] == pytest.approx(8_000 / longer["estimated_images_per_s"] / 3600)
    assert "8,000 images" in estimating.estimate_text(longer)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="somebody/model"):
        estimate(replace(to_come, init_from="somebody/model"))
    snapshot = tmp_path / "hub" / "models--somebody--model" / "snapshots" / "abc"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    network = build_denoiser(replace(there, model=small_model()), TINY, SCHEMA).unet
    network.save_config(snapshot / "unet")
    started = estimate(replace(to_come, init_from="somebody/model"))
    assert started["parameters"] == result["parameters"]
    hub = [weights for weights in started["weights"] if weights["hub_id"]]
    assert [(weights["name"], weights["found"]) for weights in hub] == [("somebody/model", True)]


def test_latents_count_where_the_run_would_keep_them_on_the_device(tiny: Path) -> None:
    settings = run_of(small_model(), data=str(tiny / "data"), latents=str(tiny / "latents"), global_batch=8)
    stored = LatentStore(tiny / "latents").nbytes
    free = estimate(replace(settings, resident="ram"))["bytes"]
    assert free["latents"] == 0
    for kept in ("auto", "device"):
        sizes = estimate(replace(settings, resident=kept))["bytes"]
        assert (sizes["latents"], sizes["peak"]) == (stored, free["peak"] + stored)
    # More than a tenth of the card is left on disk or in RAM, unless it is asked for.
    small = {"card": "rtx4060", "card_gib": 9 * stored / estimating.GIB}
    assert estimate(replace(settings, resident="auto", **small))["bytes"]["latents"] == 0
    assert estimate(replace(settings, resident="device", **small))["bytes"]["latents"] == stored


def test_settings_change_what_they_should() -> None:
    settings = run_of(small_model(), latent_shape=TINY, global_batch=64, device_batch=16)
    one = estimate(settings)
    assert one["device_batch"] == 16
    shared = estimate(replace(settings, processes=8))
    assert shared["device_batch"] == 8
    assert shared["estimated_steps_per_s"] == pytest.approx(8 * one["estimated_steps_per_s"])
    three = estimate(settings, ema_count=3)["bytes"]
    assert three["averages"] == 3 * one["bytes"]["averages"] == 3 * one["bytes"]["weights"]
    assert estimate(replace(settings, card="h100"))["card_tflops"] == 989.4
    rates = [estimate(replace(settings, card="h100", precision=p))["estimated_images_per_s"] for p in ("fp32", "bf16")]
    assert rates[0] == pytest.approx(rates[1] / 15)  # fp32 has no tensor cores
    with pytest.raises(UserError, match="rtx4090"):
        estimate(replace(settings, card="rtx4091"))
    with pytest.raises(UserError, match="cannot share"):
        estimate(replace(settings, processes=5))


def test_small_cards_are_told_to_be_too_small() -> None:
    settings = config.parse(EstimateSettings, ["--config", "presets/12gb", "card=rtx4060", "device_batch=32"])
    assert estimate(settings)["fits"]
    assert not estimate(replace(settings, device_batch=64))["fits"]


def test_what_torch_does_not_count_is_a_margin_beside_the_peak() -> None:
    settings = run_of(small_model(), latent_shape=TINY, global_batch=64)
    one, two = estimate(settings), estimate(replace(settings, processes=2, global_batch=128))
    assert one["bytes"] == two["bytes"]
    assert one["margin"]["nccl"] == 0 < two["margin"]["nccl"]
    assert one["margin"]["context"] > 0 < one["margin"]["reserve"]
    for result in (one, two):
        needed = result["bytes"]["peak"] + sum(result["margin"].values())
        told = estimating.estimate_text(result)
        assert f"{sum(result['margin'].values()):,} B" in told
        assert f"NCCL between devices {result['margin']['nccl'] / estimating.GIB:.2f}" in told
        for bytes_more, fits in ((1, True), (-(2**20), False)):
            known = replace(
                settings,
                processes=result["processes"],
                global_batch=result["global_batch"],
                card="rtx4060",
                card_gib=(needed + bytes_more) / estimating.GIB,
            )
            assert estimate(known)["fits"] is fits


ROW = {
    "card": "NVIDIA H100 80GB HBM3",
    "revision": "2bebcb5",
    "network": "S",
    "precision": "bf16",
    "compile": True,
    "images_per_second": 5400,
    "peak_gib": 5.125,
}


def test_the_estimate_says_which_card_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"rows": [ROW, {**ROW, "network": "B", "card": "NVIDIA L40S", "compile": False}]}))
    rows = read_measured(file)
    assert measured_text([], "S") == ["training has not been measured on a GPU yet"]
    assert measured_text(rows, "S") == [
        "measured on NVIDIA H100 80GB HBM3 at 2bebcb5: network S, bf16, compiled: 5400 images/s, peak 5.12 GiB"
    ]
    (other,) = measured_text(rows, "L")
    assert "not been measured" in other
    assert "B on NVIDIA L40S" in other
    assert "S on NVIDIA H100 80GB HBM3" in other
    # The packaged file is read, and is what an estimate tells.
    settings = run_of(ModelSettings(preset="S"), global_batch=2)
    result = estimate(settings)
    assert result["measured_before"] == [asdict(row) for row in read_measured()]
    assert result["network"] == "S"
    assert estimate(replace(settings, latent_shape=(4, 64, 64)))["network"] == ""
    result["measured_before"] = [asdict(rows[0])]
    assert "measured on NVIDIA H100 80GB HBM3 at 2bebcb5" in estimating.estimate_text(result)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"rows": {}}',
        '{"rows": [1]}',
        "{",
        *(json.dumps({"rows": [ROW, {k: v for k, v in ROW.items() if k != name}]}) for name in ROW),
        *(json.dumps({"rows": [{**ROW, name: None}]}) for name in ROW),
    ],
)
def test_damaged_measurements_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"measured\.json"):
        read_measured(file)


def test_starting_from_a_model_estimates_its_network(tmp_path: Path) -> None:
    build_denoiser(run_of(small_model()), TINY, None).unet.save_pretrained(tmp_path / "unet")
    settings = run_of(ModelSettings(preset="S"), init_from=str(tmp_path), latent_shape=TINY, stand_in_fields=0)
    assert (
        estimate(settings)["parameters"] == estimate(replace(settings, init_from="", model=small_model()))["parameters"]
    )
    with pytest.raises(UserError, match="no network"):
        estimate(replace(settings, init_from=str(tmp_path / "nothing")))


def test_updates_are_really_made_where_something_is_measured() -> None:
    settings = run_of(small_model(), global_batch=8, device_batch=4, measure_steps=1, precision="bf16")
    assert estimating.measure(settings, TINY, SCHEMA, 4, device="cpu")["steps_per_s"] > 0


def test_moments_in_eight_bits_are_counted_exactly() -> None:
    from bitsandbytes.optim import AdamW8bit

    module = nn.Sequential(nn.Linear(100, 77), nn.Conv2d(33, 65, 3))
    optimizer = AdamW8bit(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = optimizer_tensors(optimizer, [name for name, _ in module.named_parameters()])
    own = sum(tensor.nbytes for name, tensor in kept.items() if tensor.ndim and "qmap" not in name)
    shared = 2 * 256 * 4  # all parameters share the two maps, and steps are Python numbers
    assert state_bytes(module, 1, eight_bit=True)["optimizer"] == own + shared
