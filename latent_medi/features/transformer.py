"""Vision transformers of the table: built by timm or transformers, from the hub or a local folder, loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_medi.core.errors import UserError, needs
from latent_medi.features.networks import Network, find_weights, load_strictly
from latent_medi.features.registry import ENCODERS, HUB_FILES, Entry, access_hint

_DECIDES_FEATURES = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "layerscale_value",
    "mlp_ratio",
    "num_attention_heads",
    "num_hidden_layers",
    "num_register_tokens",
    "patch_size",
    "qkv_bias",
    "use_swiglu_ffn",
)
"""Entries of a transformers configuration that features depend on; labels, versions and dropout do not matter."""


class _ClassToken(nn.Module):
    """First token of a transformers vision model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).last_hidden_state[:, 0]


class _ClassAndMean(nn.Module):
    """First token, then the mean of the patch tokens, which are those after ``prefix`` tokens (no registers)."""

    def __init__(self, model: nn.Module, prefix: int) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def tokens(self, x: Tensor) -> Tensor:
        """Normed tokens [n, prefix + patches, width] of images [n, 3, S, S]."""
        return self.model(x)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        return torch.cat([tokens[:, 0], tokens[:, self.prefix :].mean(1)], 1)


class _StatesClassAndMean(_ClassAndMean):
    """The same of a transformers vision model."""

    def tokens(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).last_hidden_state


def vision_transformer(name: str, weights: str | Path | None) -> Network:
    """An encoder of the table that timm or transformers builds.

    Args:
        name: Its name in :data:`~latent_medi.features.registry.ENCODERS`.
        weights: Its weight file or folder (timm), or its folder with a configuration (transformers); the hub's, or
            what the hub's client has stored, if none is given.

    Raises:
        UserError: The weights cannot be had (with the steps to take) or do not fit.
    """
    entry = ENCODERS[name]
    model = _from_timm(name, entry, weights) if entry.library == "timm" else _from_transformers(name, entry, weights)
    module: nn.Module
    if entry.tokens == "cls":
        # A network of timm that was built without a head reads out its class token itself.
        module = model if entry.library == "timm" else _ClassToken(model)
    else:
        module = (_ClassAndMean if entry.library == "timm" else _StatesClassAndMean)(model, entry.prefix)
    readout = "cls" if entry.tokens == "cls" else f"cls + mean of tokens {entry.prefix}:"
    readout += f" {built_from(model, entry)}"
    assert entry.preprocessing is not None
    return Network(name, module, entry.dim, entry.preprocessing, entry.license, readout)


def built_from(model: nn.Module, entry: Entry) -> str:
    """Arguments or configuration that features depend on and that no tensor holds, such as the activation, as JSON."""
    if entry.library == "timm":
        decisive: dict[str, Any] = {"architecture": entry.architecture, **entry.arguments}
    else:
        whole: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
        decisive = {key: whole[key] for key in _DECIDES_FEATURES if key in whole}
    return json.dumps(decisive, sort_keys=True, default=str)


def build_timm(entry: Entry) -> nn.Module:
    """The network of an entry on torch's "meta" device; random initialisation of large ones would take minutes."""
    with needs(f"The encoder's architecture {entry.architecture}", "timm"):
        import timm
        import timm.layers

    named = {"mlp_layer": timm.layers, "act_layer": nn}
    arguments = {k: getattr(named[k], v) if k in named else v for k, v in entry.arguments.items()}
    with torch.device("meta"):
        return timm.create_model(entry.architecture, pretrained=False, **arguments)


def _from_timm(name: str, entry: Entry, weights: str | Path | None) -> nn.Module:
    path = find_weights(weights, ("*.safetensors", "pytorch_model.bin")) if weights else _hub_file(name, entry)
    model = build_timm(entry)
    load_strictly(model, path, assign=True)
    return model.float()


def _hub_file(name: str, entry: Entry) -> Path:
    from huggingface_hub import hf_hub_download

    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(entry.source, file))
        except Exception as error:  # the client has a class each for no licence, no such file, no connection
            problem = error
    raise _no_access(name, entry, problem)


def _from_transformers(name: str, entry: Entry, weights: str | Path | None) -> nn.Module:
    import transformers

    if weights and not (Path(weights) / "config.json").is_file():
        raise UserError(
            f"{weights} is not a folder with config.json and {' or '.join(HUB_FILES)}.",
            f"The encoder {name!r} needs the files of https://huggingface.co/{entry.source} in one folder.",
        )
    architecture: Any = getattr(transformers, entry.architecture)
    options: dict[str, Any] = {"add_pooling_layer": False} if entry.architecture == "ViTModel" else {}
    source = str(weights or entry.source)
    try:
        config = architecture.config_class.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _no_access(name, entry, error) from None
    differ = [f"{k} {getattr(config, k, None)}" for k, v in entry.arguments.items() if getattr(config, k, None) != v]
    if differ:
        wanted = ", ".join(f"{k} {v}" for k, v in entry.arguments.items())
        raise UserError(f"{source} is not {entry.source}: it has {', '.join(differ)}.", f"{name!r} has {wanted}.")
    try:
        model, loading = architecture.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError as error:
        raise _no_access(name, entry, error) from None
    except Exception as error:  # safetensors, torch and transformers each have their own for a damaged or wrong file
        raise UserError(f"The weights in {source} cannot be loaded: {error}") from None
    # Transformers initialises missing and mismatched tensors at random, and ignores unknown ones.
    wrong = [f"{k} is missing" for k in sorted(loading["missing_keys"])]
    wrong += [f"{k} is unknown" for k in sorted(loading["unexpected_keys"]) if not k.startswith(entry.unused or (" ",))]
    # Each is a tuple of the name and both shapes.
    wrong += [f"{k[0]} has another shape" for k in sorted(loading["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} does not fit the network: {', '.join(wrong[:5])}{more}.")
    return model.float()


def _no_access(name: str, entry: Entry, error: Exception) -> UserError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"The encoder {name!r} cannot be loaded: {first}", access_hint(entry))
