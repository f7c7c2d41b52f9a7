"""The classifier of noisy latents that guides a diffusion model: its network, its folder, and the models it can guide.

It learns p(y | x_t, t) at every noise level, because sampling needs its gradient there (Dhariwal & Nichol 2021, arXiv
2105.05233, section 4). The gradient of a classifier that was trained on clean latents is arbitrary for noisy ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import AttentionPooling, TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from latent_medi import __version__
from latent_medi.core.checksums import compare, warn_unsealed
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import atomic_path, read_sealed, sha256_file, write_sealed
from latent_medi.core.json_types import check_types
from latent_medi.diffusion.model_folder import REMEDY, local_folder
from latent_medi.diffusion.objective import noise_schedule, settings_of
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.latents.networks import latents_fit, weight_hash

if TYPE_CHECKING:
    from latent_medi.diffusion.pipeline import MediPipeline

FORMAT = 1
KIND = "latent-medi latent classifier"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_FACTS = {"field": str, "values": [str], "network": dict, "latent_shape": [int], "objective": dict, "autoencoder": str}
_FACTS |= {"shift": [float], "scale": [float], "weights_sha256": str, "provenance": dict}
_SAME = 1e-4  # relative difference of whitening up to which latents count as the same


class LatentEncoder(nn.Module):
    """Logits of noisy latents: the downward half of a denoiser, a pooling, and a linear layer.

    Every residual block receives the timestep. Normalisation is within a sample, so logits and their gradient do not
    depend on the batch.

    Args:
        settings: Channels, attention and so on.
        latent_channels: Channels of a latent.
        latent_size: Edge of a latent, a multiple of 2^(resolutions − 1).
        classes: Number of classes, at least 2.

    Raises:
        UserError: It cannot be built, for example because the head width does not divide an attention width.
    """

    def __init__(self, settings: EncoderSettings, latent_channels: int, latent_size: int, classes: int) -> None:
        super().__init__()
        settings.check(latent_size)
        widths, groups = list(settings.block_out_channels), settings.norm_num_groups
        first, last, embedding = widths[0], widths[-1], 4 * widths[0]
        common: dict[str, Any] = {"temb_channels": embedding, "resnet_time_scale_shift": "scale_shift"}
        common |= {"resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": groups}
        common |= {"attention_head_dim": settings.attention_head_dim, "dropout": settings.dropout}
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, embedding)
        self.conv_in = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D" if attends else "DownBlock2D",
                num_layers=settings.layers_per_block,
                in_channels=before,
                out_channels=width,
                add_downsample=level + 1 < len(widths),
                downsample_padding=1,
                **common,
            )
            for level, (before, width, attends) in enumerate(
                zip([first, *widths], widths, settings.with_attention(), strict=False)
            )
        )
        self.mid_block = UNetMidBlock2D(in_channels=last, attn_groups=groups, **common)
        self.norm_out = nn.GroupNorm(groups, last, eps=1e-5)
        self.pool: nn.Module | None = None
        if settings.pooling == "attention":
            self.pool = AttentionPooling(last // settings.attention_head_dim, last)
        self.head = nn.Linear(last, classes)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [N, classes] of noisy latents fp32 [N, C, h, w] at timesteps int64 [N]."""
        frequencies = self.time_proj(t.reshape(-1).expand(len(x_t))).to(x_t.dtype)
        embedding = self.time_embedding(frequencies)
        x = self.conv_in(x_t)
        for block in self.down_blocks:
            x, _ = block(x, embedding)
        x = F.silu(self.norm_out(self.mid_block(x, embedding)))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1) if self.pool is None else self.pool(tokens)).float()


