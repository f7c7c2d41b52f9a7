"""Low-rank adapters (LoRA) of a model, with peft: created, saved, stacked on the model, and merged into it.

An adapter folder has peft's format, ``adapter_config.json`` and ``adapter_model.safetensors`` for the network, so peft
alone can read it too. In addition it has ``adapter.json`` (hash of its model, values it adds to fields, provenance)
and, if it adds values, ``values.safetensors`` with their vectors. It takes a few MB and works only with its model.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from safetensors.torch import load_file, save_file
from torch import nn

from latent_medi import __version__
from latent_medi.core.checksums import verify_checksums, warn_unsealed, write_checksums
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_object, sha256_file, write_json
from latent_medi.core.json_types import check_types
from latent_medi.diffusion.conditioning import embedding_key
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.model_folder import REMEDY, SEEN, local_folder

ADAPTER_FILE, VALUES_FILE = "adapter.json", "values.safetensors"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names
FORMAT = 1
_FACTS = {"base": str, "values": dict, "provenance?": {"seen?": (SEEN, None)}}
_PREFIX = "base_model.model."  # peft's name for the adapted network
_TRAINED = "default"


def require_peft() -> ModuleType:
    """The package peft.

    Raises:
        UserError: It is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError("Adapters need the package peft.", "pip install 'latent-medi[lora]'") from None
    return peft


def add_lora(
    unet: nn.Module, rank: int, alpha: float, targets: Sequence[str], dropout: float, name: str = _TRAINED
) -> None:
    """Add an adapter to a network, in place; its update starts at zero, and everything else is frozen.

    Args:
        unet: The network.
        rank: Rank of every update.
        alpha: Scale of the update times rank.
        targets: Ends of the names of the layers to adapt.
        dropout: Share of the adapter's inputs dropped while training.
        name: The adapter's name in the network.

    Raises:
        UserError: The network has none of the layers, or peft is not installed.
    """
    peft = require_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the network already has an adapter, which is intended
            peft.inject_adapter_in_model(config, unet, adapter_name=name)
    except ValueError as error:
        raise UserError(f"The network has no layer named {', '.join(targets)}: {error}") from None


def save_adapter(
    folder: str | Path, denoiser: Denoiser, base: str, added: Mapping[str, Sequence[str]], provenance: Mapping[str, Any]
) -> None:
    """Write the adapter of a network and the vectors of the values that it adds, at once or not at all.

    Args:
        folder: The adapter's folder; an older adapter there is replaced.
        denoiser: With an adapter from :func:`add_lora`.
        base: Hash of the model that it adapts.
        added: Values by field that the model does not have: the last ones of their vocabularies.
        provenance: JSON-able facts about its training.

    Raises:
        UserError: The folder holds something that is not an adapter.
    """
    peft = require_peft()
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} is not empty and holds no adapter.", "Choose another folder.")
    network: Any = denoiser.unet
    state = peft.get_peft_model_state_dict(network, adapter_name=_TRAINED, save_embedding_layers=False)
    vectors = {}
    if added and denoiser.conditioner is not None:
        for name, values in added.items():
            table = denoiser.conditioner.embeddings[embedding_key(name)].codes.weight  # type: ignore[union-attr]
            vectors[name] = table[-len(values) :]  # type: ignore[index]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        network.peft_config[_TRAINED].save_pretrained(temporary)
        save_file(_contiguous({_PREFIX + key: value for key, value in state.items()}), temporary / WEIGHTS_FILE)
        if vectors:
            save_file(_contiguous(vectors), temporary / VALUES_FILE)
        facts = {"format": FORMAT, "version": __version__, "base": base}
        facts |= {"values": {name: list(values) for name, values in added.items()}, "provenance": dict(provenance)}
        write_json(temporary / ADAPTER_FILE, facts)
        write_checksums(temporary)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its folder.

    Args:
        folder: Its folder.
        hash: SHA-256 over its files.
        base: Hash of the model that it adapts.
        config: Rank, alpha and targets, for :func:`add_lora`.
        weights: Its matrices, by name in the network.
        values: Values that it adds, by field.
        vectors: fp32 [values, width] by field.
        seen: The combinations that it and its model were trained on, or ``None`` if not recorded.
    """

    folder: Path
    hash: str
    base: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    values: dict[str, list[str]]
    vectors: dict[str, torch.Tensor]
    seen: dict[str, Any] | None = None


def open_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's folder (or hub id ``owner/name``); JSON and safetensors only.

    Raises:
        UserError: It is no adapter of this program, is from a newer version, or is damaged.
    """
    path = local_folder(folder)
    if not (path / ADAPTER_FILE).is_file():
        raise UserError(
            f"{folder} is no adapter of this program: it has no {ADAPTER_FILE}.", "Give out/adapter of a run with lora."
        )
    if not verify_checksums(path, REMEDY):
        warn_unsealed(path)
    facts = read_object(path / ADAPTER_FILE)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"The adapter {folder} has format {facts.get('format')}; this program reads {FORMAT}.",
            f"It was written by version {facts.get('version')}: use that version, or train the adapter again.",
        )
    check_types(facts, _FACTS, path / ADAPTER_FILE, REMEDY)
    config = read_object(path / CONFIG_FILE)
    try:
        weights = {key.removeprefix(_PREFIX): value for key, value in load_file(path / WEIGHTS_FILE).items()}
        vectors = load_file(path / VALUES_FILE) if facts["values"] else {}
        # Other entries of peft's file are ignored: they could name code or files to load.
        lora: dict[str, Any] = {"rank": int(config["r"]), "alpha": float(config["lora_alpha"]), "dropout": 0.0}
        lora["targets"] = [str(name) for name in config["target_modules"]]
        values = {str(name): [str(v) for v in listed] for name, listed in facts["values"].items()}
        base = str(facts["base"])
    except Exception as error:  # safetensors and missing entries and files each have their own
        raise UserError(f"The adapter {folder} cannot be read: {error}", REMEDY) from error
    if {name: len(listed) for name, listed in values.items()} != {name: len(v) for name, v in vectors.items()}:
        raise UserError(f"The adapter {folder} does not have one vector per value.", "Copy the whole folder again.")
    names = [name for name in (ADAPTER_FILE, CONFIG_FILE, WEIGHTS_FILE, VALUES_FILE) if (path / name).is_file()]
    digest = hashlib.sha256("".join(name + sha256_file(path / name) for name in names).encode()).hexdigest()
    return Adapter(Path(folder), digest, base, lora, weights, values, vectors, facts.get("provenance", {}).get("seen"))


