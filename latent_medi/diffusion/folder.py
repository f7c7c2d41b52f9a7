"""Finding a model folder."""

from __future__ import annotations

from pathlib import Path

from latent_medi.errors import UserError
from latent_medi.latents.autoencoder import first_line


def local_folder(name: str | Path) -> Path:
    """A model folder, downloaded first if the name is a hub id ``owner/name``; only JSON and safetensors are fetched.

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
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # offline, absent, refused: the message says which
        raise UserError(
            f"{name} is no folder here, and cannot be downloaded: {first_line(error)}",
            "Check the path or the hub id. For a machine without a network, run "
            f"`hf download {name} --include '*.json' '*.safetensors' --local-dir FOLDER` on one with it, copy FOLDER "
            "here and give its path.",
        ) from None