@dataclass(frozen=True)
class LogProbability:
    """log p(target class | x_t, t) of each sample, for :class:`~latent_medi.diffusion.guidance.ClassifierGuidance`.

    Args:
        network: In eval mode.
        target: int64 [N]; position of each sample's class, or [1] for the same class in any number of samples; on the
            network's device.
    """

    network: LatentEncoder
    target: torch.Tensor

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """fp32 [N] of x_t fp32 [N, C, h, w] and t int64 [N]; differentiable in x_t.

        Raises:
            ValueError: The numbers of samples and target classes differ.
        """
        if len(self.target) not in (1, len(x_t)):
            raise ValueError(f"{len(x_t)} samples and {len(self.target)} target classes; choose them with rows().")
        target = self.target.to(x_t.device).expand(len(x_t))
        return F.log_softmax(self.network(x_t.float(), t), dim=1).gather(1, target[:, None])[:, 0]

    def rows(self, which: torch.Tensor | Sequence[int]) -> LogProbability:
        """The same for some of the samples, in this order; samples may repeat."""
        index = torch.as_tensor(which, dtype=torch.long, device=self.target.device)
        return LogProbability(self.network, self.target if len(self.target) == 1 else self.target[index])


class LatentClassifier:
    """A trained network with its classes, noise schedule, autoencoder and whitening.

    Args:
        network: The network.
        settings: Settings of the network.
        latent_shape: (C, h, w) of a latent.
        field: The field whose values are the classes.
        values: The classes, in the order of the logits.
        objective: The noise schedule of its training; prediction and weighting are not used.
        shift: fp32 [C]; subtracted from raw latents in training.
        scale: fp32 [C]; then divided by.
        autoencoder_hash: SHA-256 of the autoencoder of the latents.
        provenance: JSON-able facts about its training.
    """

    def __init__(
        self,
        network: LatentEncoder,
        settings: EncoderSettings,
        latent_shape: Sequence[int],
        field: str,
        values: Sequence[str],
        objective: ObjectiveSettings,
        shift: torch.Tensor,
        scale: torch.Tensor,
        autoencoder_hash: str,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings = settings
        self.latent_shape: tuple[int, ...] = tuple(latent_shape)
        self.field, self.values = field, tuple(values)
        self.objective = objective
        self.shift, self.scale = shift.float().cpu(), scale.float().cpu()
        self.autoencoder_hash = autoencoder_hash
        self.provenance = dict(provenance or {})

    @property
    def hash(self) -> str:
        """SHA-256 over all that its predictions depend on: weights, classes, schedule, autoencoder, whitening."""
        facts = [weight_hash(self.network), self._facts()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _facts(self) -> dict[str, Any]:
        return {
            "field": self.field,
            "values": list(self.values),
            "network": asdict(self.settings),
            "latent_shape": list(self.latent_shape),
            "objective": asdict(self.objective),
            "autoencoder": self.autoencoder_hash,
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
        }

    def to(self, device: torch.device | str) -> LatentClassifier:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    def log_probability(self, values: Sequence[str]) -> LogProbability:
        """The function that guides N samples, each to its own value.

        Args:
            values: N values of :attr:`field`; a single one applies to any number of samples.

        Raises:
            UserError: A value is not one of the classes; names the closest.
        """
        for value in values:
            if value not in self.values:
                raise UserError(
                    f"The classifier has no class {self.field} {value!r}; {nearest(value, self.values)}.",
                    "It can only guide to the classes of its training.",
                )
        if not values:
            raise UserError("No value to guide to is given.")
        device = next(self.network.parameters()).device  # copied once, not at every step
        return LogProbability(self.network, torch.tensor([self.values.index(value) for value in values], device=device))

    @torch.no_grad()
    def probabilities(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """p(y | x_t, t), fp32 [N, classes], of whitened noisy latents fp32 [N, C, h, w] at timesteps int64 [N]."""
        return self.network(x_t, t).softmax(1)

    def check_model(self, model: MediPipeline) -> None:
        """Refuse to guide a model whose noisy latents differ from those of the classifier's training.

        Raises:
            UserError: Names each difference in autoencoder, shape, whitening and noise schedule.
        """
        problems = []
        if not latents_fit(model.autoencoder.description, self.autoencoder_hash):
            problems.append(
                f"its autoencoder is {model.autoencoder.hash[:12]}, the classifier's {self.autoencoder_hash[:12]}"
            )
        if tuple(model.latent_shape) != self.latent_shape:
            problems.append(
                f"its latents are {_times(model.latent_shape)}, the classifier's {_times(self.latent_shape)}"
            )
        else:
            for name in ("shift", "scale"):
                theirs, ours = getattr(model, name), getattr(self, name)
                # Relative to the scale of the latents, because a shift may be about 0.
                if ((theirs - ours).abs() > _SAME * self.scale).any():
                    problems.append(
                        f"the {name} of its latents is {_numbers(theirs)}, the classifier's {_numbers(ours)}"
                    )
        theirs, ours = noise_schedule(settings_of(model.scheduler.config)), noise_schedule(self.objective)
        if theirs.shape != ours.shape:
            problems.append(f"it has {len(theirs)} timesteps, the classifier {len(ours)}")
        elif not torch.allclose(theirs, ours, rtol=0, atol=1e-5):
            at = int((theirs - ours).abs().argmax())
            problems.append(
                f"its noise schedule differs: ᾱ at t = {at} is {theirs[at]:.4f}, the classifier's {ours[at]:.4f}"
            )
        if problems:
            raise UserError(
                f"The classifier of {self.field} cannot guide this model: {'; '.join(problems)}.",
                "Train the classifier with model=<the model's folder>, which takes these from the model.",
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, at once or not at all; an older classifier there is replaced.

        Raises:
            UserError: The folder holds something that is not a classifier.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} is not empty and holds no classifier.", "Choose another folder.")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
            save_file(tensors, temporary / WEIGHTS_FILE)
            facts = {"kind": KIND, "format": FORMAT, "version": __version__, **self._facts()}
            facts |= {"weights_sha256": sha256_file(temporary / WEIGHTS_FILE), "provenance": self.provenance}
            write_sealed(temporary / CONFIG_FILE, facts)

    @staticmethod
    def from_pretrained(folder: str | Path, device: torch.device | str = "cpu") -> LatentClassifier:
        """Read a classifier's folder (or hub id ``owner/name``); JSON and safetensors only.

        Raises:
            UserError: It is no classifier, is from a newer version, or is damaged.
        """
        path = local_folder(folder)
        facts, sealed = read_sealed(path / CONFIG_FILE, REMEDY) if (path / CONFIG_FILE).is_file() else ({}, True)
        if facts.get("kind") != KIND:
            raise UserError(f"{folder} is no latent classifier.", "Give out/classifier of `latent-medi classifier`.")
        if facts.get("format") != FORMAT:
            raise UserError(
                f"The classifier {folder} has format {facts.get('format')}; this program reads {FORMAT}.",
                f"It was written by version {facts.get('version')}: use that version, or train the classifier again.",
            )
        check_types(facts, _FACTS, path / CONFIG_FILE, REMEDY)
        compare(path, {WEIGHTS_FILE: facts["weights_sha256"]}, path / CONFIG_FILE, REMEDY)
        if not sealed:
            warn_unsealed(path)
        try:
            settings, shape = EncoderSettings(**facts["network"]), tuple(facts["latent_shape"])
            network = LatentEncoder(settings, shape[0], shape[1], len(facts["values"]))
            network.load_state_dict(load_file(path / WEIGHTS_FILE))
            objective, autoencoder = ObjectiveSettings(**facts["objective"]), facts["autoencoder"]
            whitening = torch.tensor(facts["shift"]), torch.tensor(facts["scale"])
            known = facts["field"], facts["values"], objective, *whitening, autoencoder, facts["provenance"]
            return LatentClassifier(network, settings, shape, *known).to(device)
        except Exception as error:  # safetensors, shapes, missing entries and files each have their own
            raise UserError(f"The classifier {folder} cannot be read: {error}", REMEDY) from error


def seal_classifier(folder: str | Path) -> None:
    """Add checksums to a latent classifier's folder of an earlier version; its other files stay unchanged.

    Raises:
        UserError: It is no classifier, or damaged.
    """
    LatentClassifier.from_pretrained(folder)
    facts, _ = read_sealed(Path(folder) / CONFIG_FILE, REMEDY)
    write_sealed(Path(folder) / CONFIG_FILE, facts)


def _times(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def _numbers(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"
