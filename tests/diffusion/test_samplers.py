"""Samplers: which pairs work, where they start, where each step lands, and that samples are their own seed's."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from diffusion_parts import Counted, make_denoiser
from torch.utils._python_dispatch import TorchDispatchMode

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.guidance import Autoguidance, Guidance
from latent_medi.diffusion.objective import Objective, make_scheduler
from latent_medi.diffusion.samplers import (
    SAMPLERS,
    draw_noise,
    draws_noise,
    make_sampler,
    network_evaluations,
    refusal,
    sample_latents,
)
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.metadata.schema import Field, Schema

OBJECTIVES = {
    f"{prediction}-{schedule}-{'zero' if zero else 'plain'}": ObjectiveSettings(
        prediction=prediction, schedule=schedule, zero_terminal_snr=zero
    )
    for prediction in ("v_prediction", "epsilon")
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for zero in (True, False)
    if not (prediction == "epsilon" and zero)
}
DETERMINISTIC = ("dpmpp_2m", "unipc", "euler", "heun", "ddim")


class Oracle:
    """Knows the one clean latent: the exact prediction for any noisy one. Records what it is asked."""

    conditioner = None

    def __init__(self, objective: ObjectiveSettings, x0: torch.Tensor) -> None:
        self.objective, self.x0 = Objective(objective), x0
        self.asked: list[tuple[int, torch.Tensor]] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, conditions: None) -> torch.Tensor:
        self.asked.append((int(t[0]), x_t.clone()))
        abar = self.objective.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x_t - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        if self.objective.settings.prediction == "epsilon":
            return noise
        return abar.sqrt() * noise - (1 - abar).sqrt() * self.x0


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_it_starts_at_the_terminal_step_and_each_step_ends_at_the_next_visited_one(objective, name, steps):
    settings = SamplerSettings(name, steps)
    scheduler = make_scheduler(objective)
    if reason := refusal(objective, settings):
        with pytest.raises(UserError) as error:
            make_sampler(scheduler.config, settings)
        assert reason in str(error.value)
        return
    sampler = make_sampler(scheduler.config, settings)
    first, generators = draw_noise([0, 1], (4, 4, 4))
    x0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    oracle = Oracle(objective, x0)
    noise = oracle.objective.add_noise(x0, first, torch.tensor([999, 999]))
    out = sample_latents(oracle, None, noise, sampler, generators=generators)
    visited = [t for t, _ in oracle.asked]
    assert visited[0] == 999
    if name == "heun":  # visits each but the first twice
        assert visited[1::2] == visited[2::2]
        visited = visited[:1] + visited[1::2]
    assert len(visited) == steps
    assert visited == sorted(set(visited), reverse=True)
    if name in DETERMINISTIC:
        # With one clean latent the path is known: at timestep t the state is √ᾱ·x₀ + √(1−ᾱ)·ε with the first ε.
        # Landing beside the next visited timestep would show as another mixture.
        for t, state in oracle.asked:
            expected = oracle.objective.add_noise(x0, first, torch.tensor([t, t]))
            torch.testing.assert_close(state, expected, atol=5e-3, rtol=0)
    else:
        for t, state in oracle.asked[1:]:
            abar = oracle.objective.alphas_cumprod[t].item()
            left = (state - abar**0.5 * x0).std().item()
            assert left == pytest.approx((1 - abar) ** 0.5, rel=0.35)
    torch.testing.assert_close(out, x0, atol=5e-3, rtol=0)


def test_wrong_steps_of_ddim_are_what_the_refusal_is_for():
    """Without the refusal, 30 steps land beside the visited timesteps, and the first test's comparison would fail."""
    reason = refusal(ObjectiveSettings(), SamplerSettings("ddim", 30))
    assert "25 or 40" in reason
    assert not refusal(ObjectiveSettings(), SamplerSettings("ddim", 25))
    config = {**make_scheduler(ObjectiveSettings()).config}
    sampler = DDIMScheduler.from_config(config, clip_sample=False)
    sampler.set_timesteps(30)
    first, _ = draw_noise([0], (4, 4, 4))
    oracle = Oracle(ObjectiveSettings(), torch.ones(1, 4, 4, 4))
    sample_latents(oracle, None, first, sampler)
    worst = max(
        (state - oracle.objective.add_noise(oracle.x0, first, torch.tensor([t]))).abs().max()
        for t, state in oracle.asked
    )
    assert worst > 5e-3


