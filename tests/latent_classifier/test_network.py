"""The classifier's network, its folder, what it guides, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusion_parts import Counted

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json, write_json
from latent_medi.diffusion.guidance import ClassifierGuidance
from latent_medi.diffusion.objective import Objective, clean_latent, make_scheduler
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latent_classifier.network import CONFIG_FILE, WEIGHTS_FILE, LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.network_settings import EncoderSettings

SMALL = EncoderSettings([16, 32], 1, attention_head_dim=16, norm_num_groups=8)
VALUES = ("benign", "gleason3", "gleason4")
X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([10, 300, 600, 900])


def make_classifier(settings: EncoderSettings = SMALL, **changes) -> LatentClassifier:
    torch.manual_seed(0)
    parts = {
        "network": LatentEncoder(settings, 4, 8, len(VALUES)),
        "settings": settings,
        "latent_shape": (4, 8, 8),
        "field": "grade",
        "values": VALUES,
        "objective": ObjectiveSettings(),
        "shift": torch.tensor([0.1, -0.2, 0.3, 0.0]),
        "scale": torch.tensor([1.0, 2.0, 0.5, 1.5]),
        "autoencoder_hash": "a" * 64,
        "provenance": {"name": "tiny"},
    }
    return LatentClassifier(**{**parts, **changes})


def autoencoder_like(digest: str) -> SimpleNamespace:
    return SimpleNamespace(hash=digest, description={"hash": digest})


def model_like(classifier: LatentClassifier, **changes) -> SimpleNamespace:
    """What check_model looks at of a pipeline that fits the classifier."""
    fits = {
        "autoencoder": autoencoder_like(classifier.autoencoder_hash),
        "latent_shape": classifier.latent_shape,
        "shift": classifier.shift.clone(),
        "scale": classifier.scale.clone(),
        "scheduler": make_scheduler(classifier.objective),
    }
    return SimpleNamespace(**{**fits, **changes})


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("attention", [None, [False, False], [True, True]])
def test_every_network_gives_finite_logits_and_trains_every_weight(pooling, attention):
    torch.manual_seed(0)
    network = LatentEncoder(replace(SMALL, pooling=pooling, attention=attention), 4, 8, 3)
    logits = network(X, T)
    assert logits.shape == (4, 3)
    assert torch.isfinite(logits).all()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert sum(float(p.grad.abs().sum()) > 0 for p in network.parameters()) > 0.9 * len(list(network.parameters()))


def test_the_timestep_changes_the_answer():
    network = make_classifier().network
    with torch.no_grad():
        assert not torch.allclose(network(X, T), network(X, T.flip(0)))


def test_a_sample_does_not_depend_on_its_batch():
    network = make_classifier().network
    with torch.no_grad():
        together, alone = network(X, T), torch.cat([network(X[i : i + 1], T[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_log_probability_is_that_of_the_wanted_class_and_rows_choose_samples():
    classifier = make_classifier()
    wanted = ["gleason4", "benign", "gleason3", "benign"]
    asked = classifier.log_probability(wanted)
    every = classifier.probabilities(X, T).log()
    expected = torch.stack([every[i, VALUES.index(value)] for i, value in enumerate(wanted)])
    torch.testing.assert_close(asked(X, T).detach(), expected, atol=1e-5, rtol=1e-5)
    index = torch.tensor([2, 0, 0])
    torch.testing.assert_close(asked.rows(index)(X[index], T[index]), expected[index], atol=1e-5, rtol=1e-5)
    one = classifier.log_probability(["gleason3"])
    torch.testing.assert_close(one(X, T), every[:, 1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"3 samples and 4"):
        asked(X[:3], T[:3])
    with pytest.raises(UserError, match="closest: 'gleason"):
        classifier.log_probability(["gleason5"])
    with pytest.raises(UserError, match="No value"):
        classifier.log_probability([])


def test_wanted_classes_are_brought_to_the_network_s_device_once_not_at_every_step():
    classifier, x_t, t = make_classifier().to("meta"), X.to("meta"), T.to("meta")
    asked = classifier.log_probability(["gleason4", "benign", "gleason3", "benign"])
    with Counted() as counted:
        for _ in range(3):
            asked(x_t, t)
    assert counted.brought == 0


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_guidance_follows_its_gradient(prediction):
    """ε′ = ε − s·√(1−ᾱ)·∇ log p, with the gradient from autograd over the softmax written out, and from the change of
    log p along it and along random directions (finite differences)."""
    classifier = make_classifier()
    objective = Objective(ObjectiveSettings(prediction=prediction, zero_terminal_snr=False))
    t, scale, wanted = torch.full((4,), 400), 3.0, ["gleason4", "benign", "gleason3", "benign"]
    alpha_bar = objective.alphas_cumprod[400].item()
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    x_t = objective.add_noise(X, noise, t)
    guidance = ClassifierGuidance(classifier.log_probability(wanted), scale)
    out = guidance.guide(objective.target(X, noise, t), x_t, t, alpha_bar, prediction)
    epsilon = (x_t - alpha_bar**0.5 * clean_latent(out, x_t, alpha_bar, prediction)) / (1 - alpha_bar) ** 0.5

    x = x_t.clone().requires_grad_(True)
    logits = classifier.network(x, t)
    each = [logits[i, VALUES.index(value)] - logits[i].exp().sum().log() for i, value in enumerate(wanted)]
    gradient = torch.stack([torch.autograd.grad(p, x, retain_graph=True)[0][i] for i, p in enumerate(each)])
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(epsilon, noise - scale * (1 - alpha_bar) ** 0.5 * gradient, atol=1e-4, rtol=1e-4)

    asked, small = classifier.log_probability(wanted), 0.05
    followed = (noise - epsilon) / (scale * (1 - alpha_bar) ** 0.5)
    for direction in (gradient, *torch.randn(4, *gradient.shape, generator=torch.Generator().manual_seed(3))):
        step = small * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        with torch.no_grad():
            change = (asked(x_t + step, t) - asked(x_t - step, t)) / 2
        torch.testing.assert_close(change / small, (followed * step / small).sum((1, 2, 3)), rtol=0.02, atol=1e-4)


def test_saved_and_loaded_is_the_same(tmp_path: Path):
    classifier = make_classifier()
    classifier.save_pretrained(tmp_path / "c")
    again = LatentClassifier.from_pretrained(tmp_path / "c")
    assert torch.equal(classifier.probabilities(X, T), again.probabilities(X, T))
    for name in ("hash", "field", "values", "settings", "objective", "latent_shape", "autoencoder_hash", "provenance"):
        assert getattr(classifier, name) == getattr(again, name), name
    assert torch.equal(classifier.shift, again.shift)
    assert torch.equal(classifier.scale, again.scale)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert make_classifier(values=VALUES[::-1]).hash != classifier.hash
    assert make_classifier(scale=classifier.scale * 2).hash != classifier.hash


def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path):
    folder = tmp_path / "c"
    make_classifier().save_pretrained(folder)
    sealed = read_json(folder / CONFIG_FILE)
    write_json(folder / CONFIG_FILE, {**sealed, "field": "site"})
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        LatentClassifier.from_pretrained(folder)
    config = {key: value for key, value in sealed.items() if key != "seal"}  # as an earlier version left it
    write_json(folder / CONFIG_FILE, {**config, "format": 99})
    with pytest.raises(UserError, match="format 99"):
        LatentClassifier.from_pretrained(folder)
    write_json(folder / CONFIG_FILE, {**config, "kind": "a UNet"})
    with pytest.raises(UserError, match="no latent classifier"):
        LatentClassifier.from_pretrained(folder)
    write_json(folder / CONFIG_FILE, config)
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        LatentClassifier.from_pretrained(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no classifier"):
        make_classifier().save_pretrained(tmp_path / "other")


def test_a_model_with_other_latents_or_another_schedule_is_refused():
    classifier = make_classifier()
    classifier.check_model(model_like(classifier))
    # A prediction type is no matter of the noise; neither are the last digits of a mean.
    classifier.check_model(model_like(classifier, shift=classifier.shift + 1e-6))
    same_noise = ObjectiveSettings(weighting="uniform", loss="l1")
    classifier.check_model(model_like(classifier, scheduler=make_scheduler(same_noise)))
    for changes, why in [
        ({"autoencoder": autoencoder_like("b" * 64)}, "its autoencoder is bbbb"),
        ({"shift": classifier.shift + 0.1}, "the shift of its latents"),
        ({"scale": classifier.scale * 1.01}, "the scale of its latents"),
        ({"latent_shape": (4, 16, 16)}, "4×16×16, the classifier's 4×8×8"),
        ({"scheduler": make_scheduler(ObjectiveSettings(timesteps=500))}, "500 timesteps, the classifier 1000"),
        ({"scheduler": make_scheduler(ObjectiveSettings(schedule="linear"))}, "noise schedule differs"),
        ({"scheduler": make_scheduler(ObjectiveSettings(zero_terminal_snr=False))}, "noise schedule differs"),
    ]:
        with pytest.raises(UserError, match=why):
            classifier.check_model(model_like(classifier, **changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attention_head_dim": 24}, "does not divide the attention width 32"),
        ({"norm_num_groups": 5}, "norm_num_groups 5"),
        ({"block_out_channels": [16] * 5}, "cannot be halved"),
        ({"attention": [True]}, "1 entries for 2"),
        ({"pooling": "max"}, "pooling is 'max'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        LatentEncoder(replace(SMALL, **changes), 4, 8, 3)
