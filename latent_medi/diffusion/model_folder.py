"""A model folder: found, read, completed when it is written, and the hash that identifies a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from latent_medi.core.checksums import inside, verify_checksums, warn_unsealed, write_checksums
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_object, write_json, write_text
from latent_medi.core.json_types import check_config, check_sizes, check_types
from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.objective import settings_of
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latents.autoencoder import (
    Autoencoder,
    first_line,
    forget_path,
    in_own_memory,
    load_autoencoder,
    refuse_missing,
    save_autoencoder,
    weight_hash,
)
from latent_medi.latents.networks import latents_fit
from latent_medi.metadata.schema import Schema

if TYPE_CHECKING:
    from latent_medi.diffusion.pipeline import MediPipeline

AUTOENCODER_FILE, OBJECTIVE_FILE, PROVENANCE_FILE = "autoencoder.json", "objective.json", "provenance.json"
REMEDY = "Copy the whole folder again, or remove it and repeat the command that made it."

_AUTOENCODER = {"source": str, "hash": str, "shift": [float], "scale": [float], "latents_of?": [str]}
_OBJECTIVE: dict[str, type] = {f"{name}?": str for name in ("prediction", "schedule", "weighting", "loss")}
_OBJECTIVE |= {f"{name}?": float for name in ("beta_start", "beta_end", "gamma")}
_OBJECTIVE |= {"timesteps?": int, "zero_terminal_snr?": bool}
SEEN = {"complete": bool, "parts": [{"fields": [str], "rows": [list]}]}
"""Types of the record of the combinations that a model was trained on."""


def local_folder(name: str | Path, download: Mapping[str, Any] | None = None) -> Path:
    """A model folder, downloaded first if the name is a hub id ``owner/name``; only JSON and safetensors are fetched.

    Args:
        name: The folder or hub id.
        download: Arguments of a download, such as ``revision``, or ``allow_patterns`` for fewer files.

    Raises:
        UserError: It is no folder, and cannot be downloaded.
    """
    path, name = Path(name), str(name)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"There is no model folder {name}.", "Check the path, or give a hub id owner/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **({"allow_patterns": ["*.json", "*.safetensors"]} | dict(download or {}))))
    except Exception as error:  # offline, absent or refused; the message says which
        raise UserError(
            f"{name} is no folder here, and cannot be downloaded: {first_line(error)}",
            "Check the path or the hub id. For a machine without a network, run "
            f"`hf download {name} --include '*.json' '*.safetensors' --local-dir FOLDER` on one with it, copy FOLDER "
            "here and give its path.",
        ) from None


def known_fields(name: str | Path) -> Schema | None:
    """The fields of a model in a folder here, read without its weights, to refuse a wrong name at once.

    ``None`` for an unconditional model, a hub id, and a folder that cannot be read: loading it says why.
    """
    file = Path(name) / "conditioning" / "config.json"
    try:
        return Schema.from_dict(read_object(file)["schema"]) if file.is_file() else None
    except (UserError, KeyError):
        return None


def seal_model(folder: str | Path) -> None:
    """Add checksums to a model folder of an earlier version; its other files stay unchanged.

    Raises:
        UserError: It is no model folder, or does not match the checksums that it has.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} holds no model.", "Give the folder with model_index.json.")
    verify_checksums(folder, REMEDY)
    write_checksums(folder)


def check_model(path: Path) -> None:
    """Compare a model folder with its checksums; a folder without them is reported once.

    Raises:
        UserError: A file is damaged or absent, or names a file outside the folder.
    """
    if not verify_checksums(path, REMEDY):
        warn_unsealed(path)
    for part in (*path.glob("config.json"), *path.glob("*/config.json")):
        check_sizes(part, REMEDY)
    # Weights in several files, whose names diffusers would open.
    for index in (*path.glob("*.index.json"), *path.glob("*/*.index.json")):
        shards = read_object(index)
        check_types(shards, {"weight_map": dict}, index, REMEDY)
        for name in shards["weight_map"].values():
            inside(index.parent, name, index)


def read_parts(path: Path) -> dict[str, Any]:
    """``autoencoder``, ``objective`` and ``provenance`` of a model folder, from JSON files; ``None`` without a file.

    Raises:
        UserError: One is damaged.
    """
    found: dict[str, Any] = {"autoencoder": None, "objective": None, "provenance": None}
    if (path / AUTOENCODER_FILE).is_file():
        known = read_object(path / AUTOENCODER_FILE)
        check_types(known, _AUTOENCODER, path / AUTOENCODER_FILE, REMEDY)
        found["autoencoder"] = known
    if (path / OBJECTIVE_FILE).is_file():
        objective = read_object(path / OBJECTIVE_FILE)
        check_types(objective, _OBJECTIVE, path / OBJECTIVE_FILE, REMEDY)
        found["objective"] = _objective(objective, path / OBJECTIVE_FILE)
    if (path / PROVENANCE_FILE).is_file():
        found["provenance"] = read_object(path / PROVENANCE_FILE)
        check_types(found["provenance"], {"seen?": (SEEN, None)}, path / PROVENANCE_FILE, REMEDY)
    return found


def _objective(values: dict[str, Any], path: Path) -> ObjectiveSettings:
    try:
        objective = ObjectiveSettings(**values)
        objective.check()
    except TypeError as error:  # an entry that this version does not have
        raise UserError(f"{path} cannot be used: {error}.", REMEDY) from None
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error.message}", REMEDY) from None
    return objective


