"""Checkpoints: written at once or not at all, compared with their hashes, the newest few kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latent_medi.core.checksums import compare, inside, warn_unsealed
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_sealed, remove, sha256_file, temporaries, write_sealed
from latent_medi.core.json_types import check_types
from latent_medi.core.progress import get_logger
from latent_medi.core.tensor_files import read_tensors, write_tensors

logger = get_logger("training")

_NAME = re.compile(r"images-(\d{12})")
_STATE = "state.json"
_REMEDY = "Remove this checkpoint, or restore it from a copy."
_STATE_TYPES: dict[str, Any] = {"images": int, "sha256": dict, "run?": dict, "scaler?": dict}
_STATE_TYPES |= {"whitening?": [[float]], "losses?": [[float]]}
_STATE_TYPES |= {"window?": [[(float, None)]]}  # no norm where fp16's loss scaler skipped the update


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """(images seen, path) of every checkpoint in ``folder``, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("images-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    folder: Path, images: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``folder/images-%012d`` in one step and remove all but the newest ``keep``.

    Args:
        folder: Folder of the run's checkpoints.
        images: Images seen.
        tensors: Tensors of each file, such as {"model": …, "ema": …, "optimizer": …}; each becomes
            ``<name>.safetensors``.
        state: Everything that is not a tensor; must be JSON-able (floats keep every bit).
        keep: Checkpoints to keep, >= 1. With two, a run can continue when the newest is damaged.
    """
    path = folder / f"images-{images:012d}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for name, mapping in tensors.items():
            write_tensors(mapping, temporary / f"{name}.safetensors")
        hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        write_sealed(temporary / _STATE, {"images": images, "sha256": hashes, **state})
    # Only after the new one is safe. A checkpoint of more images is damaged, or this one would not have been written.
    older = [(seen, old) for seen, old in checkpoint_folders(folder) if seen < images]
    for _, old in older[: len(older) - keep + 1] + [e for e in checkpoint_folders(folder) if e[0] > images]:
        remove(old)
    return path


def _state(path: Path) -> tuple[dict[str, Any], bool]:
    """A checkpoint's state, and whether it has a checksum.

    Raises:
        UserError: It is damaged, or belongs to another checkpoint.
    """
    state, sealed = read_sealed(path / _STATE, _REMEDY)
    # Earlier versions wrote no checksum of the state, so what it must hold is checked here.
    needed = _STATE_TYPES if sealed else {**_STATE_TYPES, "run": dict, "whitening": [[float]]}
    check_types(state, needed, path / _STATE, _REMEDY)
    if len({len(values) for values in state.get("whitening", [])}) > 1 or len(state.get("whitening", "12")) != 2:
        raise UserError(f"{path / _STATE} is damaged: whitening is not a shift and a scale.", _REMEDY)
    if (match := _NAME.fullmatch(path.name)) and state["images"] != int(match[1]):
        raise UserError(f"{path / _STATE} is for {state['images']:,} images, not {int(match[1]):,}.", _REMEDY)
    return state, sealed


def verify_checkpoint(path: Path) -> str:
    """The problem with a checkpoint, or "" if every file has the content that was written."""
    try:
        state, sealed = _state(path)
        compare(path, state["sha256"], path / _STATE, _REMEDY)
    except UserError as error:
        return error.message
    except OSError as error:
        return f"it cannot be read ({error})"
    if not sealed:
        warn_unsealed(path, "The next checkpoint has them.")
    return ""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are logged and skipped."""
    for _, path in reversed(checkpoint_folders(folder)):
        problem = verify_checkpoint(path)
        if not problem:
            return path
        logger.warning("The checkpoint %s is damaged: %s Using the one before.", path, problem)
    return None


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left in ``folder``."""
    for path in temporaries(folder):
        remove(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that was verified.

    Raises:
        UserError: It was damaged in the meantime.
    """
    return _state(path)[0]


def tensor_files(path: Path, state: Mapping[str, Any]) -> dict[str, Path]:
    """The files with the tensors of a checkpoint, by name without extension.

    Args:
        path: The checkpoint.
        state: What :func:`load_state` read there.

    Raises:
        UserError: The state names a file outside the checkpoint.
    """
    return {Path(name).stem: inside(path, name, path / _STATE) for name in sorted(state["sha256"])}


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file of a checkpoint.

    Raises:
        UserError: It was damaged in the meantime.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"The checkpoint's {file} cannot be read: {error}", _REMEDY)


def seal_checkpoints(folder: Path) -> None:
    """Add checksums to the checkpoints that an earlier version wrote.

    Raises:
        UserError: One is damaged.
    """
    for path in checked_checkpoints(folder):
        write_sealed(path / _STATE, load_state(path))


def checked_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in ``folder``, oldest first.

    Raises:
        UserError: One is damaged.
    """
    for _, path in checkpoint_folders(folder):
        if problem := verify_checkpoint(path):
            raise UserError(f"The checkpoint {path} is damaged: {problem}", _REMEDY)
    return [path for _, path in checkpoint_folders(folder)]


def trained_tensors(module: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """A module's state without its frozen parameters, which are those of the model that the run started from.

    Args:
        module: The denoiser or its average.
        names: The trained parameters.
    """
    frozen = {name for name, _ in module.named_parameters()} - set(names)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trained(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], names: list[str]) -> None:
    """Load the tensors of :func:`trained_tensors` into a module.

    Raises:
        UserError: A tensor is missing or has no place.
    """
    expected = set(trained_tensors(module, names))
    if expected != set(tensors):
        raise UserError(
            f"The checkpoint lacks or adds tensors: {', '.join(sorted(expected ^ set(tensors))[:5])}.", _REMEDY
        )
    module.load_state_dict(tensors, strict=False)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """An AdamW's state as named tensors ``<parameter>/<entry>``, without hyperparameters, which are settings.

    Args:
        optimizer: The optimizer; one parameter group, or several in the order of ``names``. The 8-bit one's nested
            entries become ``<parameter>/<group>/<entry>``.
        names: Parameter names in the optimizer's order.
    """
    found: dict[str, torch.Tensor] = {}
    for i, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, dict):  # cloned, since all parameters share their quantisation maps
                found |= {f"{names[i]}/{key}/{k}": torch.as_tensor(v).clone() for k, v in value.items()}
            else:
                found[f"{names[i]}/{key}"] = torch.as_tensor(value)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path, names: list[str]) -> None:
    """Load the tensors of :func:`optimizer_tensors` from a file into an optimizer.

    Raises:
        UserError: The file was damaged in the meantime.
    """
    try:
        _load_optimizer(optimizer, read_tensors(file), names)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, torch.Tensor]], names: list[str]
) -> None:
    position = {name: i for i, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, stored in tensors:
        name, entry, *inner = key.split("/")
        at = position[name]
        # In the memory layout of the parameter, because fused kernels read both in order of address.
        like = parameters[at] if stored.shape == parameters[at].shape else stored
        value = torch.empty_like(like, device="cpu", dtype=stored.dtype).copy_(stored)
        # The 8-bit optimizer counts its steps in a Python number.
        kept = int(value) if value.ndim == 0 and not value.is_floating_point() else value
        entries = state.setdefault(at, {})
        if inner:
            entries.setdefault(entry, {})[inner[0]] = kept
        else:
            entries[entry] = kept
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
