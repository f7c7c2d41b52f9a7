"""A dataset folder into a latent folder: posterior moments, one file per image shard, resumed shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_sealed, refuse_foreign, remove, sha256_file, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger, progress
from latent_medi.features.cache import content_hash
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.autoencoder import PRECISIONS, Autoencoder, latent_shape, load_autoencoder
from latent_medi.latents.info import INFO_FILE, SCHEMA_VERSION, read_info, write_info
from latent_medi.latents.reconstruction_error import floor_text, measure_floor
from latent_medi.latents.settings import EncodeSettings, FloorSettings
from latent_medi.latents.views import view_of
from latent_medi.launch import make_accelerator
from latent_medi.shards.dataset import INFO_FILE as DATASET_FILE
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads
from latent_medi.shards.reading.remote import open_dataset

logger = get_logger("latents")

_PROGRESS = ".progress"


def encode(settings: EncodeSettings) -> Path:
    """Encode a dataset folder as the settings say; returns the latent folder."""
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    device = torch.device(settings.device) if settings.device else accelerator.device
    with agreed(accelerator) as declared:
        settings.check()
        autoencoder = load_autoencoder(settings.autoencoder, device, PRECISIONS[settings.precision])
        declared.add_settings(settings, without=("data", "autoencoder", "device", "workers", "slicing"))
    if settings.slicing:
        autoencoder.enable_slicing()
    return encode_dataset(
        settings.data, autoencoder, settings.out, settings.device_batch, None, accelerator, settings.workers,
        settings.views, settings.floor,
    )  # fmt: skip


def encode_dataset(
    dataset: str | Path,
    autoencoder: Autoencoder,
    out: str | Path,
    device_batch: int = 64,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    workers: int | None = None,
    views: int = 1,
    floor: FloorSettings | None = None,
) -> Path:
    """Encode a dataset folder.

    Args:
        dataset: Dataset folder, or the URL of one.
        autoencoder: What encodes.
        out: Latent folder to write. If it was cut off, shards that are whole are kept.
        device_batch: Patches per forward pass.
        device: Where to run; ``None`` leaves the autoencoder where it is.
        accelerator: With several processes, shard i is encoded by process i modulo their number. Every process must
            call.
        workers: Threads that decode images ahead; ``None`` takes what suits the device.
        views: 1, or 8 to encode each patch under every symmetry of the square, in pixel space.
        floor: The reconstruction floor to measure, by the first process, if the folder has none yet; ``None`` for
            none.

    Returns:
        The latent folder.

    Raises:
        UserError: The folder holds something else or is written by another job, the patches do not fit the
            autoencoder, or a latent is beyond fp16.
    """
    out = Path(out)
    if device is not None:
        autoencoder.to(device)
    with output_lock(out, accelerator):
        _encode(dataset, autoencoder, out, device_batch, accelerator, workers, views, floor)
    return out


def _encode(
    dataset: str | Path, autoencoder: Autoencoder, out: Path, device_batch: int, accelerator: Accelerator | None,
    workers: int | None, views: int, floor: FloorSettings | None,
) -> None:  # fmt: skip
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    with agreed(accelerator) as declared:
        data = open_dataset(dataset)
        workers = read_ahead_threads(autoencoder.device, data) if workers is None else workers
        header = {
            "schema_version": SCHEMA_VERSION,
            "dataset": data.name,
            "autoencoder": {**autoencoder.description, "precision": str(autoencoder.dtype).removeprefix("torch.")},
            "shape": list(latent_shape(autoencoder, data.patch_size)),
            "views": views,
            "dtype": "float16",
        }
        shards = shard_rows(data)
        if floor is not None and floor.patches and rank == 0:
            load_encoder(floor.encoder, floor.weights or None)  # a wrong name is told now, not after hours
        if (out / DATASET_FILE).is_file():
            raise UserError(f"{out} is a dataset folder.", "Latents go into a folder of their own.")
        refuse_foreign(out, {INFO_FILE: "autoencoder", _PROGRESS: ""}, [INFO_FILE, "data/part-*.safetensors"])
        finished = (out / INFO_FILE).is_file()
        if finished:
            _check_same(out, header, data)
        declared.add_input("data", dataset, lambda: content_hash(data))
        declared.add_input("autoencoder", autoencoder.description["source"], lambda: autoencoder.hash)
        declared.add_settings({"out": str(out), "device_batch": device_batch, "views": views, "finished": finished})
    if finished:
        logger.info("%s is finished.", out)
    else:
        (out / _PROGRESS).mkdir(parents=True, exist_ok=True)  # a kill before the first note leaves a folder of ours
        mine = list(enumerate(data.info["shards"]))[rank::processes]
        reader = ReadAhead(data, workers)
        for number, shard in progress(mine, desc="encoding", unit="shard") if rank == 0 else mine:
            rows = shards[shard["file"]]
            if _record_of(out, number, shard, len(rows), header) is None:
                _encode_shard(reader, rows, shard, autoencoder, out, number, device_batch, header)
        reader.close()
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if rank == 0:
            _finish(out, data, shards, header)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    if rank == 0:
        _tell_floor(out, data, autoencoder, floor, device_batch, workers)


def _tell_floor(
    out: Path, data: PatchDataset, autoencoder: Autoencoder, floor: FloorSettings | None, batch: int, workers: int
) -> None:
    """Measure the floor if it is wanted and not known; log it if it is known."""
    info = read_info(out)
    if floor is not None and floor.patches and len(data) and "floor" not in info:
        info["floor"] = measure_floor(data, out, autoencoder, floor, batch, workers)
        write_info(out, info)
    if "floor" in info:
        logger.info("%s", floor_text(info["floor"]))


def shard_rows(data: PatchDataset) -> dict[str, np.ndarray]:
    """Row numbers of each shard, which must stand together and in the order of the shards."""
    codes = pd.Categorical(data.index["shard"], categories=[s["file"] for s in data.info["shards"]]).codes
    if np.any(codes < 0) or np.any(np.diff(codes.astype(np.int64)) < 0):
        raise UserError(f"The index of {data.folder} is not in the order of its shards.", "Write the dataset again.")
    return {s["file"]: np.flatnonzero(codes == i) for i, s in enumerate(data.info["shards"])}


def _paths(out: Path, number: int) -> tuple[Path, Path]:
    return out / "data" / f"part-{number:06d}.safetensors", out / _PROGRESS / f"part-{number:06d}.json"


def _record_of(
    out: Path, number: int, shard: dict[str, Any], count: int, header: dict[str, Any]
) -> dict[str, Any] | None:
    """The record of a shard of ``count`` patches that is whole and up to date, else ``None``."""
    file, note = _paths(out, number)
    if not (file.is_file() and note.is_file()):
        return None
    try:
        record, _ = read_sealed(note, "")
        kept = record["shard"]
        same = record["header"] == header and kept["source_sha256"] == shard["sha256"] and kept["count"] == count
        return kept if same and kept["file"] == f"data/{file.name}" and sha256_file(file) == kept["sha256"] else None
    except (UserError, KeyError, TypeError):  # damaged: encoding the shard again costs less than trusting it
        return None


def _encode_shard(
    reader: ReadAhead, rows: np.ndarray, shard: dict[str, Any], autoencoder: Autoencoder, out: Path, number: int,
    batch: int, header: dict[str, Any],
) -> None:  # fmt: skip
    data, views = reader.dataset, header["views"]
    parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
    for _, images in reader.batches(rows, batch):
        moments = [autoencoder.encode(view_of(images, view)) for view in range(views)]
        # A dimension of views only where there are several, so that one view is laid out as it always was.
        for name, values in zip(parts, zip(*moments, strict=True), strict=True):
            if values[0] is not None:
                halves = [value.half() for value in values]
                parts[name].append((torch.stack(halves, 1) if views > 1 else halves[0]).cpu())
    tensors = {name: torch.cat(values) for name, values in parts.items() if values}
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        keys = data.index["key"].iloc[rows[(~torch.isfinite(tensors[bad[0]]).flatten(1).all(1)).numpy()]]
        raise UserError(
            f"The {bad[0]} of the latent of {keys.iloc[0]!r} in {shard['file']} is not finite in fp16.",
            "Encode in fp32.",
        )
    file, note = _paths(out, number)
    with atomic_path(file) as temporary:
        save_file(tensors, str(temporary))
    mean = tensors["mean"].double()
    others = tuple(i for i in range(mean.ndim) if i != mean.ndim - 3)  # all but the channels
    record: dict[str, Any] = {
        "file": f"data/{file.name}",
        "sha256": sha256_file(file),
        "source": shard["file"],
        "source_sha256": shard["sha256"],
        "count": len(rows),
        "sum": mean.sum(others).tolist(),
        "sum_squares": mean.square().sum(others).tolist(),
        "sum_variances": tensors["std"].double().square().sum(others).tolist() if "std" in tensors else None,
    }
    write_sealed(note, {"header": header, "shard": record})


def _finish(out: Path, data: PatchDataset, shards: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    records = [
        _record_of(out, number, shard, len(shards[shard["file"]]), header)
        for number, shard in enumerate(data.info["shards"])
    ]
    if None in records:
        raise UserError(f"{out}: shard {records.index(None)} was not encoded.", "Run the same command again.")
    count = sum(r["count"] for r in records if r is not None)
    # Σ and Σ² per channel run over every latent pixel of the means, of all views; Σσ² is what sampling the posterior
    # adds. Counts are patches.
    write_info(out, {**header, "count": count, "shards": records})
    remove(out / _PROGRESS)


def _check_same(out: Path, header: dict[str, Any], data: PatchDataset) -> None:
    info = read_info(out)
    if info.get("autoencoder", {}).get("hash") != header["autoencoder"]["hash"]:
        raise UserError(f"{out} holds latents of another autoencoder.", "Choose another folder, or remove this one.")
    precision, asked = info["autoencoder"].get("precision"), header["autoencoder"]["precision"]
    if precision not in (None, asked):  # earlier versions did not note it
        raise UserError(
            f"{out} holds latents encoded in {precision}, not {asked}.",
            "Encode in that precision, choose another folder, or remove this one.",
        )
    if info.get("views", 1) != header["views"]:
        raise UserError(
            f"{out} holds {info.get('views', 1)} view(s) per patch, not {header['views']}.",
            "Choose another folder, or remove this one.",
        )
    if [s["source_sha256"] for s in info["shards"]] != [s["sha256"] for s in data.info["shards"]]:
        raise UserError(
            f"{out} holds latents of other images than {data.folder}.", "Choose another folder, or remove this one."
        )