def read_model(
    folder: str | Path,
    autoencoder: Autoencoder | str | Path | None,
    torch_dtype: torch.dtype,
    device: torch.device | str,
    download: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of a pipeline by name, and ``carried``: whether the autoencoder was inside the folder.

    Args and raises as for :meth:`~latent_medi.diffusion.pipeline.MediPipeline.from_pretrained`.
    """
    path = local_folder(folder, download)
    check_model(path)
    index = read_object(path / "model_index.json")
    if index.get("_class_name") != "MediPipeline":
        raise UserError(f"{folder} holds a {index.get('_class_name')}, not a latent-medi model.")
    parts = read_parts(path)
    if (known := parts["autoencoder"]) is None:
        raise UserError(f"{path / AUTOENCODER_FILE} does not exist.", REMEDY)
    parts |= _read_networks(path, folder, torch_dtype)
    carried = autoencoder is None and (path / "autoencoder").is_dir()
    if carried:
        autoencoder = load_autoencoder(path / "autoencoder", device)
        autoencoder.source = known["source"]
    elif not isinstance(autoencoder, Autoencoder):
        autoencoder = load_autoencoder(autoencoder or known["source"], device)
    if not latents_fit(autoencoder.description, known["hash"]):
        raise UserError(
            f"The model in {folder} was trained on latents of {known['source']} ({known['hash'][:12]}), "
            f"and {autoencoder.source} ({autoencoder.hash[:12]}) is another.",
            "Give that autoencoder as `autoencoder`.",
        )
    whitening = {name: torch.tensor(known[name]) for name in ("shift", "scale")}
    provenance = parts["provenance"] or {}
    return {**parts, **whitening, "autoencoder": autoencoder, "provenance": provenance, "carried": carried}


def _read_networks(path: Path, folder: str | Path, torch_dtype: torch.dtype) -> dict[str, Any]:
    """Network, noise schedule and conditioner of a model folder, the last ``None`` for an unconditional model.

    Raises:
        UserError: They cannot be loaded.
    """
    config = path / "unet" / "config.json"
    if config.is_file():
        check_config(config, UNet2DModel, REMEDY)
        check_types(read_object(config), {"sample_size": int}, config, REMEDY)
    try:
        unet, loading = UNet2DModel.from_pretrained(
            str(path / "unet"), use_safetensors=True, torch_dtype=torch_dtype, output_loading_info=True
        )
        refuse_missing(loading, path / "unet")
        scheduler = DDPMScheduler.from_pretrained(str(path / "scheduler"))
        conditioning = None
        if (path / "conditioning").is_dir():
            conditioning = MetadataConditioner.from_pretrained(
                str(path / "conditioning"), use_safetensors=True, torch_dtype=torch_dtype
            )
    except UserError:
        raise
    except Exception as error:  # safetensors, JSON, shapes and missing files each have their own
        raise UserError(f"The model in {folder} cannot be loaded: {error}", REMEDY) from error
    return {"unet": in_own_memory(unet), "scheduler": scheduler, "conditioning": conditioning}


def complete_model(folder: Path, pipeline: MediPipeline, card: str, include_autoencoder: bool) -> None:
    """Add to a folder that diffusers wrote what only this program reads, a card, and checksums.

    Args:
        folder: With the network, the conditioner and the scheduler.
        pipeline: The model.
        card: Text of its README.
        include_autoencoder: Whether to put the autoencoder's weights inside.
    """
    for config in folder.rglob("*.json"):
        forget_path(config)
    autoencoder = pipeline.autoencoder
    if include_autoencoder:
        save_autoencoder(autoencoder, folder / "autoencoder")
    source = Path(autoencoder.source).name if include_autoencoder else autoencoder.source
    description = {**autoencoder.description, "source": source, "latent_size": pipeline.latent_shape[1]}
    description |= {"shift": pipeline.shift.tolist(), "scale": pipeline.scale.tolist()}
    write_json(folder / AUTOENCODER_FILE, description)
    write_json(folder / OBJECTIVE_FILE, asdict(pipeline.objective))
    write_json(folder / PROVENANCE_FILE, pipeline.provenance)
    write_text(folder / "README.md", card)
    write_checksums(folder)


def hash_model(
    unet: nn.Module,
    conditioning: MetadataConditioner | None,
    scheduler: Mapping[str, Any],
    autoencoder: str,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> str:
    """SHA-256 over all that a model's images depend on.

    Args:
        unet: The network.
        conditioning: The conditioner, or ``None``.
        scheduler: Configuration of the noise schedule.
        autoencoder: The autoencoder's hash.
        shift: fp32 [C].
        scale: fp32 [C].
    """
    facts: list[Any] = [weight_hash(unet), asdict(settings_of(scheduler)), autoencoder]
    facts += [shift.tolist(), scale.tolist()]
    if conditioning is not None:
        facts += [weight_hash(conditioning), conditioning.schema.to_dict(), conditioning.config["fusion"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def adapted_hash(base: str, adapters: Sequence[tuple[str, float]]) -> str:
    """SHA-256 of a model with adapters: of its own hash, and hash and scale of each adapter in order."""
    return hashlib.sha256(json.dumps([base, [list(each) for each in adapters]]).encode()).hexdigest()