@pytest.mark.parametrize(
    ("objective", "sampler", "why"),
    [
        (ObjectiveSettings(prediction="epsilon"), SamplerSettings("dpmpp_2m"), "0/0"),
        (OBJECTIVES["epsilon-squaredcos_cap_v2-plain"], SamplerSettings("dpmpp_2m"), "train with v_prediction"),
        (OBJECTIVES["epsilon-squaredcos_cap_v2-plain"], SamplerSettings("ddpm", 50), "all 1000 steps"),
        (ObjectiveSettings(), SamplerSettings("ddim", 30), "must divide"),
        (ObjectiveSettings(), SamplerSettings("dpmpp_2m", 0), "between 1 and"),
        (ObjectiveSettings(), SamplerSettings("dpmpp_2m", 1001), "between 1 and"),
        (ObjectiveSettings(), SamplerSettings("dpmpp_2m", eta=0.5), "eta = 0.5"),
    ],
)
def test_refused_pairs_say_why(objective, sampler, why):
    assert why in refusal(objective, sampler)


def test_settings_of_no_sampler_are_refused():
    with pytest.raises(UserError, match="name is 'dpmpp2m'"):
        SamplerSettings("dpmpp2m")
    with pytest.raises(UserError, match=r"eta is 1\.5"):
        SamplerSettings("ddim", 50, eta=1.5)


def test_only_ddpm_with_all_steps_goes_with_epsilon_on_the_cosine_schedule():
    assert not refusal(OBJECTIVES["epsilon-squaredcos_cap_v2-plain"], SamplerSettings("ddpm", 1000))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_finite_latents_with_a_network(name, schema):
    for objective in (ObjectiveSettings(), OBJECTIVES["epsilon-linear-plain"]):
        if refusal(objective, SamplerSettings(name, 5)):
            assert name == "heun"
            continue
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings(name, 5))
        noise, generators = draw_noise([1, 2], (4, 8, 8))
        conditions = Conditions.from_schema(schema, [{"grade": "benign"}] * 2)
        out = sample_latents(make_denoiser(schema), conditions, noise, sampler, generators=generators)
        assert torch.isfinite(out).all()
        assert out.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [SamplerSettings("dpmpp_2m", 4), SamplerSettings("dpmpp_2m_sde", 4), SamplerSettings("ddim", 4, 1.0)]
)
def test_a_sample_is_its_own_seeds_whatever_its_batch(settings, schema):
    denoiser = make_denoiser(schema)
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, settings)
    rows = [{"grade": g} for g in ("benign", "gleason3", "gleason4", "benign")]

    def run(order: list[int]) -> torch.Tensor:
        noise, generators = draw_noise([100 + i for i in order], (4, 8, 8))
        conditions = Conditions.from_schema(schema, [rows[i] for i in order])
        return sample_latents(denoiser, conditions, noise, sampler, generators=generators)

    first, other = run([0, 1, 2, 3]), run([3, 2, 0, 0])
    assert torch.equal(first[2], other[1])
    assert torch.equal(first[0], other[2])
    assert torch.equal(other[2], other[3])  # also when the same sampler object is used again
    assert not torch.equal(first[0], first[3])


