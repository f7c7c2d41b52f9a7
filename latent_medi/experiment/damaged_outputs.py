"""Whether outputs of an experiment are complete, by files, sizes and headers alone, which takes moments.

Each function lists what is absent or damaged, as paths to remove before the output is made again.
"""

from __future__ import annotations

from pathlib import Path

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_object


def damaged_dataset(folder: Path) -> list[Path]:
    """A dataset folder's two files if they cannot be opened, else its shards that are absent or cut off."""
    from latent_medi.shards.dataset import INDEX_FILE, INFO_FILE, PatchDataset

    try:
        shards = PatchDataset.open(folder).info["shards"]
        return [path for shard in shards if _size(path := folder / shard["file"]) != shard["bytes"]]
    except (UserError, KeyError, TypeError):
        return [folder / INFO_FILE, folder / INDEX_FILE]


def reopen(*folders: Path) -> None:
    """Let damaged dataset folders be written again: intact shards stay, and so do splits."""
    from latent_medi.shards.dataset import INFO_FILE
    from latent_medi.shards.writing.records import PROGRESS_FOLDER
    from latent_medi.shards.writing.rewrite import reopen_dataset

    for folder in folders:
        if folder.is_dir() and damaged_dataset(folder):
            (folder / PROGRESS_FOLDER).mkdir(exist_ok=True)
            if (folder / INFO_FILE).is_file():
                reopen_dataset(folder)


def damaged_latents(folder: Path) -> list[Path]:
    """A latent folder's ``latents.json``, which marks it as finished, if a part of it is absent or cut off."""
    from latent_medi.latents.store import INFO_FILE, LatentStore

    try:
        LatentStore(folder, "mmap")
    except (UserError, KeyError, TypeError, ValueError):
        return [folder / INFO_FILE]
    return []


def damaged_model(folder: Path) -> list[Path]:
    """The folder of a model, an adapter or a classifier, if a file of it is absent or cut off."""
    from safetensors import SafetensorError, safe_open

    from latent_medi.core.checksums import CHECKSUMS_FILE

    try:
        listed = read_object(folder / CHECKSUMS_FILE)["sha256"] if (folder / CHECKSUMS_FILE).is_file() else None
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        if listed is not None:  # other files are the user's
            files = [folder / name for name in listed]
        for path in files:
            if path.suffix == ".json":
                read_object(path)
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares its length with the header's
                    pass
        names = {path.relative_to(folder).as_posix() for path in files}
    except (UserError, OSError, SafetensorError, KeyError, TypeError):
        return [folder]
    weights = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    # A part that has a network's configuration has its weights too.
    parts = {name.rpartition("/")[0] for name in names if name.endswith("/config.json")} - {"scheduler"}
    if "model_index.json" in names:
        index = read_object(folder / "model_index.json")
        # [null, null] is a part that the model does not have, such as the conditioner of an unconditional one.
        listed = [name for name, what in index.items() if isinstance(what, list) and any(what)]
        parts |= {name for name in listed if name not in ("scheduler", "autoencoder")}
        complete = {"model_index.json", "autoencoder.json", "unet/config.json"} <= names and parts <= weights
    else:
        kinds = {"adapter.json", "config.json", "classifier.json"}  # an adapter, a latent and an image classifier
        complete = bool(kinds & names) and "" in weights
    return [] if complete else [folder]


def damaged_metrics(path: Path) -> list[Path]:
    """A ``metrics.json``, if it cannot be read or an earlier version wrote it."""
    from latent_medi.evaluation.results import read_metrics

    try:
        read_metrics(path)
    except UserError:
        return [path]
    return []


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