def seal_adapter(folder: str | Path) -> None:
    """Add checksums to an adapter's folder of an earlier version; its other files stay unchanged.

    Raises:
        UserError: It is no adapter, or damaged.
    """
    open_adapter(folder)
    write_checksums(Path(folder))


def attach(adapter: Adapter, denoiser: Denoiser, base: str, scales: Sequence[float]) -> None:
    """Stack an adapter on a model and the adapters that it has, in place; its values are appended to their fields.

    Args:
        adapter: The adapter.
        denoiser: The model's.
        base: The model's hash, without any adapter.
        scales: Scale of every adapter in the order in which they were attached, this one last.

    Raises:
        UserError: It belongs to another model, does not fit, or adds a value that the model already has.
    """
    if adapter.base != base:
        raise UserError(
            f"The adapter {adapter.folder} belongs to the model {adapter.base[:12]}, and this one is {base[:12]}.",
            "Load the model it was trained on, in fp32 (the hash is that of the exact weights); convert afterwards.",
        )
    conditioner, unet = denoiser.conditioner, denoiser.unet
    for name, values in adapter.values.items():
        if conditioner is None or name not in conditioner.schema.names:
            raise UserError(f"The adapter {adapter.folder} adds values to {name!r}, which the model does not have.")
        if there := [value for value in values if value in conditioner.schema.field(name).values]:
            raise UserError(
                f"The adapter {adapter.folder} adds {name} {', '.join(there)}, which another adapter added before.",
                "Load only one of them.",
            )
        width = conditioner.embeddings[embedding_key(name)].codes.weight.shape[1]  # type: ignore[union-attr,index]
        if adapter.vectors[name].shape != (len(values), width):
            raise UserError(f"The adapter {adapter.folder} has vectors of another width for {name}.")
    peft, number = require_peft(), len(scales) - 1
    if {key: value.shape for key, value in adapter.weights.items()} != _shapes(unet, adapter.config):
        raise UserError(
            f"The matrices of the adapter {adapter.folder} do not fit the network.", "Copy the whole folder again."
        )
    add_lora(unet, **adapter.config, name=f"adapter_{number}")
    peft.set_peft_model_state_dict(unet, adapter.weights, adapter_name=f"adapter_{number}")
    set_weights_and_activate_adapters(unet, [f"adapter_{i}" for i in range(len(scales))], list(scales))
    network: nn.Module = unet
    nn.Module.to(network, device=unet.device, dtype=unet.dtype)  # diffusers' own warns of modules that there are not
    network.requires_grad_(False).eval()
    for name, values in adapter.values.items():
        assert conditioner is not None  # checked above
        conditioner.append(name, values)
        table: torch.Tensor = conditioner.embeddings[embedding_key(name)].codes.weight  # type: ignore[union-attr,assignment]
        with torch.no_grad():
            table[-len(values) :] = adapter.vectors[name].to(table)


def _shapes(unet: nn.Module, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shape by name of the matrices of an adapter: A maps a layer's input to the rank, B the rank to its output."""
    ends, rank = tuple(f".{target}" for target in config["targets"]), config["rank"]
    found = {}
    for name, layer in unet.named_modules():
        if f".{name}".endswith(ends):
            weight: Any = layer.weight
            found[f"{name}.lora_A.weight"] = torch.Size((rank, *weight.shape[1:]))
            found[f"{name}.lora_B.weight"] = torch.Size((weight.shape[0], rank, *[1] * (weight.ndim - 2)))
    return found


def merge(unet: Any) -> None:
    """Add the update of every adapter, at its scale, to the weights, and remove the adapters, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(unet.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    del unet.peft_config