def test_a_sampler_that_draws_noise_asks_for_generators(schema):
    config = make_scheduler(ObjectiveSettings()).config
    noise, generators = draw_noise([1, 2], (4, 8, 8))
    for settings in (SamplerSettings("ddpm", 3), SamplerSettings("dpmpp_2m_sde", 3), SamplerSettings("ddim", 4, 0.5)):
        sampler = make_sampler(config, settings)
        assert draws_noise(sampler)
        for given in (None, generators[:1]):
            with pytest.raises(ValueError, match="generator per sample"):
                sample_latents(make_denoiser(None), None, noise, sampler, generators=given)
    assert not draws_noise(make_sampler(config, SamplerSettings()))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_starting_from_a_noised_image(name):
    objective = ObjectiveSettings(zero_terminal_snr=name != "heun")
    sampler = make_sampler(make_scheduler(objective).config, SamplerSettings(name, 20))
    noise, _ = draw_noise([0, 1], (4, 4, 4))
    oracle = Oracle(objective, torch.randn(2, 4, 4, 4))
    start = oracle.objective.add_noise(oracle.x0, noise, torch.tensor([499, 499]))
    out = sample_latents(oracle, None, start, sampler, first_step=10)
    assert list(dict.fromkeys(t for t, _ in oracle.asked)) == list(range(499, 0, -50))
    assert torch.allclose(oracle.asked[0][1], start, atol=1e-6)
    torch.testing.assert_close(out, oracle.x0, atol=5e-3, rtol=0)


def test_latents_are_not_clipped():
    for name in SAMPLERS:
        objective = ObjectiveSettings(zero_terminal_snr=name != "heun")
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings(name, 10))
        noise, generators = draw_noise([0], (4, 4, 4))
        oracle = Oracle(objective, torch.full((1, 4, 4, 4), 7.0))
        out = sample_latents(oracle, None, noise, sampler, generators=generators)
        torch.testing.assert_close(out, oracle.x0, atol=1e-2, rtol=0)


def test_heun_is_refused_where_its_first_step_would_overshoot():
    """Without the refusal it leaves the clean latent far behind, which is what the refusal is for."""
    objective = ObjectiveSettings()
    assert "dpmpp_2m" in refusal(objective, SamplerSettings("heun", 10))
    assert not refusal(ObjectiveSettings(zero_terminal_snr=False), SamplerSettings("heun", 10))


def test_a_watcher_sees_the_clean_latent_in_every_prediction():
    for objective in (ObjectiveSettings(), OBJECTIVES["epsilon-linear-plain"]):
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings("dpmpp_2m", 6))
        noise, _ = draw_noise([0], (4, 4, 4))
        oracle, seen = Oracle(objective, torch.full((1, 4, 4, 4), 2.0)), []
        sample_latents(oracle, None, noise, sampler, callback=lambda *told, seen=seen: seen.append(told))
        assert len(seen) == 6
        assert [alpha for alpha, *_ in seen] == sorted(alpha for alpha, *_ in seen)
        for alpha, noisy, clean in seen:
            torch.testing.assert_close(clean, oracle.x0, atol=2e-2 if alpha < 1e-3 else 1e-3, rtol=0)
            assert noisy.shape == clean.shape


DIVISORS = [steps for steps in range(1, 1001) if 1000 % steps == 0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_ddim_is_finite_for_every_number_of_steps_and_every_share_of_noise(objective, eta):
    plain = DDIMScheduler.from_config(make_scheduler(objective).config, clip_sample=False)
    finite = 0
    for steps in DIVISORS:
        if refusal(objective, SamplerSettings("ddim", steps, eta)):
            continue
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings("ddim", steps, eta))
        plain.set_timesteps(steps)
        generator = torch.Generator().manual_seed(steps)
        x = usual = torch.randn(1, 1, 2, 2, generator=generator)
        for t in sampler.timesteps:
            noise, prediction = torch.randn(2, 1, 1, 2, 2, generator=generator)
            options = {"eta": eta, "variance_noise": noise if eta else None}
            x = sampler.step(prediction, t, x, return_dict=False, **options)[0]
            assert torch.isfinite(x).all(), (steps, t)
            usual = plain.step(prediction, t, usual, return_dict=False, **options)[0]
        if eta == 0:  # without fresh noise nothing is changed, not even a last digit
            assert torch.equal(x, usual), steps
        finite += 1
    assert finite == len(DIVISORS) or objective.schedule == "squaredcos_cap_v2"


