"""Encoding of a dataset folder into a latent folder of posterior moments, one file per image shard; resumable."""

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
from latent_medi.core.progress import Progress, get_logger
from latent_medi.features.cache import content_hash
from latent_medi.features.encoders import load_encoder
from latent_medi.features.needed import check_encoder
from latent_medi.latents.autoencoder import PRECISIONS, Autoencoder, latent_shape, load_autoencoder
from latent_medi.latents.info import (
    INFO_FILE,
    SCHEMA_VERSION,
    as_ranges,
    held_rows,
    made_from,
    read_info,
    source_hash,
    write_info,
)
from latent_medi.latents.networks import latents_fit
from latent_medi.latents.reconstruction_error import measure_reconstruction, reconstruction_text
from latent_medi.latents.settings import EncodeSettings, ReconstructionSettings
from latent_medi.latents.views import view_of
from latent_medi.launch import make_accelerator
from latent_medi.metadata.row_filter import Only, only_mask, only_text
from latent_medi.shards.dataset import INFO_FILE as DATASET_FILE
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads
from latent_medi.shards.reading.remote import open_dataset

logger = get_logger("latents")

_PROGRESS = ".progress"


def encode(settings: EncodeSettings) -> Path:
    """Encode a dataset folder; returns the latent folder."""
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    device = torch.device(settings.device) if settings.device else accelerator.device
    with agreed(accelerator) as declared:
        settings.check()
        data, error = open_dataset(settings.data), settings.reconstruction_error
        only_mask(data.index, settings.only, str(data.folder))
        if error.patches and not (Path(settings.out) / INFO_FILE).is_file():  # it is loaded later
            check_encoder(error.encoder, error.weights)
        autoencoder = load_autoencoder(settings.autoencoder, device, PRECISIONS[settings.precision])
        declared.add_settings(settings, without=("data", "autoencoder", "device", "workers", "slicing"))
    if settings.slicing:
        autoencoder.enable_slicing()
    return encode_dataset(
        settings.data,
        autoencoder,
        settings.out,
        settings.device_batch,
        accelerator=accelerator,
        workers=settings.workers,
        views=settings.views,
        reconstruction=settings.reconstruction_error,
        only=settings.only,
    )


def encode_dataset(
    dataset: str | Path,
    autoencoder: Autoencoder,
    out: str | Path,
    device_batch: int = 64,
    accelerator: Accelerator | None = None,
    workers: int | None = None,
    views: int = 1,
    reconstruction: ReconstructionSettings | None = None,
    only: Only | None = None,
) -> Path:
    """Encode a dataset folder.

    Args:
        dataset: Dataset folder, or the URL of one.
        autoencoder: What encodes, on its device.
        out: Latent folder to write. If it was cut off, shards that are whole are kept.
        device_batch: Patches per forward pass.
        accelerator: With several processes, shard i is encoded by process i modulo their number. Every process must
            call.
        workers: Threads that decode images ahead; ``None`` takes what suits the device.
        views: 1, or 8 to encode each patch under every symmetry of the square, in pixel space.
        reconstruction: The reconstruction error to measure, by the first process, if the folder has none yet; ``None``
            for none.
        only: Values by field: only patches with one of them are encoded.

    Returns:
        The latent folder.

    Raises:
        UserError: The folder holds something else or is written by another job, no patch has these values, the patches
            do not fit the autoencoder, or a latent is beyond fp16.
    """
    out, reconstruction = Path(out), reconstruction or ReconstructionSettings(patches=0)
    with output_lock(out, accelerator):
        _encode(dataset, autoencoder, out, device_batch, accelerator, workers, views, reconstruction, only or {})
    return out


