"""Guidance while sampling: over the fields of the conditions, and by a classifier of noisy latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.settings import DropoutSettings, GuidanceSettings
from latent_medi.metadata.schema import NULL, Schema


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network, and its share in the guided prediction.

    Args:
        fields: Names of the fields whose condition is kept.
        weight: Its coefficient; those of all branches sum to 1.
    """

    fields: frozenset[str]
    weight: float


def untrained(kept: frozenset[str], schema: Schema, patterns: DropoutSettings) -> str:
    """Why a model cannot be asked with only the fields ``kept`` given; empty if training covered that pattern."""
    everything = frozenset(schema.names)
    the_class = frozenset(f.name for f in schema.fields if f.kind == "class")
    shares = [
        patterns.keep_all if kept == everything else 0.0,
        patterns.all_null if not kept else 0.0,
        patterns.metadata_null if kept == the_class else 0.0,
    ]
    rate = patterns.independent_rate
    shares.append(patterns.independent * (1 - rate) ** len(kept) * rate ** (len(everything) - len(kept)))
    if sum(shares) > 0:
        return ""
    given = ", ".join(n for n in schema.names if n in kept) or "no condition"
    dropped = ", ".join(n for n in schema.names if n not in kept) or "nothing"
    return f"it was never trained with {given} given and {dropped} left out"


def guidance_of(guidance: float | Mapping[str, float] | GuidanceSettings | None) -> GuidanceSettings:
    """Guidance settings from a scale for all fields, or scales by field (both as a chain)."""
    if guidance is None or isinstance(guidance, GuidanceSettings):
        return guidance or GuidanceSettings()
    if isinstance(guidance, Mapping):
        return GuidanceSettings("chain", scales={str(n): float(w) for n, w in guidance.items()})
    return GuidanceSettings("chain", scale=float(guidance))


def guidance_order(settings: GuidanceSettings, schema: Schema) -> list[str]:
    """All fields in the order in which a chain adds them: those named, then the rest in the order of the schema.

    Raises:
        UserError: A name that is no field, or twice the same.
    """
    for name in (*settings.order, *settings.scales):
        if name not in schema.names:
            raise UserError(
                f"Guidance names the field {name!r}, which the model does not have; {nearest(name, schema.names)}."
            )
    if len(set(settings.order)) != len(settings.order):
        raise UserError(f"The guidance order {settings.order} names a field twice.")
    return [*settings.order, *(n for n in schema.names if n not in settings.order)]


def guidance_branches(settings: GuidanceSettings, schema: Schema) -> list[Branch]:
    """The evaluations a guidance needs. Those with coefficient 0 are left out: all scales 1 is the conditional model.

    Chain: ε(∅) + Σ_j w_j·[ε(f_1…f_j) − ε(f_1…f_{j−1})], that is Σ_j (w_j − w_{j+1})·ε(f_1…f_j) with w_0 = 1 and
        w_{k+1} = 0.
    Margins: ε(∅) + Σ_j w_j·[ε(f_j) − ε(∅)].

    Raises:
        UserError: Settings that mean nothing for this model.
    """
    low, high = settings.interval
    if not 0 <= low < high <= 1:
        raise UserError(f"The guidance interval is a range of ᾱ within 0 and 1, not {low} to {high}.")
    order = guidance_order(settings, schema)
    if not 0 <= settings.rescale <= 1:
        raise UserError(f"guidance.rescale is a share from 0 to 1, not {settings.rescale}.")
    whole = Branch(frozenset(order), 1.0)
    if settings.form == "none":
        if settings.scales or settings.scale != 1 or settings.rescale:
            raise UserError(
                "Guidance scales are given, but the form of guidance is none.", "Set guidance.form to chain or margins."
            )
        return [whole]
    weights = [float(settings.scales.get(name, settings.scale)) for name in order]
    if not all(map(math.isfinite, weights)):
        raise UserError(f"The guidance scales are {', '.join(f'{w:g}' for w in weights)}; they are finite numbers.")
    if settings.form == "chain":
        steps = [1.0, *weights, 0.0]
        branches = [Branch(frozenset(order[:j]), steps[j] - steps[j + 1]) for j in range(len(order) + 1)]
    elif settings.form == "margins":
        branches = [Branch(frozenset(), 1.0 - sum(weights))]
        branches += [Branch(frozenset([name]), weight) for name, weight in zip(order, weights, strict=True)]
    else:
        raise UserError(f"There is no guidance form {settings.form!r}; there are none, chain and margins.")
    branches = [b for b in branches if b.weight != 0.0]
    if settings.rescale and branches != [whole] and all(b.fields != whole.fields for b in branches):
        branches.append(Branch(whole.fields, 0.0))  # its standard deviation is what the others are brought back to
    return branches


