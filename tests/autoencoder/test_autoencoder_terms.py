"""The terms of an autoencoder's loss: values by hand, and where their gradients go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from parts import random_images, random_model
from safetensors.torch import save_file

from latent_medi.autoencoder.data import UNLABELLED, PixelBatch, open_pixels
from latent_medi.autoencoder.losses import TERMS, TrainedAutoencoder, adaptive_weight, divergence, hinge
from latent_medi.autoencoder.measure import distances
from latent_medi.autoencoder.networks import (
    AuxiliaryClassifier,
    Discriminator,
    encoder_parts,
    last_layer,
    new_autoencoder,
)
from latent_medi.autoencoder.perceptual import PerceptualDistance, load_perceptual
from latent_medi.autoencoder.settings import (
    AdversarialSettings,
    AutoencoderSettings,
    AuxiliarySettings,
    NewNetworkSettings,
    PerceptualSettings,
)
from latent_medi.core.errors import UserError
from latent_medi.features.classifier_folder import ClassifierFacts, write_classifier
from latent_medi.features.registry import Preprocessing
from latent_medi.latents.networks import factor_of, moments_of, pixels_of
from latent_medi.launch import make_accelerator

CLASSIFIER = AuxiliarySettings(0.3, network="test_vit")
DISCRIMINATOR = AdversarialSettings(0.5, channels=8, layers=2)


def settings(**values: Any) -> AutoencoderSettings:
    return AutoencoderSettings(**{"data": "", "out": "", "max_steps": 1, **values})


def batch(count: int = 4, labels: list[int] | None = None, seen: int = 0, channels: int = 4) -> PixelBatch:
    noise = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    known = torch.tensor(labels or [i % 2 for i in range(count)])
    return PixelBatch(torch.from_numpy(random_images(count)), noise, known, seen)


def trained(kind: str = "AutoencoderKL", **values: Any) -> TrainedAutoencoder:
    torch.manual_seed(0)
    return TrainedAutoencoder(random_model(kind), settings(**values), 2, 32)


def gradients(network: TrainedAutoencoder, part: PixelBatch, distance: Any = None) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(part, distance)[0].backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_divergence_of_a_normal_distribution_from_the_standard_one() -> None:
    mean, std = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 2.0]])
    by_hand = 0.0 + 0.5 + (0.5 * (4 - 1) - np.log(2))  # one summand per latent value
    assert divergence(mean, std).item() == pytest.approx(by_hand)
    moments = torch.randn(3, 8, 4, 4)
    theirs = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(divergence(theirs.mean, theirs.std), theirs.kl())


def test_hinge_by_hand() -> None:
    real, made = torch.tensor([[2.0, 0.5], [0.0, -1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    # (0 + 0.5)/2 and (0 + 1)/2; (1 + 2)/2 and (2 + 0.5)/2
    assert hinge(real, made).tolist() == [0.5 * (0.25 + 0.5), 0.5 * (1.5 + 1.25)]


def test_adaptive_weight_by_hand() -> None:
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(torch.tensor([30.0]), torch.zeros(2)).item() == 1e4


def test_perceptual_distance_by_hand() -> None:
    """Vectors of channels at two positions, at right angles and the same up to a factor, in one of two layers."""
    x = torch.tensor([[[[3.0, 2.0]], [[0.0, 2.0]]]])
    y = torch.tensor([[[[0.0, 5.0]], [[1.0, 5.0]]]])
    identity = torch.nn.Identity()
    none = Preprocessing(0, (0.0,), (1.0,))
    distance = PerceptualDistance(lambda v: [v, torch.ones_like(v)], identity, none, "")
    assert distance(x, y).tolist() == pytest.approx([(2.0 + 0.0) / 2 / 2])  # positions, then layers
    assert distance(x, x).tolist() == [0.0]


def test_terms_of_a_batch_are_sums_over_its_patches() -> None:
    network, part = trained(classifier=CLASSIFIER, adversarial=DISCRIMINATOR, l2=2.0, kl=1e-3), batch()
    network.adaptive.fill_(3.0)
    total, each = network(part, None)
    found = dict(zip(TERMS, each.tolist(), strict=True))
    x = part.images.permute(0, 3, 1, 2).float() / 255
    mean, std = moments_of(network.autoencoder, x)
    made = pixels_of(network.autoencoder, mean + std * part.noise)
    assert found["l1"] == pytest.approx((made - x).abs().mean((1, 2, 3)).sum().item(), rel=1e-5)
    assert found["l2"] == pytest.approx((made - x).square().mean((1, 2, 3)).sum().item(), rel=1e-5)
    assert found["kl"] == pytest.approx(divergence(mean, std).sum().item() / (3 * 32 * 32), rel=1e-5)
    logits = network.classifier(made)  # type: ignore[misc]
    assert found["classifier"] == pytest.approx(-logits.log_softmax(1)[range(4), part.labels].sum().item(), rel=1e-5)
    weights = {"l1": 1.0, "l2": 2.0, "kl": 1e-3, "classifier": 0.3, "classifier_real": 1.0, "discriminator": 1.0}
    weights["adversarial"] = 0.5 * 3.0
    assert total.item() == pytest.approx(sum(w * found[name] for name, w in weights.items()), rel=1e-5)
    halves = [network(half, None)[1] for half in part.parts(2, torch.device("cpu"))]
    torch.testing.assert_close(halves[0] + halves[1], each)


def test_each_network_learns_from_its_own_terms_alone() -> None:
    part = batch()
    both = gradients(trained(classifier=CLASSIFIER, adversarial=DISCRIMINATOR), part)
    plain = gradients(trained(), part)
    assert any(name.startswith("discriminator") for name in both)
    # The adaptive weight of the first update is 0, and the classifier changes the autoencoder's gradient.
    name = "autoencoder.decoder.conv_out.weight"
    assert not torch.equal(both[name], plain[name])
    alone = trained(classifier=CLASSIFIER, adversarial=DISCRIMINATOR)
    with torch.no_grad():  # reconstructions of the same pixels whatever the weights of the other two are
        x = part.images.permute(0, 3, 1, 2).float() / 255
        mean, std = moments_of(alone.autoencoder, x)
        made = pixels_of(alone.autoencoder, mean + std * part.noise)
    alone.zero_grad()
    torch.nn.functional.cross_entropy(alone.classifier(x), part.labels, reduction="sum").backward()  # type: ignore[misc]
    hinge(alone.discriminator(x), alone.discriminator(made)).sum().backward()  # type: ignore[misc]
    for name, parameter in alone.named_parameters():
        if not name.startswith("autoencoder"):
            torch.testing.assert_close(both[name], parameter.grad, msg=name)


def test_the_adaptive_weight_is_of_the_update_before_and_of_the_whole_batch() -> None:
    accelerator, found = make_accelerator(cpu=True), []
    for size in (4, 2):
        network = trained(adversarial=DISCRIMINATOR, global_batch=4)
        assert network.adaptive.item() == 0.0
        for part in batch().parts(size, torch.device("cpu")):
            network(part, None)[0].backward()
        network.end_update(accelerator)
        found.append(network.adaptive.item())
    whole = trained(adversarial=DISCRIMINATOR)
    part = batch()
    x = part.images.permute(0, 3, 1, 2).float() / 255
    mean, std = moments_of(whole.autoencoder, x)
    made = pixels_of(whole.autoencoder, mean + std * part.noise)
    layer = last_layer(whole.autoencoder)
    pixels = torch.autograd.grad((made - x).abs().mean((1, 2, 3)).mean(), layer, retain_graph=True)[0]
    other = torch.autograd.grad(-whole.discriminator(made).mean((1, 2, 3)).mean(), layer)[0]  # type: ignore[misc]
    assert found == pytest.approx([adaptive_weight(pixels, other).item()] * 2, rel=1e-4)


def test_the_discriminator_begins_where_it_should() -> None:
    network = trained(adversarial=AdversarialSettings(0.5, 100, channels=8, layers=2))
    before, after = (gradients(network, batch(seen=seen)) for seen in (99, 100))
    names = [name for name in before if name.startswith("discriminator")]
    assert names
    assert all(before[name].abs().sum() == 0 for name in names)
    assert any(after[name].abs().sum() > 0 for name in names)


def test_unlabelled_patches_take_part_in_the_other_terms_only() -> None:
    network = trained(classifier=CLASSIFIER)
    whole = network(batch(2, [1, UNLABELLED]), None)[1]
    labelled = network(PixelBatch(*(t[:1] for t in (batch(2).images, batch(2).noise)), torch.tensor([1]), 0), None)[1]
    at = TERMS.index("classifier")
    assert whole[at].item() == pytest.approx(labelled[at].item(), rel=1e-4)
    assert whole[0] > labelled[0]
    assert network(batch(2, [UNLABELLED] * 2), None)[1][at] == 0


def test_a_trained_classifier_stays_as_it_is_and_has_its_own_labels(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)  # its batch statistics must stay too
    how = Preprocessing(48, (0.5,) * 3, (0.25,) * 3, "bicubic")
    facts = ClassifierFacts("test_resnet", ["other", "tumour", "benign"], "class", how, 32, 0.5, "patient")
    write_classifier(tmp_path / "model", network.state_dict(), facts)
    chosen = settings(classifier=AuxiliarySettings(0.3, str(tmp_path / "model")), data=str(tiny / "data"))
    data = open_pixels(chosen, 4, 4)
    classes = data.dataset.index["class"].to_numpy()[data.rows]
    assert data.values == ("other", "tumour", "benign")
    assert data.labels.tolist() == [{"tumour": 1, "benign": 2}[value] for value in classes]
    torch.manual_seed(0)
    trained = TrainedAutoencoder(random_model(), chosen, 3, 32).train()
    before = {name: tensor.clone() for name, tensor in trained.classifier.state_dict().items()}
    found = gradients(trained, batch(labels=[1, 2, 1, 0]))
    assert all(name.startswith("autoencoder") for name in found)
    assert trained.rates == {"autoencoder": 1.0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.classifier.state_dict().items())
    part = batch(labels=[1, 2, 1, 0])
    x = part.images.permute(0, 3, 1, 2).float() / 255
    mean, std = moments_of(trained.autoencoder, x)
    made = pixels_of(trained.autoencoder, mean + std * part.noise)
    inside = torch.nn.functional.interpolate(made, size=(48, 48), mode="bicubic", antialias=True)
    logits = network.eval()((inside - 0.5) / 0.25)
    each = trained(part, None)[1]
    assert each[TERMS.index("classifier")].item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, part.labels, reduction="sum").item(), rel=1e-4
    )
    assert each[TERMS.index("classifier_real")] == 0


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2"])
def test_the_decoder_alone_has_gradients(kind: str) -> None:
    network = trained(kind, train="decoder")
    found = gradients(network, batch(channels=4 if kind == "AutoencoderKL" else 0))
    encoder = {p for part in encoder_parts(network.autoencoder) for p in part.parameters()}
    names = {name for name, p in network.named_parameters() if p not in encoder}
    assert set(found) == names
    assert all(name.startswith(("autoencoder.decoder", "autoencoder.post_quant_conv")) for name in names)


def test_gradient_of_the_whole_loss_equals_finite_differences() -> None:
    network, part = trained(l2=1.0, kl=1e-2, classifier=CLASSIFIER), batch()
    weight = network.autoencoder.decoder.conv_out.bias

    def autoencoder_loss() -> torch.Tensor:
        total, each = network(part, None)
        return total - each[TERMS.index("classifier_real")]

    found = torch.autograd.grad(autoencoder_loss(), weight)[0]
    step, numbers = 1e-2, []
    for i in range(3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i] += sign * step
                values.append(autoencoder_loss().item())
                weight[i] -= sign * step
        numbers.append((values[0] - values[1]) / (2 * step))
    assert found.tolist() == pytest.approx(numbers, rel=2e-2, abs=2e-3)


def test_new_autoencoders_have_the_shape_that_was_asked_for() -> None:
    for kind, channels, factor in (
        ("AutoencoderKL", [8, 16], 2),
        ("AutoencoderTiny", [8, 8, 8], 4),
        ("AutoencoderTAEF2", [8], 8),
    ):
        model = new_autoencoder(NewNetworkSettings(kind, channels, 1, 3, 4))  # type: ignore[arg-type]
        assert factor_of(model) == factor
        mean, std = moments_of(model, torch.rand(1, 3, 16, 16))
        assert mean.shape == (1, 3, 16 // factor, 16 // factor)
        assert (std is not None) == (kind == "AutoencoderKL")
        assert pixels_of(model, mean).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="norm_groups=32 does not divide 8"):
        new_autoencoder(NewNetworkSettings(channels=[8, 32]))


def test_networks_that_are_trained_along_judge_each_image_alone() -> None:
    """Neither has batch statistics, so that the result does not depend on device_batch."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 32, 32)
    for network in (AuxiliaryClassifier("test_resnet", 2, 32), Discriminator(8, 2)):
        torch.testing.assert_close(network.train()(x)[:1], network(x[:1]))
    with pytest.raises(UserError, match="timm has no network 'resnet81'"):
        AuxiliaryClassifier("resnet81", 2, 32)
    with pytest.raises(UserError, match="batch normalisation"):
        AuxiliaryClassifier("test_byobnet", 2, 32)