def _encode(
    dataset: str | Path,
    autoencoder: Autoencoder,
    out: Path,
    device_batch: int,
    accelerator: Accelerator | None,
    workers: int | None,
    views: int,
    reconstruction: ReconstructionSettings,
    only: Only,
) -> None:
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    with agreed(accelerator) as declared:
        data = open_dataset(dataset)
        workers = read_ahead_threads(autoencoder.device, data) if workers is None else workers
        encoding = _Encoding(data, autoencoder, out, views, device_batch, only)
        if reconstruction.patches and rank == 0:  # a wrong name is refused now, not after hours
            load_encoder(reconstruction.encoder, reconstruction.weights or None)
        if (out / DATASET_FILE).is_file():
            raise UserError(f"{out} is a dataset folder.", "Latents go into a folder of their own.")
        refuse_foreign(out, {INFO_FILE: "autoencoder", _PROGRESS: ""}, [INFO_FILE, "data/part-*.safetensors"])
        finished = (out / INFO_FILE).is_file()
        if finished:
            encoding.check_finished()
        declared.add_input("data", dataset, lambda: content_hash(data))
        declared.add_input("autoencoder", autoencoder.source, lambda: autoencoder.hash)
        chosen = {"device_batch": device_batch, "views": views, "only": only_text(only)}
        declared.add_settings({"out": str(out), **chosen, "finished": finished})
    if finished:
        logger.info("%s is finished.", out)
    else:
        (out / _PROGRESS).mkdir(parents=True, exist_ok=True)  # a kill before the first record leaves a folder of ours
        mine = encoding.numbers[rank::processes]
        reader = ReadAhead(data, workers)
        total = sum(len(encoding.rows[number]) for number in mine)
        with Progress(total, "encoding", "patches") as shown:
            for number in mine:
                if encoding.record(number) is None:
                    encoding.encode(reader, number, shown)
                else:
                    shown.skip(len(encoding.rows[number]))
        reader.close()
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if rank == 0:
            encoding.finish()
        if accelerator is not None:
            accelerator.wait_for_everyone()
    if rank == 0:
        _measure_reconstruction(out, data, autoencoder, reconstruction, device_batch, workers)


def _measure_reconstruction(
    out: Path, data: PatchDataset, autoencoder: Autoencoder, settings: ReconstructionSettings, batch: int, workers: int
) -> None:
    """Measure the reconstruction error if it is wanted and not known; log it if it is known."""
    info = read_info(out)
    if settings.patches and len(data) and "floor" not in info:
        info["floor"] = measure_reconstruction(data, out, autoencoder, settings, batch, workers)
        write_info(out, info)
    if "floor" in info:
        logger.info("%s", reconstruction_text(info["floor"]))


def shard_rows(data: PatchDataset) -> list[np.ndarray]:
    """Row numbers of each shard.

    Raises:
        UserError: The index is not in the order of the shards.
    """
    codes = pd.Categorical(data.index["shard"], categories=[s["file"] for s in data.info["shards"]]).codes
    if np.any(codes < 0) or np.any(np.diff(codes.astype(np.int64)) < 0):
        raise UserError(f"The index of {data.folder} is not in the order of its shards.", "Write the dataset again.")
    return [np.flatnonzero(codes == i) for i in range(len(data.info["shards"]))]