def check_guidance(
    settings: GuidanceSettings, conditioner: MetadataConditioner | None, conditions: Conditions | None = None
) -> None:
    """Refuse, before any sampling step, to ask a model for what its condition dropout never trained.

    Args:
        settings: The guidance.
        conditioner: Knows the fields and the dropout patterns; ``None`` for an unconditional model.
        conditions: What will be asked, if known: a field that is null there is null in every branch.

    Raises:
        UserError: Says what cannot be asked, and why.
    """
    if conditioner is None:
        if settings.form != "none":
            raise UserError(f"Guidance of the form {settings.form!r} needs conditions, and the model is unconditional.")
        return
    schema, patterns = conditioner.schema, conditioner.patterns
    branches = guidance_branches(settings, schema)
    if tuple(settings.interval) != (0.0, 1.0):  # outside it, the conditional model is asked
        branches.append(Branch(frozenset(schema.names), 0.0))
    given = (
        [[True] * len(schema.names)] if conditions is None else torch.unique(conditions.codes != NULL, dim=0).tolist()
    )
    for row in given:
        there = frozenset(name for name, is_given in zip(schema.names, row, strict=True) if is_given)
        for branch in branches:
            if not (reason := untrained(there & branch.fields, schema, patterns)):
                continue
            if there <= branch.fields:
                hint = "Give the other fields too ('unknown' is a value of every field)."
            else:
                hint = "Use the other form or order of guidance, or form none; or train with that dropout pattern."
            raise UserError(
                f"The model cannot be asked for what guidance of the form {settings.form!r} needs: {reason}.", hint
            )


class FieldGuidance:
    """Guidance over the fields for some samples: what its branches are asked is the same at every step, and made once.

    A sum of predictions with coefficients that sum to 1 is the same for ε and v, since both are the same linear map of
    x₀ and x_t.

    Args:
        denoiser: The model.
        conditions: Of N samples, on the model's device; ``None`` for an unconditional model.
        settings: The guidance, which the caller has had checked once by :func:`check_guidance`.
    """

    def __init__(self, denoiser: Denoiser, conditions: Conditions | None, settings: GuidanceSettings) -> None:
        self.denoiser, self.conditions, self.settings = denoiser, conditions, settings
        self.branches: list[Branch] = []
        if denoiser.conditioner is None or conditions is None or settings.form == "none":
            return
        schema = denoiser.conditioner.schema
        branches = guidance_branches(settings, schema)
        if branches == [Branch(frozenset(schema.names), 1.0)]:
            return
        self.branches = branches
        keep = torch.tensor([[name in b.fields for name in schema.names] for b in branches], dtype=torch.bool)
        kept = keep.to(conditions.codes.device)  # one copy for all branches: each waits for what a GPU is doing
        self._asked = Conditions.cat([conditions.masked(row) for row in kept])
        self._whole = next((i for i, b in enumerate(branches) if len(b.fields) == len(schema.names)), None)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, alpha_bar: float | None = None) -> torch.Tensor:
        """The guided prediction, all branches in one batched evaluation of the network.

        Args:
            x_t: fp32 [N, C, h, w].
            t: int64 [N].
            alpha_bar: ᾱ_t, for the guidance interval; ``None`` acts as if inside.

        Returns:
            fp32 [N, C, h, w]; bit for bit the conditional prediction where guidance changes nothing.
        """
        low, high = self.settings.interval
        if not self.branches or not (alpha_bar is None or low <= alpha_bar <= high):
            return self.denoiser(x_t, t, self.conditions)
        count = len(self.branches)
        predictions = self.denoiser(x_t.repeat(count, 1, 1, 1), t.repeat(count), self._asked).chunk(count)
        total = sum_of(predictions, [b.weight for b in self.branches])
        if self.settings.rescale and self._whole is not None:
            total = rescaled(total, predictions[self._whole].float(), self.settings.rescale)
        return total