def test_distances_of_few_patches_are_taken_after_a_projection() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(12, 8)), rng.normal(1.0, size=(12, 8))
    kid, fd, dims = distances(real, made)
    assert dims == 3  # a quarter of the patches
    assert kid > 0
    assert fd > 0
    assert distances(real, real)[1] == pytest.approx(0.0, abs=1e-9)
    assert distances(np.tile(real, (2, 1)), np.tile(made, (2, 1)))[2] == 8


def test_perceptual_networks_are_pluggable(shared: Path, tmp_path: Path) -> None:
    """SqueezeNet, a network of timm from a file, and an encoder's features: each sees a change, and its gradient."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "network.safetensors")
    x = torch.from_numpy(random_images(2)).permute(0, 3, 1, 2).float() / 255
    found = set()
    for name, weights in (
        ("squeezenet", str(shared / "models" / "squeezenet")),
        ("test_resnet", str(tmp_path / "network.safetensors")),
        ("demo", ""),
    ):
        distance = load_perceptual(PerceptualSettings(1.0, name, weights))
        assert distance(x, x).abs().max() < 1e-6
        other = (x * 0.5).requires_grad_()
        value = distance(other, x)
        assert value.shape == (2,)
        assert (value > 0).all()
        value.sum().backward()
        assert other.grad is not None
        assert other.grad.abs().sum() > 0
        found.add(distance.identity)
    assert len(found) == 3
    with pytest.raises(UserError, match="do not exist"):
        load_perceptual(PerceptualSettings(1.0, "squeezenet", str(tmp_path / "none")))
    with pytest.raises(UserError, match="does not fit the network resnet10t: conv1"):
        load_perceptual(PerceptualSettings(1.0, "resnet10t", str(tmp_path / "network.safetensors")))
