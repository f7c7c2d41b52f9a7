"""Finding a model folder and reading what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.errors import UserError
from latent_medi.files import read_json
from latent_medi.latents.autoencoder import Autoencoder, first_line, in_own_memory, load_autoencoder

AUTOENCODER_FILE, OBJECTIVE_FILE, PROVENANCE_FILE = "autoencoder.json", "objective.json", "provenance.json"


def local_folder(name: str | Path, download: Mapping[str, Any] | None = None) -> Path:
    """A model folder, downloaded first if the name is a hub id ``owner/name``; only JSON and safetensors are fetched.

    Args:
        name: The folder or hub id.
        download: Arguments of a download, such as ``revision``.

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
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **(download or {})))
    except Exception as error:  # offline, absent, refused: the message says which
        raise UserError(
            f"{name} is no folder here, and cannot be downloaded: {first_line(error)}",
            "Check the path or the hub id. For a machine without a network, run "
            f"`hf download {name} --include '*.json' '*.safetensors' --local-dir FOLDER` on one with it, copy FOLDER "
            "here and give its path.",
        ) from None


def read_model(
    folder: str | Path, autoencoder: Autoencoder | str | Path | None, torch_dtype: torch.dtype,
    device: torch.device | str, download: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The parts of a pipeline, by the names of its arguments, and ``carried``: whether the autoencoder was inside.

    Args and raises as for :meth:`~latent_medi.diffusion.pipeline.MediPipeline.from_pretrained`.
    """
    path = local_folder(folder, download)
    index = read_json(path / "model_index.json")
    if index.get("_class_name") != "MediPipeline":
        raise UserError(f"{folder} holds a {index.get('_class_name')}, not a latent-medi model.")
    known = read_json(path / AUTOENCODER_FILE)
    try:
        unet = in_own_memory(
            UNet2DModel.from_pretrained(str(path / "unet"), use_safetensors=True, torch_dtype=torch_dtype)
        )
        scheduler = DDPMScheduler.from_pretrained(str(path / "scheduler"))
        conditioning = None
        if (path / "conditioning").is_dir():
            conditioning = MetadataConditioner.from_pretrained(
                str(path / "conditioning"), use_safetensors=True, torch_dtype=torch_dtype
            )
    except UserError:
        raise
    except Exception as error:  # safetensors, JSON, shapes and missing files each have their own
        raise UserError(f"The model in {folder} cannot be loaded: {error}", "Copy the whole folder again.") from error
    carried = autoencoder is None and (path / "autoencoder").is_dir()
    if carried:
        autoencoder = load_autoencoder(path / "autoencoder", device)
        autoencoder.source = known["source"]
    elif not isinstance(autoencoder, Autoencoder):
        autoencoder = load_autoencoder(autoencoder or known["source"], device)
    if autoencoder.hash != known["hash"]:
        raise UserError(
            f"The model in {folder} was trained on latents of {known['source']} ({known['hash'][:12]}), "
            f"and {autoencoder.source} ({autoencoder.hash[:12]}) is another.",
            "Give the right one as `autoencoder`.",
        )
    objective = ObjectiveSettings(**read_json(path / OBJECTIVE_FILE)) if (path / OBJECTIVE_FILE).is_file() else None
    provenance = read_json(path / PROVENANCE_FILE) if (path / PROVENANCE_FILE).is_file() else {}
    shift, scale = torch.tensor(known["shift"]), torch.tensor(known["scale"])
    return {
        "unet": unet, "scheduler": scheduler, "conditioning": conditioning, "autoencoder": autoencoder,
        "shift": shift, "scale": scale, "objective": objective, "provenance": provenance, "carried": carried,
    }  # fmt: skip
