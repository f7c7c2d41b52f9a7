"""Guidance while sampling: over the fields of the conditions, by a weaker model, by a classifier of noisy latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.settings import DropoutSettings, GuidanceSettings
from latent_medi.metadata.schema import NULL, Schema


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network, and its coefficient in the guided prediction.

    Args:
        fields: Names of the fields whose condition is kept.
        weight: Its coefficient; the coefficients of all branches sum to 1.
    """

    fields: frozenset[str]
    weight: float


def untrained(kept: frozenset[str], schema: Schema, patterns: DropoutSettings) -> str:
    """Why a model cannot be evaluated with only the fields ``kept``; empty if training covered that pattern."""
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
    """All fields in the order in which a chain adds them: those named, then the others in the order of the schema.

    Raises:
        UserError: A name is no field, or occurs twice.
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
    """The evaluations that a guidance needs, without those of coefficient 0; all scales 1 is the conditional model.

    Chain: ε(∅) + Σ_j w_j·[ε(f_1…f_j) − ε(f_1…f_{j−1})], that is Σ_j (w_j − w_{j+1})·ε(f_1…f_j) with w_0 = 1 and
        w_{k+1} = 0.
    Margins: ε(∅) + Σ_j w_j·[ε(f_j) − ε(∅)].

    Raises:
        UserError: A setting is out of range, or does not fit the model.
    """
    low, high = settings.interval
    if not 0 <= low < high <= 1:
        raise UserError(f"guidance.interval must be a range of ᾱ within 0 and 1, not {low} to {high}.")
    order = guidance_order(settings, schema)
    whole = Branch(frozenset(order), 1.0)
    if settings.form == "none":
        if settings.scales or settings.scale != 1 or settings.rescale:
            raise UserError(
                "Guidance scales are given, but guidance.form is none.", "Set guidance.form to chain or margins."
            )
        return [whole]
    weights = [float(settings.scales.get(name, settings.scale)) for name in order]
    if not all(map(math.isfinite, weights)):
        raise UserError(f"The guidance scales must be finite, not {', '.join(f'{w:g}' for w in weights)}.")
    if settings.form == "chain":
        steps = [1.0, *weights, 0.0]
        branches = [Branch(frozenset(order[:j]), steps[j] - steps[j + 1]) for j in range(len(order) + 1)]
    elif settings.form == "margins":
        branches = [Branch(frozenset(), 1.0 - sum(weights))]
        branches += [Branch(frozenset([name]), weight) for name, weight in zip(order, weights, strict=True)]
    else:
        assert_never(settings.form)
    branches = [b for b in branches if b.weight != 0.0]
    if settings.rescale and branches != [whole] and all(b.fields != whole.fields for b in branches):
        branches.append(Branch(whole.fields, 0.0))  # rescaling needs its standard deviation
    return branches


def check_guidance(
    settings: GuidanceSettings, conditioner: MetadataConditioner | None, conditions: Conditions | None = None
) -> None:
    """Refuse, before any sampling step, guidance that needs a dropout pattern the model was not trained with.

    Args:
        settings: The guidance.
        conditioner: Has the fields and the dropout patterns; ``None`` for an unconditional model.
        conditions: Conditions of the samples, if known: a field that is null there is null in every branch.

    Raises:
        UserError: Names the pattern.
    """
    if conditioner is None:
        if settings.form != "none":
            raise UserError(f"guidance.form={settings.form} needs conditions, and the model is unconditional.")
        return
    schema, patterns = conditioner.schema, conditioner.patterns
    branches = guidance_branches(settings, schema)
    if tuple(settings.interval) != (0.0, 1.0):  # outside it, the conditional model is evaluated
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
                hint = "Use another form or order of guidance, or none; or train with that dropout pattern."
            raise UserError(f"guidance.form={settings.form} cannot be used with this model: {reason}.", hint)


class FieldGuidance:
    """Guidance over the fields for some samples; the conditions of its branches are prepared once for all steps.

    A sum of predictions with coefficients that sum to 1 has the same form for ε and v, because each is a linear map of
    x₀ and x_t.

    Args:
        denoiser: The model.
        conditions: Of N samples, on the model's device; ``None`` for an unconditional model.
        settings: The guidance, already checked by :func:`check_guidance`.
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
        kept = keep.to(conditions.codes.device)  # one copy for all branches, because each copy waits for a GPU
        self._asked = Conditions.cat([conditions.masked(row) for row in kept])
        self._whole = next((i for i, b in enumerate(branches) if len(b.fields) == len(schema.names)), None)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, alpha_bar: float | None = None) -> torch.Tensor:
        """The guided prediction, all branches in one batched evaluation of the network.

        Args:
            x_t: fp32 [N, C, h, w].
            t: int64 [N].
            alpha_bar: ᾱ_t, for the guidance interval; ``None`` is inside.

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
    """Number of evaluations of the network per step and image within the guidance interval, which are one batch."""
    return len(guidance_branches(settings, schema)) if schema.fields else 1


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """A guided prediction rescaled towards the standard deviation of the conditional one.

    Lin et al. 2024 (arXiv 2305.08891), equations 15 and 16: φ·σ_cond/σ_guided·x + (1 − φ)·x. A prediction with standard
    deviation 0 stays unchanged.

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
    """Guidance by a weaker model: D_weak + w·(D − D_weak), Karras et al. 2024 (arXiv 2406.02507), equation 5.

    It has the same form for ε and v, because each is a linear map of x₀ and x_t.

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
            raise UserError(f"autoguidance.interval must be a range of ᾱ within 0 and 1, not {self.interval}.")
        if not math.isfinite(self.scale):
            raise UserError(f"autoguidance.scale must be finite, not {self.scale}.")

    def guide(
        self,
        prediction: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions | None,
        alpha_bar: float,
    ) -> torch.Tensor:
        """The guided prediction, fp32 [N, C, h, w]."""
        if self.scale == 1 or not self.interval[0] <= alpha_bar <= self.interval[1]:
            return prediction
        weak = self.denoiser(x_t, t, conditions)
        return weak + self.scale * (prediction - weak)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Make the gradients of a network on a GPU reproducible inside the context; on a CPU they always are.

    Only convolutions and attention are affected: cuDNN's fastest backward passes and those of fused attention add up in
    the order in which threads finish.
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
        log_probability: (x_t fp32 [N, C, h, w], t int64 [N]) to log p(y | x_t, t), [N], of each sample's target class.
        scale: s.
        interval: Range of ᾱ in which it acts. Below 0.005 the latent is noise, and so is the classifier's gradient.
    """

    log_probability: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    scale: float = 1.0
    interval: tuple[float, float] = (0.005, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"classifier.interval must be a range of ᾱ above 0 and up to 1, not {self.interval}.")
        if not math.isfinite(self.scale):
            raise UserError(f"classifier.scale must be finite, not {self.scale}.")

    def guide(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, alpha_bar: float, prediction_type: str
    ) -> torch.Tensor:
        """The guided prediction, fp32 [N, C, h, w].

        At given x_t, v = √ᾱ·ε − √(1−ᾱ)·x₀ changes by 1/√ᾱ times the change of ε.
        """
        if self.scale == 0 or not self.interval[0] <= alpha_bar <= self.interval[1]:
            return prediction
        with torch.enable_grad(), repeatable(x_t.device):
            x = x_t.detach().requires_grad_(True)
            gradient = torch.autograd.grad(self.log_probability(x, t).sum(), x)[0]
        change = -self.scale * (1 - alpha_bar) ** 0.5 * gradient
        return prediction + (change if prediction_type == "epsilon" else change / alpha_bar**0.5)


@dataclass(frozen=True)
class Guidance:
    """All that guides samples beyond their conditions, in the order in which it acts.

    Args:
        fields: Guidance over the fields.
        weak: Guidance by a weaker model.
        classifier: Guidance by a latent classifier.
    """

    fields: GuidanceSettings = field(default_factory=GuidanceSettings)
    weak: Autoguidance | None = None
    classifier: ClassifierGuidance | None = None

    @staticmethod
    def of(guidance: Guidance | GuidanceSettings | None) -> Guidance:
        """All guidance, from guidance over the fields alone or from none."""
        return guidance if isinstance(guidance, Guidance) else Guidance(guidance or GuidanceSettings())
