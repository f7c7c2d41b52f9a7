"""Finding a model folder and reading what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from latent_medi.core.checksums import inside, verify_checksums, warn_unsealed, write_checksums
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_object
from latent_medi.core.json_types import check_config, check_sizes, check_types
from latent_medi.core.kinds import hints
from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latents.autoencoder import Autoencoder, first_line, in_own_memory, load_autoencoder, refuse_missing

AUTOENCODER_FILE, OBJECTIVE_FILE, PROVENANCE_FILE = "autoencoder.json", "objective.json", "provenance.json"
REMEDY = "Copy the whole folder again, or remove it and repeat the command that made it."

_AUTOENCODER = {"source": str, "hash": str, "shift": [float], "scale": [float]}
_OBJECTIVE = {
    "prediction?": str, "schedule?": str, "beta_start?": float, "beta_end?": float, "timesteps?": int,
    "zero_terminal_snr?": bool, "weighting?": str, "gamma?": float, "loss?": str,
}  # fmt: skip
SEEN = {"complete": bool, "parts": [{"fields": [str], "rows": [list]}]}
"""Types of the record of what a model was shown."""


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


def seal_model(folder: str | Path) -> None:
    """Add checksums to a model folder of an earlier version, as it is.

    Raises:
        UserError: It is no model folder, or has checksums that say it is damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} holds no model.", "Give the folder with model_index.json.")
    verify_checksums(folder, REMEDY)
    write_checksums(folder)


def check_model(path: Path) -> None:
    """Compare a model folder with its checksums; one without them is reported once.

    Raises:
        UserError: A file is damaged, absent, or names one outside the folder.
    """
    if not verify_checksums(path, REMEDY):
        warn_unsealed(path)
    for part in (*path.glob("config.json"), *path.glob("*/config.json")):
        check_sizes(part, REMEDY)
    # Weights in several files, whose names diffusers would follow.
    for index in (*path.glob("*.index.json"), *path.glob("*/*.index.json")):
        told = read_object(index)
        check_types(told, {"weight_map": dict}, index, REMEDY)
        for name in told["weight_map"].values():
            inside(index.parent, name, index)


def read_parts(path: Path) -> dict[str, Any]:
    """The JSON files of a model folder that only this program reads, ``None`` for those that are not there:
    ``autoencoder``, ``objective`` and ``provenance``.

    Raises:
        UserError: One is damaged.
    """
    found: dict[str, Any] = {"autoencoder": None, "objective": None, "provenance": None}
    if (path / AUTOENCODER_FILE).is_file():
        known = read_object(path / AUTOENCODER_FILE)
        check_types(known, _AUTOENCODER, path / AUTOENCODER_FILE, REMEDY)
        found["autoencoder"] = known
    if (path / OBJECTIVE_FILE).is_file():
        told = read_object(path / OBJECTIVE_FILE)
        check_types(told, _OBJECTIVE, path / OBJECTIVE_FILE, REMEDY)
        found["objective"] = _objective(told, path / OBJECTIVE_FILE)
    if (path / PROVENANCE_FILE).is_file():
        found["provenance"] = read_object(path / PROVENANCE_FILE)
        check_types(found["provenance"], {"seen?": (SEEN, None)}, path / PROVENANCE_FILE, REMEDY)
    return found


def _objective(told: dict[str, Any], path: Path) -> ObjectiveSettings:
    try:
        objective = ObjectiveSettings(**told)
    except TypeError as error:  # an entry that is not there in this version
        raise UserError(f"{path} cannot be used: {error}.", REMEDY) from None
    for name, kind in hints(ObjectiveSettings).items():
        if (choices := get_args(kind)) and getattr(objective, name) not in choices:
            raise UserError(f"{path} says {name} {getattr(objective, name)!r}; known: {', '.join(choices)}.", REMEDY)
    objective.check()
    return objective


def read_model(
    folder: str | Path, autoencoder: Autoencoder | str | Path | None, torch_dtype: torch.dtype,
    device: torch.device | str, download: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The parts of a pipeline, by the names of its arguments, and ``carried``: whether the autoencoder was inside.

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
    if (path / "unet" / "config.json").is_file():
        check_config(path / "unet" / "config.json", UNet2DModel, REMEDY)
        check_types(read_object(path / "unet" / "config.json"), {"sample_size": int}, path / "unet/config.json", REMEDY)
    try:
        unet, told = UNet2DModel.from_pretrained(
            str(path / "unet"), use_safetensors=True, torch_dtype=torch_dtype, output_loading_info=True
        )
        refuse_missing(told, path / "unet")
        unet = in_own_memory(unet)
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
    shift, scale = torch.tensor(known["shift"]), torch.tensor(known["scale"])
    return {
        "unet": unet, "scheduler": scheduler, "conditioning": conditioning, "autoencoder": autoencoder,
        "shift": shift, "scale": scale, "objective": parts["objective"], "provenance": parts["provenance"] or {},
        "carried": carried,
    }  # fmt: skip
