"""The network in training, an autoencoder with what is trained along, and the terms of its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from latent_medi.autoencoder.data import UNLABELLED, PixelBatch
from latent_medi.autoencoder.networks import (
    AuxiliaryClassifier,
    Discriminator,
    TrainedClassifier,
    encoder_parts,
    held,
    last_layer,
)
from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.latents.networks import moments_of, pixels_of

TERMS = ("l1", "l2", "perceptual", "kl", "classifier", "classifier_real", "adversarial", "discriminator")
"""What is measured of every update, before weights. "classifier" is on reconstructions and trains the autoencoder;
"classifier_real" is on patches and trains a classifier along; "discriminator" trains the discriminator."""

_LARGEST = 1e4  # of the adaptive weight, as in latent diffusion
_LEAST_NORM = 1e-4

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def divergence(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL divergence of diagonal normal distributions from the standard normal one, in nats: Σ (μ² + σ² − 1)/2 − ln σ.

    Args:
        mean, std: [n, …].

    Returns:
        [n].
    """
    return (0.5 * (mean.square() + std.square() - 1.0) - std.log()).flatten(1).sum(1)


def hinge(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss (max(0, 1 − D(x)) + max(0, 1 + D(x̂)))/2, averaged over each image's logits.

    Args:
        real, made: Logits [n, …] of patches and of reconstructions.

    Returns:
        [n].
    """
    return 0.5 * (F.relu(1.0 - real).flatten(1).mean(1) + F.relu(1.0 + made).flatten(1).mean(1))


def adaptive_weight(pixels: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """‖∇ pixels‖ / (‖∇ adversarial‖ + 10⁻⁴), at most 10⁴ (Esser et al. 2021, arXiv 2012.09841, equation 7).

    Args:
        pixels, adversarial: Gradients of both terms at the decoder's last layer.
    """
    return (pixels.norm() / (adversarial.norm() + _LEAST_NORM)).clamp(max=_LARGEST)


class TrainedAutoencoder(nn.Module):
    """An autoencoder, and the classifier and the discriminator that are trained along.

    One backward pass serves all: reconstructions pass through copies whose weights take no gradient, and what trains
    the classifier and the discriminator gives the autoencoder none. All are updated at once.

    Args:
        autoencoder: A network of a supported kind.
        settings: The terms.
        classes: Classes of the auxiliary classifier.
        size: Edge of the images in pixels.

    Attributes:
        adaptive: The discriminator's adaptive weight in the next update, []. It is of the update before, so that it
            does not depend on how a batch is divided; 0 in the discriminator's first update.
    """

    adaptive: torch.Tensor

    def __init__(self, autoencoder: nn.Module, settings: AutoencoderSettings, classes: int, size: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder.train().requires_grad_(True)
        if settings.train == "decoder":
            for part in encoder_parts(autoencoder):
                part.requires_grad_(False)
        self.settings, self.trains_encoder = settings, settings.train == "both"
        self.classifier: nn.Module | None = None
        self.discriminator: nn.Module | None = None
        if settings.classifier.weight and settings.classifier.model:
            self.classifier = TrainedClassifier(settings.classifier.model)
        elif settings.classifier.weight:
            self.classifier = AuxiliaryClassifier(settings.classifier.network, classes, size)
        if settings.adversarial.weight:
            known = settings.adversarial
            self.discriminator = Discriminator(known.channels, known.layers)
            self.register_buffer("adaptive", torch.zeros(()))
        self._gradients: list[torch.Tensor] = []  # of both terms at the last layer, summed over the update's parts

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the submodules that have their own, as multiples."""
        found = {"autoencoder": 1.0}
        if isinstance(self.classifier, AuxiliaryClassifier):
            found["classifier"] = self.settings.classifier.rate
        if self.discriminator is not None:
            found["discriminator"] = self.settings.adversarial.rate
        return found

    def forward(self, part: PixelBatch, distance: Distance | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of some patches.

        Args:
            part: The patches.
            distance: The perceptual distance, if it is a term.

        Returns:
            What is minimised, [], summed over the patches; and the terms before their weights, fp32 [len(TERMS)],
            summed over the patches and without a gradient.
        """
        settings = self.settings
        x = part.images.permute(0, 3, 1, 2).float() / 255
        with torch.set_grad_enabled(self.trains_encoder and torch.is_grad_enabled()):
            mean, std = moments_of(self.autoencoder, x)
        latents = mean if std is None else mean + std * part.noise
        made = pixels_of(self.autoencoder, latents)
        none = x.new_zeros(())
        each = dict.fromkeys(TERMS, none)
        each["l1"] = (made - x).abs().flatten(1).mean(1).sum()
        each["l2"] = (made - x).square().flatten(1).mean(1).sum()
        if settings.perceptual.weight and distance is not None:
            each["perceptual"] = distance(made, x).sum()
        pixels = settings.l1 * each["l1"] + settings.l2 * each["l2"] + settings.perceptual.weight * each["perceptual"]
        total = pixels
        if std is not None and self.trains_encoder:
            # Latent diffusion's terms are sums, ours means over the values of an image. Its pixels are in [-1, 1], ours
            # in [0, 1], so that half of its weight has the same effect next to l1.
            each["kl"] = divergence(mean, std).sum() / x[0].numel()
            total = total + settings.kl * each["kl"]
        if self.classifier is not None:
            each |= self._classified(self.classifier, x, made, part.labels)
            total = total + settings.classifier.weight * each["classifier"] + each["classifier_real"]
        if self.discriminator is not None:
            if part.seen >= settings.adversarial.start_images:
                each |= self._discriminated(self.discriminator, x, made, pixels)
                total = total + settings.adversarial.weight * self.adaptive * each["adversarial"]
                total = total + each["discriminator"]
            else:  # every process expects a gradient of every weight
                total = total + 0.0 * sum(weight.sum() for weight in self.discriminator.parameters())
        return total, torch.stack([each[name].detach().float() for name in TERMS])

    @staticmethod
    def _classified(
        classifier: nn.Module, x: torch.Tensor, made: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of the labelled patches, of a classifier that is trained along, and of the reconstructions."""
        logits = {"classifier": held(classifier)(made)}
        if isinstance(classifier, AuxiliaryClassifier):
            logits["classifier_real"] = classifier(x)
        return {
            name: F.cross_entropy(found.float(), labels, reduction="sum", ignore_index=UNLABELLED)
            for name, found in logits.items()
        }

    def _discriminated(
        self, discriminator: nn.Module, x: torch.Tensor, made: torch.Tensor, pixels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The hinge loss of both sides; notes the gradients from which the adaptive weight is taken."""
        adversarial = -held(discriminator)(made).float().flatten(1).mean(1).sum()
        if torch.is_grad_enabled():
            layer = last_layer(self.autoencoder)
            found = [torch.autograd.grad(term, layer, retain_graph=True)[0] for term in (pixels, adversarial)]
            before = self._gradients or [torch.zeros_like(layer)] * 2
            self._gradients = [a + b for a, b in zip(before, found, strict=True)]
        real, others = discriminator(x).float(), discriminator(made.detach()).float()
        return {"adversarial": adversarial, "discriminator": hinge(real, others).sum()}

    def end_update(self, accelerator: Accelerator) -> None:
        """Set the adaptive weight of the next update from the gradients of this one, of all processes."""
        if self._gradients:
            pixels, adversarial = accelerator.reduce(torch.stack(self._gradients), "sum") / self.settings.global_batch
            self.adaptive.copy_(adaptive_weight(pixels, adversarial))
            self._gradients = []

    def forget_gradients(self) -> None:
        """Drop what passes before the first update have noted."""
        self._gradients = []