class Constant:
    """Predicts one number everywhere."""

    conditioner = None

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, conditions: None) -> torch.Tensor:
        return torch.full_like(x_t, self.value)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_sampler_is_finite_for_a_constant_and_for_no_prediction(objective, name):
    for steps in (1, 2, 25, 50):
        if refusal(objective, SamplerSettings(name, steps)):
            continue
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings(name, steps))
        for value in (0.0, 1.0):
            noise, generators = draw_noise([3], (4, 2, 2))
            out = sample_latents(Constant(value), None, noise, sampler, generators=generators)
            assert torch.isfinite(out).all(), steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_bring_nothing_to_the_device_but_fresh_noise(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which "meta" has none of
    objective = ObjectiveSettings(zero_terminal_snr=name != "heun")
    brought = []
    for steps in (4, 8):
        sampler = make_sampler(make_scheduler(objective).config, SamplerSettings(name, steps))
        with torch.device("meta"):
            denoiser, noise = make_denoiser(None), torch.empty(2, 4, 8, 8)
        with Counted() as counted:
            sample_latents(denoiser, None, noise, sampler, generators=draw_noise([1, 2], (4, 8, 8))[1])
        brought.append(counted.brought)
    assert brought[1] - brought[0] == (4 if draws_noise(sampler) else 0)


class Casts(TorchDispatchMode):
    """How often each tensor, by its identity, is cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.of[id(args[0])] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "ddpm"])  # unipc's own sums would be cast, too
def test_low_precision_casts_each_weight_once_and_changes_no_pixel(name, schema):
    """However many steps; and the samples are those of autocast around each evaluation alone."""
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings(name, 4))
    conditions = Conditions.from_schema(schema, [{"grade": "benign"}, {"grade": "gleason4", "site": "radboud"}])
    guidance = GuidanceSettings("margins", scale=2.0)
    denoiser, weak = make_denoiser(schema), make_denoiser(schema, 1)
    frozen, states = make_denoiser(schema).requires_grad_(False), []

    def run(network, dtype, other):
        noise, generators = draw_noise([1, 2], (4, 8, 8))
        return sample_latents(
            network,
            conditions,
            noise,
            sampler,
            Guidance(guidance, weak=Autoguidance(other, 1.5)),
            generators,
            dtype=dtype,
            callback=lambda *_: states.append(torch.is_autocast_enabled("cpu")),
        )

    with Casts() as casts:
        made = run(denoiser, torch.bfloat16, weak)
    weights = {id(p) for network in (denoiser, weak) for p in network.parameters()}
    assert {casts.of[w] for w in weights} == {0, 1}
    with Casts() as casts:
        assert torch.equal(run(frozen, torch.bfloat16, weak), made)
    assert {casts.of[id(p)] for p in frozen.parameters()} == {0, 1}
    assert not any(p.requires_grad for p in frozen.parameters())
    assert states
    assert not any(states)  # what is not the network is fp32
    plain = run(denoiser, None, weak)
    assert not torch.equal(plain, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "forward", partial(lowered, denoiser.forward))
        patch.setattr(weak, "forward", partial(lowered, weak.forward))
        assert torch.equal(run(denoiser, None, weak), made)


def lowered(evaluate, *args):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return evaluate(*args)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.25), (0.3, 0.9)])
def test_the_evaluations_of_an_image_are_counted_before(name: str, interval: tuple[float, float]) -> None:
    schema = Schema((Field("class", "class", ("a", "b")), Field("site", "categorical", ("x", "y"))))
    denoiser, asked = make_denoiser(schema), []
    denoiser.unet.register_forward_hook(lambda module, given, result: asked.append(len(given[0])))
    objective = ObjectiveSettings(zero_terminal_snr=False, schedule="linear")
    sampler, guidance = SamplerSettings(name, 10), GuidanceSettings("chain", scale=2.0, interval=interval)
    noise, _ = draw_noise([1, 2, 3], (4, 8, 8))
    conditions = Conditions.from_schema(schema, [{"class": "a", "site": "x"}] * 3)
    made = make_sampler(make_scheduler(objective).config, sampler)
    sample_latents(denoiser, conditions, noise, made, guidance)
    assert network_evaluations(objective, sampler, guidance, schema) == sum(asked) / 3
    assert network_evaluations(objective, sampler, GuidanceSettings(), schema) == len(asked)