class _Encoding:
    """The encoding of one dataset into one latent folder, shard by shard.

    Args:
        data: The dataset.
        autoencoder: What encodes.
        out: The latent folder.
        views: 1 or 8.
        batch: Patches per forward pass.
        only: Values by field of the patches to encode.

    Raises:
        UserError: The patches do not fit the autoencoder, no patch is to be encoded, or the index is not in the order
            of its shards.
    """

    def __init__(
        self, data: PatchDataset, autoencoder: Autoencoder, out: Path, views: int, batch: int, only: Only
    ) -> None:
        self.data, self.autoencoder, self.out, self.views, self.batch = data, autoencoder, out, views, batch
        self.header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "dataset": data.name,
            "autoencoder": {**autoencoder.description, "precision": str(autoencoder.dtype).removeprefix("torch.")},
            "shape": list(latent_shape(autoencoder, data.patch_size)),
            "views": views,
            "dtype": "float16",
        }
        self.shards: list[dict[str, Any]] = data.info["shards"]
        kept = only_mask(data.index, only, str(data.folder))
        self.rows = [rows[kept[rows]] for rows in shard_rows(data)]
        self.only = {name: list(values) for name, values in only.items()}
        # A folder of all patches has a file for every shard, and says nothing of rows.
        self.numbers = [number for number, rows in enumerate(self.rows) if len(rows) or not only]
        if only:
            self.header |= {"only": self.only, "of": len(data), "source_sha256": source_hash(self.shards)}
            logger.info("%s of %s patches have %s.", f"{kept.sum():,}", f"{len(data):,}", only_text(only))

    def _paths(self, number: int) -> tuple[Path, Path]:
        """A shard's latents, and its record."""
        name = f"part-{number:06d}"
        return self.out / "data" / f"{name}.safetensors", self.out / _PROGRESS / f"{name}.json"

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of a shard whose latents are whole and up to date, else ``None``."""
        file, path = self._paths(number)
        if not (file.is_file() and path.is_file()):
            return None
        expected = self.shards[number]["sha256"], len(self.rows[number]), f"data/{file.name}"
        try:
            content, _ = read_sealed(path, "")
            kept = content["shard"]
            same = (kept["source_sha256"], kept["count"], kept["file"]) == expected
            same = same and content["header"] == self.header and sha256_file(file) == kept["sha256"]
            same = same and kept.get("rows") == self._ranges(number)
            return kept if same else None
        except (UserError, KeyError, TypeError):  # damaged: encoding the shard again costs less than trusting it
            return None

    def _ranges(self, number: int) -> list[int] | None:
        """The encoded rows of a shard as ranges, if not all are."""
        return as_ranges(self.rows[number]) if self.only else None

    def encode(self, reader: ReadAhead, number: int, shown: Progress) -> None:
        """Write the latents of a shard, and its record.

        Raises:
            UserError: A latent is not finite in fp16.
        """
        rows, shard = self.rows[number], self.shards[number]
        parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
        for _, images in reader.batches(rows, self.batch):
            moments = [self.autoencoder.encode(view_of(images, view)) for view in range(self.views)]
            # There is a dimension of views only for several views, so that the format of one view stays the same.
            for name, values in zip(parts, zip(*moments, strict=True), strict=True):
                if values[0] is not None:
                    halves = [value.half() for value in values]
                    parts[name].append((torch.stack(halves, 1) if self.views > 1 else halves[0]).cpu())
            shown.add(len(images))
        tensors = {name: torch.cat(values) for name, values in parts.items() if values}
        if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            keys = self.data.index["key"].iloc[rows[(~torch.isfinite(tensors[bad[0]]).flatten(1).all(1)).numpy()]]
            raise UserError(
                f"The {bad[0]} of the latent of {keys.iloc[0]!r} in {shard['file']} is not finite in fp16.",
                "Encode in fp32.",
            )
        file, record = self._paths(number)
        with atomic_path(file) as temporary:
            save_file(tensors, str(temporary))
        mean = tensors["mean"].double()
        others = tuple(i for i in range(mean.ndim) if i != mean.ndim - 3)  # all but the channels
        described: dict[str, Any] = {
            "file": f"data/{file.name}",
            "sha256": sha256_file(file),
            "source": shard["file"],
            "source_sha256": shard["sha256"],
            "count": len(rows),
            "sum": mean.sum(others).tolist(),
            "sum_squares": mean.square().sum(others).tolist(),
            "sum_variances": tensors["std"].double().square().sum(others).tolist() if "std" in tensors else None,
        }
        if self.only:
            described["rows"] = self._ranges(number)
        write_sealed(record, {"header": self.header, "shard": described})

    def finish(self) -> None:
        """Write ``latents.json``, and remove the records and what was encoded for another filter.

        Raises:
            UserError: A shard was not encoded.
        """
        records = {number: self.record(number) for number in self.numbers}
        if absent := [number for number, record in records.items() if record is None]:
            raise UserError(f"{self.out}: shard {absent[0]} was not encoded.", "Run the same command again.")
        # Σ and Σ² per channel run over every latent pixel of the means, of all views; Σσ² is what sampling the
        # posterior adds. Counts are patches.
        shards = list(records.values())
        write_info(self.out, {**self.header, "count": sum(map(len, self.rows)), "shards": shards})
        for file in {*(self.out / "data").glob("part-*.safetensors")} - {self._paths(n)[0] for n in self.numbers}:
            remove(file)
        remove(self.out / _PROGRESS)

    def check_finished(self) -> None:
        """Refuse a finished folder with other latents.

        Raises:
            UserError: Says what differs.
        """
        info, asked = read_info(self.out), self.header["autoencoder"]
        precision, views = info["autoencoder"].get("precision"), info.get("views", 1)
        held = held_rows(info, self.out)
        different = ""
        if not latents_fit(asked, info["autoencoder"]["hash"]):
            different = "of another autoencoder"
        elif precision not in (None, asked["precision"]):  # earlier versions did not record it
            different = f"encoded in {precision}, not {asked['precision']}"
        elif views != self.views:
            different = f"of {views} view(s) per patch, not {self.views}"
        elif not made_from(info, self.shards):
            different = f"of other images than {self.data.folder}"
        elif held is not None and not np.isin(np.concatenate(self.rows), held).all():
            different = f"of patches with {only_text(info['only'])} alone"
        if different:
            raise UserError(f"{self.out} holds latents {different}.", "Choose another folder, or remove this one.")