def evaluations(settings: GuidanceSettings, schema: Schema) -> int:
    """Evaluations of the network per step and image within the interval of guidance; they are one batch."""
    return len(guidance_branches(settings, schema)) if schema.fields else 1


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """A guided prediction with its standard deviation brought back, Lin et al. 2024 (arXiv 2305.08891), equations 15
    and 16: φ·σ_cond/σ_guided·x + (1 − φ)·x. A guided prediction without any spread stays as it is.

    Args:
        guided: fp32 [N, C, h, w].
        conditional: Of the same shape.
        share: φ.
    """
    spread = guided.flatten(1).std(1)
    ratio = torch.where(spread > 0, conditional.flatten(1).std(1) / spread, 1.0)
    return guided * (share * ratio + (1 - share)).view(-1, 1, 1, 1)


def sum_of(predictions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ weight·prediction in fp32."""
    total = predictions[0].float() * weights[0]
    for prediction, weight in zip(predictions[1:], weights[1:], strict=True):
        total = total + prediction.float() * weight
    return total


@dataclass(frozen=True)
class Autoguidance:
    """Guidance by a weaker model: D_weak + w·(D − D_weak), Karras et al. 2024 (arXiv 2406.02507), equation 5. For ε and
    v alike, since both are the same linear map of x₀ and x_t.

    Args:
        denoiser: The weaker model, of the same latents, objective and fields.
        scale: w.
        interval: Range of ᾱ in which it acts.
    """

    denoiser: Denoiser
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"The interval of autoguidance is a range of ᾱ within 0 and 1, not {self.interval}.")
        if not math.isfinite(self.scale):
            raise UserError(f"The scale of autoguidance is {self.scale}.")

    def guide(
        self,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions | None,
        alpha_bar: float,
    ) -> torch.Tensor:
        """The changed prediction, fp32 [N, C, h, w]."""
        if self.scale == 1 or not self.interval[0] <= alpha_bar <= self.interval[1]:
            return prediction
        weak = self.denoiser(x_t, t, conditions)
        return weak + self.scale * (prediction - weak)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """While it lasts, the gradients of a network on a GPU come out the same every time, so that images are a function
    of their seed; afterwards everything is as it was. On a CPU they do anyway.

    Convolutions and attention are all that would differ: cuDNN's fastest backward passes, and those of the fused
    attention, add up in the order in which threads happen to finish.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False  # not `cudnn.flags`, which also turns TF32 on
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by the gradient of a classifier of noisy latents: ε′ = ε − s·√(1−ᾱ_t)·∇_x log p(y | x_t, t).

    Dhariwal & Nichol 2021 (arXiv 2105.05233), equation 14; in latent space as in HistoDiffusion (arXiv 2308.04020).

    Args:
        log_probability: (x_t fp32 [N, C, h, w], t int64 [N]) to log p(y | x_t, t), [N], of each sample's own wanted
            class.
        scale: s.
        interval: Range of ᾱ in which it acts. Below 0.005 the latent is noise and the classifier's gradient means
            nothing.
    """

    log_probability: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    scale: float = 1.0
    interval: tuple[float, float] = (0.005, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"The classifier's interval is a range of ᾱ above 0 and up to 1, not {self.interval}.")
        if not math.isfinite(self.scale):
            raise UserError(f"The scale of the classifier's guidance is {self.scale}; it is a finite number.")

    def guide(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, alpha_bar: float, prediction_type: str
    ) -> torch.Tensor:
        """The changed prediction, fp32 [N, C, h, w].

        At given x_t, v = √ᾱ·ε − √(1−ᾱ)·x₀ changes by 1/√ᾱ times the change of ε.
        """
        if self.scale == 0 or not self.interval[0] <= alpha_bar <= self.interval[1]:
            return prediction
        with torch.enable_grad(), repeatable(x_t.device):
            x = x_t.detach().requires_grad_(True)
            gradient = torch.autograd.grad(self.log_probability(x, t).sum(), x)[0]
        change = -self.scale * (1 - alpha_bar) ** 0.5 * gradient
        return prediction + (change if prediction_type == "epsilon" else change / alpha_bar**0.5)
