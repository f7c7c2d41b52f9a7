"""Guidance against its formulas, its exact special cases, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusion_parts import Counted, make_denoiser

from latent_medi.core.errors import UserError
from latent_medi.diffusion import guidance as module
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.guidance import (
    Autoguidance,
    Branch,
    ClassifierGuidance,
    FieldGuidance,
    Guidance,
    check_guidance,
    evaluations,
    guidance_branches,
    guidance_of,
    rescaled,
    untrained,
)
from latent_medi.diffusion.objective import Objective, clean_latent, make_scheduler
from latent_medi.diffusion.samplers import draw_noise, make_sampler, sample_latents
from latent_medi.diffusion.settings import DropoutSettings, GuidanceSettings, ObjectiveSettings, SamplerSettings

ROWS = [
    {"grade": "gleason4", "site": "radboud", "gender": "male", "age": 65.0},
    {"grade": "benign", "site": "karolinska", "gender": "unknown", "age": "unknown"},
]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([400, 400])
ONLY_ALL_OR_NONE = {"keep_all": 0.9, "all_null": 0.1, "metadata_null": 0.0, "independent": 0.0, "independent_rate": 0.5}
WITH_CLASS = {"keep_all": 0.8, "all_null": 0.1, "metadata_null": 0.1, "independent": 0.0, "independent_rate": 0.5}


@pytest.fixture(scope="module")
def denoiser(schema):
    return make_denoiser(schema)


@pytest.fixture(scope="module")
def conditions(schema):
    return Conditions.from_schema(schema, ROWS)


def guided(denoiser, x_t, t, conditions, settings, alpha_bar=None):
    return FieldGuidance(denoiser, conditions, settings)(x_t, t, alpha_bar)


def ask(denoiser, conditions, kept):
    keep = torch.tensor([n in kept for n in denoiser.conditioner.schema.names])
    with torch.no_grad():
        return denoiser(X, T, conditions.masked(keep))


@pytest.mark.parametrize(
    "guidance",
    [
        GuidanceSettings(),
        GuidanceSettings("chain"),
        GuidanceSettings("chain", scales={"grade": 1.0, "site": 1.0, "gender": 1.0, "age": 1.0}, order=["age", "site"]),
    ],
)
def test_scales_of_one_are_the_conditional_model_bit_for_bit(denoiser, conditions, guidance):
    with torch.no_grad():
        assert torch.equal(guided(denoiser, X, T, conditions, guidance), denoiser(X, T, conditions))


@pytest.mark.parametrize("form", ["chain", "margins"])
def test_scales_of_zero_are_the_unconditional_model_bit_for_bit(denoiser, conditions, form):
    with torch.no_grad():
        nothing = denoiser(X, T, conditions.null_like())
        assert torch.equal(guided(denoiser, X, T, conditions, GuidanceSettings(form, scale=0.0)), nothing)
    noise, _ = draw_noise([1, 2], (4, 8, 8))
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings(steps=4))
    zero = sample_latents(denoiser, conditions, noise, sampler, GuidanceSettings(form, scale=0.0))
    assert torch.equal(zero, sample_latents(denoiser, conditions.null_like(), noise, sampler))


def test_a_whole_chain_of_steps_with_scales_of_one_is_bit_for_bit_conditional(denoiser, conditions):
    config = make_scheduler(ObjectiveSettings()).config
    noise, _ = draw_noise([1, 2], (4, 8, 8))
    plain, chain = (
        sample_latents(denoiser, conditions, noise, make_sampler(config, SamplerSettings(steps=4)), g)
        for g in (None, GuidanceSettings("chain"))
    )
    assert torch.equal(plain, chain)


def test_chain_by_hand(denoiser, conditions):
    scales = {"site": 2.0, "age": 0.5, "grade": 3.0}
    with torch.no_grad():
        out = guided(denoiser, X, T, conditions, GuidanceSettings("chain", scales=scales))
    order = ["grade", "site", "gender", "age"]  # the class first
    expected = ask(denoiser, conditions, [])
    for j, name in enumerate(order):
        step = ask(denoiser, conditions, order[: j + 1]) - ask(denoiser, conditions, order[:j])
        expected = expected + scales.get(name, 1.0) * step
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_chain_follows_the_order_that_is_asked_for(denoiser, conditions):
    settings = GuidanceSettings("chain", scales={"site": 4.0}, order=["age", "site"])
    with torch.no_grad():
        out = guided(denoiser, X, T, conditions, settings)
    site = ask(denoiser, conditions, ["age", "site"]) - ask(denoiser, conditions, ["age"])
    torch.testing.assert_close(out, ask(denoiser, conditions, ROWS[0]) + 3 * site, atol=1e-4, rtol=1e-4)


def test_margins_by_hand(denoiser, conditions):
    scales = {"site": 2.0, "grade": 3.0, "gender": 0.0}
    with torch.no_grad():
        out = guided(denoiser, X, T, conditions, GuidanceSettings("margins", scale=1.5, scales=scales))
    nothing = ask(denoiser, conditions, [])
    expected = nothing
    for name, scale in {"grade": 3.0, "site": 2.0, "age": 1.5}.items():
        expected = expected + scale * (ask(denoiser, conditions, [name]) - nothing)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_one_scale_for_all_is_classifier_free_guidance_with_two_branches(denoiser, conditions, schema):
    settings = guidance_of(2.5)
    assert guidance_branches(settings, schema) == [Branch(frozenset(), -1.5), Branch(frozenset(schema.names), 2.5)]
    with torch.no_grad():
        out = guided(denoiser, X, T, conditions, settings)
    nothing = ask(denoiser, conditions, [])
    expected = nothing + 2.5 * (ask(denoiser, conditions, schema.names) - nothing)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_all_branches_are_one_call_of_the_network(denoiser, conditions):
    sizes = []
    hook = denoiser.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        guided(denoiser, X, T, conditions, GuidanceSettings("chain", scales={"site": 2.0}))
        guided(denoiser, X, T, conditions, GuidanceSettings("margins"))
    hook.remove()
    assert sizes == [
        3 * 2,
        5 * 2,
    ]  # chain: before and after the site, and everything; margins: nothing and each of four


def test_the_interval_is_in_alpha_bar(denoiser, conditions):
    settings = GuidanceSettings("chain", scale=3.0, interval=(0.1, 0.8))
    with torch.no_grad():
        plain = denoiser(X, T, conditions)
        for alpha_bar in (0.05, 0.9):
            assert torch.equal(guided(denoiser, X, T, conditions, settings, alpha_bar), plain)
        assert not torch.allclose(guided(denoiser, X, T, conditions, settings, 0.5), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("kept", "patterns", "trained"),
    [
        ({"grade", "site", "gender", "age"}, ONLY_ALL_OR_NONE, True),
        (set(), ONLY_ALL_OR_NONE, True),
        ({"grade"}, ONLY_ALL_OR_NONE, False),
        ({"grade"}, WITH_CLASS, True),
        ({"site"}, WITH_CLASS, False),
        ({"site", "age"}, {}, True),  # the default's independent pattern trains every subset
    ],
)
def test_trained_patterns(schema, kept, patterns, trained):
    assert (untrained(frozenset(kept), schema, DropoutSettings(**patterns)) == "") == trained


def test_a_form_whose_patterns_were_not_trained_is_refused_with_the_reason(schema, conditions):
    narrow = make_denoiser(schema, patterns=ONLY_ALL_OR_NONE)
    check_guidance(guidance_of(2.0), narrow.conditioner)  # needs all and nothing only
    with pytest.raises(UserError, match="never trained with grade given and site, gender, age left out"):
        check_guidance(GuidanceSettings("chain", scales={"grade": 2.0}), narrow.conditioner)
    with pytest.raises(UserError, match="never trained with grade given"):
        check_guidance(GuidanceSettings("margins"), narrow.conditioner)
    with_class = make_denoiser(schema, patterns=WITH_CLASS).conditioner
    check_guidance(GuidanceSettings("chain", scale=2.0, scales={"grade": 3.0}), with_class)
    with pytest.raises(UserError, match="never trained with grade, site given"):
        check_guidance(GuidanceSettings("chain", scale=2.0, scales={"gender": 3.0}), with_class)
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings(steps=2))
    with pytest.raises(UserError, match="never trained"):
        sample_latents(narrow, conditions, X, sampler, GuidanceSettings("margins"))


def test_conditions_left_out_are_refused_unless_trained(schema):
    class_only = Conditions.from_schema(schema, [{"grade": "benign"}])
    check_guidance(GuidanceSettings(), make_denoiser(schema, patterns=WITH_CLASS).conditioner, class_only)
    with pytest.raises(UserError, match="site, gender, age left out"):
        check_guidance(GuidanceSettings(), make_denoiser(schema, patterns=ONLY_ALL_OR_NONE).conditioner, class_only)


def test_margins_never_ask_for_the_joint_but_outside_an_interval(schema, conditions):
    alone = make_denoiser(schema, patterns={**ONLY_ALL_OR_NONE, "keep_all": 0.0, "all_null": 1.0}).conditioner
    two = schema.subset(["grade", "site"])
    margins = GuidanceSettings("margins")
    assert all(len(b.fields) <= 1 for b in guidance_branches(margins, two))
    with pytest.raises(UserError, match="nothing left out"):
        check_guidance(GuidanceSettings(), alone, conditions)


def test_settings_that_mean_nothing_are_refused(schema):
    conditioner = make_denoiser(schema).conditioner
    for settings, why in [
        (GuidanceSettings("chain", scales={"sites": 2.0}), "closest: 'site'"),
        (GuidanceSettings("chain", order=["site", "site"]), "twice"),
        (GuidanceSettings(scales={"site": 2.0}), "guidance.form"),
        (GuidanceSettings("chain", interval=(0.5, 0.2)), "interval"),
    ]:
        with pytest.raises(UserError, match=why):
            check_guidance(settings, conditioner)
    with pytest.raises(UserError, match="form is 'cfg'"):
        GuidanceSettings("cfg")
    with pytest.raises(UserError, match="unconditional"):
        check_guidance(GuidanceSettings("chain"), None)


def test_rescaling_brings_the_standard_deviation_back(denoiser, conditions, schema):
    strong = GuidanceSettings("margins", scale=6.0)
    with torch.no_grad():
        plain, whole = guided(denoiser, X, T, conditions, strong), denoiser(X, T, conditions)
        full = guided(denoiser, X, T, conditions, replace(strong, rescale=1.0))
        half = guided(denoiser, X, T, conditions, replace(strong, rescale=0.5))
    torch.testing.assert_close(full.flatten(1).std(1), whole.flatten(1).std(1), rtol=1e-3, atol=0)
    assert not torch.allclose(plain.flatten(1).std(1), whole.flatten(1).std(1), rtol=1e-3)
    torch.testing.assert_close(half, (full + plain) / 2, rtol=1e-3, atol=1e-4)
    # The margins alone need no joint of all; what they are brought back to does.
    assert evaluations(strong, schema) == 5
    assert evaluations(replace(strong, rescale=0.5), schema) == 6
    assert evaluations(GuidanceSettings("chain", scale=3.0, rescale=0.5), schema) == 2
    with pytest.raises(UserError, match=r"rescale is 1\.5"):
        replace(strong, rescale=1.5)
    with pytest.raises(UserError, match="form"):
        guidance_branches(GuidanceSettings(rescale=0.5), schema)


def test_autoguidance_by_hand(schema, denoiser, conditions):
    torch.manual_seed(3)
    weak = make_denoiser(schema)
    with torch.no_grad():
        for parameter in weak.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        strong, other = denoiser(X, T, conditions), weak(X, T, conditions)
        guide = Autoguidance(weak, 2.0, (0.1, 0.8))
        expected = other + 2.0 * (strong - other)
        torch.testing.assert_close(guide.guide(strong, X, T, conditions, 0.5), expected)
        assert not torch.allclose(expected, strong, atol=1e-3)
        assert guide.guide(strong, X, T, conditions, 0.9) is strong  # outside its interval
        assert Autoguidance(weak, 1.0).guide(strong, X, T, conditions, 0.5) is strong
    noise, _ = draw_noise([1, 2], (4, 8, 8))
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings(steps=3))
    plain = sample_latents(denoiser, conditions, noise, sampler)
    one, two = (Guidance(weak=Autoguidance(weak, scale)) for scale in (1.0, 2.0))
    assert torch.equal(sample_latents(denoiser, conditions, noise, sampler, one), plain)
    assert not torch.allclose(sample_latents(denoiser, conditions, noise, sampler, two), plain)
    for scale, interval in ((2.0, (0.5, 0.5)), (float("nan"), (0.0, 1.0))):
        with pytest.raises(UserError):
            Autoguidance(weak, scale, interval)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_classifier_guidance_moves_epsilon_by_its_formula(prediction):
    objective = Objective(ObjectiveSettings(prediction=prediction, zero_terminal_snr=False))
    direction = torch.randn(2, 4, 8, 8)
    classifier = ClassifierGuidance(lambda x, t: (x * direction).sum((1, 2, 3)), scale=2.0)
    alpha_bar = objective.alphas_cumprod[400].item()
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x_t = objective.add_noise(x0, noise, T)
    out = classifier.guide(objective.target(x0, noise, T), x_t, T, alpha_bar, prediction)
    epsilon = (x_t - alpha_bar**0.5 * clean_latent(out, x_t, alpha_bar, prediction)) / (1 - alpha_bar) ** 0.5
    torch.testing.assert_close(epsilon, noise - 2 * (1 - alpha_bar) ** 0.5 * direction, atol=1e-4, rtol=1e-4)


def test_classifier_guidance_leaves_noise_alone():
    classifier = ClassifierGuidance(lambda x, t: x.sum((1, 2, 3)), scale=2.0)
    out = torch.zeros_like(X)
    assert classifier.guide(out, X, T, 0.004, "v_prediction") is out
    assert classifier.guide(out, X, T, 0.006, "v_prediction").abs().max() > 0
    assert ClassifierGuidance(lambda x, t: x.sum(), scale=0.0).guide(out, X, T, 0.5, "epsilon") is out
    with pytest.raises(UserError, match="interval"):
        ClassifierGuidance(lambda x, t: x.sum(), interval=(0.0, 1.0))


def test_classifier_guidance_works_in_the_sampling_loop(denoiser, conditions):
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings(steps=6))
    noise, _ = draw_noise([1, 2], (4, 8, 8))
    up = ClassifierGuidance(lambda x, t: x.mean((1, 2, 3)) * 100, scale=1.0)
    plain = sample_latents(denoiser, conditions, noise, sampler)
    pushed = sample_latents(denoiser, conditions, noise, sampler, Guidance(classifier=up))
    assert pushed.mean() > plain.mean()
    assert torch.isfinite(pushed).all()


@pytest.mark.parametrize("form", ["chain", "margins"])
def test_what_branches_are_asked_is_made_once_however_many_steps(form, schema):
    plain = schema.subset(["grade", "site", "gender"])  # a continuous field's embedding masks, too
    denoiser, config = make_denoiser(plain), make_scheduler(ObjectiveSettings()).config
    rows = Conditions.from_schema(plain, [{"grade": "gleason4", "site": "radboud"}] * 2)
    masks = []
    for steps in (2, 7):
        with Counted() as counted:
            sampler = make_sampler(config, SamplerSettings(steps=steps))
            sample_latents(denoiser, rows, X, sampler, GuidanceSettings(form, scale=2.0))
        masks.append(counted.masks)
    assert 0 < masks[0] == masks[1]


def test_branches_are_brought_to_the_device_at_once_and_never_again(schema):
    with torch.device("meta"):
        denoiser, x_t, t = make_denoiser(schema), torch.empty(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    rows = Conditions.from_schema(schema, ROWS).to("meta")
    with Counted() as counted:
        guide = FieldGuidance(denoiser, rows, GuidanceSettings("margins", scale=2.0))
        for alpha_bar in (0.1, 0.5, 0.9):
            guide(x_t, t, alpha_bar)
    assert len(guide.branches) > 2
    assert counted.brought == 1


def test_a_classifier_s_gradient_is_repeatable_on_a_gpu_and_only_there():
    """Neither the choice of cuDNN's algorithms nor that of attention is left to chance, in both directions."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

    def state():
        fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        return (cudnn.deterministic, cudnn.benchmark, *fused, cuda.math_sdp_enabled(), cudnn.allow_tf32)

    seen = []

    def log_probability(x, t):
        seen.append(state())
        x.register_hook(lambda _: seen.append(state()))
        return x.sum((1, 2, 3))

    def broken(x, t):
        raise ValueError("no probability")

    asked, as_on = [], module.repeatable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "benchmark", True)
        patch.setattr(cudnn, "allow_tf32", False)
        before = state()
        ClassifierGuidance(log_probability).guide(X, X, T, 0.5, "epsilon")
        assert seen == [before] * 2
        seen.clear()
        patch.setattr(module, "repeatable", lambda device: asked.append(device) or as_on(torch.device("cuda:0")))
        ClassifierGuidance(log_probability).guide(X, X, T, 0.5, "epsilon")
        assert asked == [X.device]
        assert seen == [(True, False, False, False, False, True, False)] * 2
        assert state() == before
        with pytest.raises(ValueError, match="no probability"):
            ClassifierGuidance(broken).guide(X, X, T, 0.5, "epsilon")
        assert state() == before


def test_rescaling_leaves_a_prediction_without_spread_as_it_is():
    flat = torch.full((1, 4, 8, 8), 0.5)
    assert torch.equal(rescaled(flat, X[:1], 0.7), flat)
    assert torch.allclose(rescaled(2 * X, X, 1.0), X)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_finite_number_is_refused(scale, schema):
    with pytest.raises(UserError, match="finite"):
        guidance_branches(GuidanceSettings(form="chain", scale=scale), schema)
    with pytest.raises(UserError, match="finite"):
        ClassifierGuidance(lambda x, t: x.sum((1, 2, 3)), scale)
