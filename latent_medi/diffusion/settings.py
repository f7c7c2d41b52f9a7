"""Settings of the model, its objective and its sampling; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from latent_medi.core.errors import UserError
from latent_medi.core.kinds import Range
from latent_medi.core.paths import PathText
from latent_medi.core.settings import PositiveFloat, PositiveInt, Settings, UnitInterval

PRESETS: dict[str, tuple[int, ...]] = {
    "S": (128, 256, 384, 512),  # about  93 M parameters
    "B": (192, 384, 576, 768),  # about 210 M
    "L": (256, 512, 768, 1024),  # about 373 M
}
"""Channels per resolution by preset; all resolutions but the first have attention."""


@dataclass
class ModelSettings(Settings):
    """The denoising network and its fields.

    Args:
        preset: "S" (93 M parameters), "B" (210 M) and "L" (373 M) set block_out_channels and attention; empty: none.
        block_out_channels: Channels per resolution, each half the one before; the width of the conditions is 4 × the
            first.
        layers_per_block: Residual blocks per resolution on the way down (one more on the way up).
        attention: Whether a resolution has self-attention, one entry per resolution; unset: all but the first.
        attention_head_dim: Channels per attention head; must divide every attention width.
        resnet_time_scale_shift: How a residual block takes the embedding: "scale_shift" (modulates) or "default"
            (adds).
        mid_attention: Whether the lowest resolution's middle block has self-attention.
        norm_num_groups: Groups of the group normalisation; must divide every width.
        dropout: Share of activations dropped inside residual blocks while training, 0 to 1.
        fields: Names of the fields to condition on ("class" is the class field, whatever its name); unset: all of the
            schema; an empty list: unconditional.
        fusion: "concat" gives each field part of the width; "additive" sums full-width embeddings; "linear" mixes them
            in one layer.
        widths: For "concat", width by field, with the sum 4 × the first channel count; unset: equal parts, the
            remainder to the class.
    """

    preset: Literal["", "S", "B", "L"] = ""
    block_out_channels: list[int] = field(default_factory=lambda: list(PRESETS["S"]))
    layers_per_block: PositiveInt = 2
    attention: list[bool] | None = None
    attention_head_dim: PositiveInt = 64
    resnet_time_scale_shift: Literal["scale_shift", "default"] = "scale_shift"
    mid_attention: bool = True
    norm_num_groups: PositiveInt = 32
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    fields: list[str] | None = None
    fusion: Literal["concat", "additive", "linear"] = "concat"
    widths: dict[str, int] | None = None

    @property
    def embed_dim(self) -> int:
        """Width d_t of the timestep embedding and of the conditions."""
        return 4 * self.resolved().block_out_channels[0]

    def resolved(self) -> ModelSettings:
        """These settings with the preset and the default attention filled in.

        Raises:
            UserError: A preset is given together with other channels or attention.
        """
        if not self.preset:
            attention = self.attention
            if attention is None:
                attention = [level > 0 for level in range(len(self.block_out_channels))]
            return replace(self, attention=list(attention))
        channels = list(PRESETS[self.preset])
        attention = [level > 0 for level in range(len(channels))]
        if list(self.block_out_channels) not in (channels, list(PRESETS["S"])) or self.attention not in (
            None,
            attention,
        ):
            raise UserError(
                f"The preset {self.preset!r} sets block_out_channels and attention, but others are given.",
                "Leave out the preset, or block_out_channels and attention.",
            )
        return replace(self, preset="", block_out_channels=channels, attention=attention)

    def check(self, latent_size: int) -> None:
        """Refuse a network that cannot be built for latents of ``latent_size`` × ``latent_size``.

        Raises:
            UserError: Names every problem.
        """
        full = self.resolved()
        channels, attention = full.block_out_channels, full.attention or []
        problems = []
        if not channels:
            raise UserError("block_out_channels is empty.")
        if len(attention) != len(channels):
            problems.append(f"attention has {len(attention)} entries for {len(channels)} resolutions")
        widths = {c for c, a in zip(channels, attention, strict=False) if a} | (
            {channels[-1]} if full.mid_attention else set()
        )
        for width in sorted(w for w in widths if w % full.attention_head_dim):
            problems.append(f"attention_head_dim {full.attention_head_dim} does not divide the attention width {width}")
        for width in sorted({c for c in channels if c % full.norm_num_groups}):
            problems.append(f"norm_num_groups {full.norm_num_groups} does not divide the width {width}")
        if latent_size % 2 ** (len(channels) - 1):
            problems.append(f"latents of {latent_size}×{latent_size} cannot be halved {len(channels) - 1} times")
        if problems:
            raise UserError(
                "The network cannot be built: " + "; ".join(problems) + ".", "Change the settings under `model`."
            )


@dataclass
class ObjectiveSettings(Settings):
    """The prediction of the network, the noise schedule, and the weights of the noise levels.

    Args:
        prediction: "v_prediction" (v = √ᾱ·ε − √(1−ᾱ)·x₀) or "epsilon".
        schedule: Spacing of the noise variances: "linear", "scaled_linear" (linear in the square root) or
            "squaredcos_cap_v2" (cosine).
        beta_start: First noise variance of the linear schedules.
        beta_end: Last noise variance of the linear schedules.
        timesteps: Number of noise levels.
        zero_terminal_snr: Rescale the schedule so that the last level is pure noise (not with "epsilon").
        weighting: "min_snr_plus_one": min(snr+1, γ+1)/(snr+1); "min_snr": min(snr, γ)/(snr+1), or /snr for "epsilon";
            or "uniform".
        gamma: γ of the weightings.
        loss: "l2" (squared error) or "l1" (absolute error).
    """

    prediction: Literal["v_prediction", "epsilon"] = "v_prediction"
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: Annotated[int, Range(2)] = 1000
    zero_terminal_snr: bool = True
    weighting: Literal["min_snr_plus_one", "min_snr", "uniform"] = "min_snr_plus_one"
    gamma: PositiveFloat = 5.0
    loss: Literal["l2", "l1"] = "l2"

    def check(self) -> None:
        """Refuse an objective that has no finite loss or sampler.

        Raises:
            UserError: Names the problem.
        """
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise UserError(
                "prediction=epsilon cannot be used with zero_terminal_snr: at pure noise ε gives no x₀ (0/0).",
                "Use prediction=v_prediction, or zero_terminal_snr=false.",
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"beta_start and beta_end must satisfy 0 < start <= end < 1, not {self.beta_start} and {self.beta_end}."
            )


@dataclass
class DropoutSettings(Settings):
    """How often conditions are dropped in training. One pattern is drawn per sample; the four shares sum to 1.

    Args:
        keep_all: Share of samples that keep every condition.
        all_null: Share without any condition.
        metadata_null: Share that keeps the class and drops everything else.
        independent: Share in which each field is dropped independently.
        independent_rate: Probability that a field is dropped there.
    """

    keep_all: UnitInterval = 0.7
    all_null: UnitInterval = 0.1
    metadata_null: UnitInterval = 0.1
    independent: UnitInterval = 0.1
    independent_rate: UnitInterval = 0.5

    def check(self) -> None:
        """Refuse shares that do not sum to 1.

        Raises:
            UserError: Gives the shares.
        """
        shares = {n: getattr(self, n) for n in ("keep_all", "all_null", "metadata_null", "independent")}
        if abs(sum(shares.values()) - 1) > 1e-6:
            listed = ", ".join(f"{name}={share}" for name, share in shares.items())
            raise UserError(f"The dropout shares must sum to 1, not {listed}.")


@dataclass
class GuidanceSettings(Settings):
    """Guidance over the fields while sampling.

    Args:
        form: "none" is the conditional model. "chain": ε(∅) + Σ_j w_j·[ε(f_1…f_j) − ε(f_1…f_{j−1})]; all w = 1 is the
            conditional model exactly. "margins": ε(∅) + Σ_j w_j·[ε(f_j) − ε(∅)], which evaluates no combination of
            fields.
        scale: Guidance scale w of every field that ``scales`` does not name.
        scales: Guidance scale by field.
        order: For "chain", the fields in the order in which they are added; others follow in the model's order, the
            class first.
        interval: Lowest and highest ᾱ (1 = clean, 0 = noise) between which guidance acts; elsewhere the conditional
            model is used.
        rescale: Share, 0 to 1, by which the guided prediction is rescaled to the standard deviation of the conditional
            one, against the washed-out or oversaturated colours of strong guidance (Lin et al. 2024, section 3.4).
            "margins" then evaluates the whole condition too.
    """

    form: Literal["none", "chain", "margins"] = "none"
    scale: float = 1.0
    scales: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: UnitInterval = 0.0


@dataclass
class AutoguidanceSettings(Settings):
    """Guidance by a weaker version of the same model: D_weak + w·(D − D_weak) (Karras et al. 2024, equation 5).

    Args:
        model: Folder of the weaker model, such as one of an earlier checkpoint or a shorter average
            (`latent-medi average`); empty: none.
        scale: w; 1 changes nothing.
        interval: Lowest and highest ᾱ between which it acts.
    """

    model: PathText = ""
    scale: float = 2.0
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass
class ClassifierGuidanceSettings(Settings):
    """Guidance by a classifier of noisy latents: ε′ = ε − s·√(1−ᾱ_t)·∇ log p(y | x_t, t), as in HistoDiffusion.

    Args:
        model: Folder that `latent-medi classifier` wrote; empty: none. The plan's column of its field gives the target
            value, whether or not the model has that field.
        scale: s; HistoDiffusion's is 10. Larger scales give the class more reliably, at a cost in variety.
        interval: Lowest and highest ᾱ between which it acts; above 0, where the latent is noise.
    """

    model: PathText = ""
    scale: float = 20.0
    interval: tuple[float, float] = (0.005, 1.0)


@dataclass
class SamplerSettings(Settings):
    """The sampler.

    Args:
        name: "dpmpp_2m" (DPM-Solver++ 2M), "dpmpp_2m_sde", "unipc", "euler", "heun", "ddim" or "ddpm".
        steps: Network evaluations per image (times the guidance branches), twice as many less one for "heun"; for
            "ddim" it must divide the training timesteps.
        eta: For "ddim", share of fresh noise per step, 0 (none) to 1 (as in ddpm).
    """

    name: Literal["dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun", "ddim", "ddpm"] = "dpmpp_2m"
    steps: int = 20
    eta: UnitInterval = 0.0
