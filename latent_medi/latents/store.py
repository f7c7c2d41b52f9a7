"""Random access to the moments of a latent folder: mapped from disk, or resident in memory or on a device."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from latent_medi.errors import UserError
from latent_medi.files import read_json
from latent_medi.latents.encode import INFO_FILE, SCHEMA_VERSION

_SHARE = 0.4  # of the free memory that "auto" is willing to fill
_CHUNK = 4096  # rows per step of the statistics


class LatentStore:
    """The moments of a dataset's patches by row number of its index.

    Args:
        folder: Latent folder.
        resident: "mmap" reads from disk on demand, "ram" loads everything, "auto" loads if it takes at most 40 % of
            the free memory.
        device: With "ram", where to hold them, such as "cuda"; moments then come from there.

    Attributes:
        info: The content of ``latents.json``.
        shape: (C, h, w) of a latent.
        deterministic: Whether there is a mean only.

    Raises:
        UserError: The folder is absent, unfinished or damaged.
    """

    def __init__(
        self, folder: str | Path, resident: Literal["auto", "mmap", "ram"] = "auto", device: torch.device | str = "cpu"
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / INFO_FILE).is_file():
            state = "is not finished" if (self.folder / ".progress").is_dir() else "is no latent folder"
            raise UserError(f"{folder} {state}: it has no {INFO_FILE}.", "Run `latent-medi encode` (again).")
        self.info: dict[str, Any] = read_json(self.folder / INFO_FILE)
        if self.info.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{folder} has latent version {self.info.get('schema_version')!r}; this program reads {SCHEMA_VERSION}."
            )
        self.shape: tuple[int, int, int] = tuple(self.info["shape"])
        self.deterministic = bool(self.info["autoencoder"]["deterministic"])
        names = ["mean"] if self.deterministic else ["mean", "std"]
        self._starts = np.concatenate([[0], np.cumsum([s["count"] for s in self.info["shards"]])]).astype(np.int64)
        self._mapped = {name: [self._map(shard, name) for shard in self.info["shards"]] for name in names}
        if resident not in ("auto", "mmap", "ram"):
            raise UserError(f"Latents are resident 'auto', 'mmap' or 'ram', not {resident!r}.")
        self.resident = resident == "ram" or (resident == "auto" and self.nbytes <= _SHARE * _free_memory())
        self._loaded: dict[str, torch.Tensor] = {}
        if self.resident:
            empty = np.empty((0, *self.shape), np.float16)
            self._loaded = {
                n: torch.from_numpy(np.concatenate([empty, *maps])).to(device) for n, maps in self._mapped.items()
            }
            self._mapped = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all moments in bytes."""
        return len(self) * int(np.prod(self.shape)) * 2 * (1 if self.deterministic else 2)

    def _map(self, shard: dict[str, Any], name: str) -> np.ndarray:
        """One tensor of a shard's file, mapped. Safetensors is a length, a JSON header, and the tensors' bytes."""
        path, shape = self.folder / shard["file"], [shard["count"], *self.shape]
        try:
            with open(path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                entry = json.loads(handle.read(length))[name]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error!r}.", "Restore it, or encode again.") from None
        end = 8 + length + entry["data_offsets"][1]
        if entry["shape"] != shape or entry["dtype"] != "F16" or path.stat().st_size < end:
            raise UserError(
                f"{path} is damaged: {name} is {entry['dtype']} {entry['shape']} instead of F16 {shape}, or cut off.",
                "Encode again.",
            )
        if not shard["count"]:
            return np.empty(shape, np.float16)
        return np.memmap(path, np.float16, "r", 8 + length + entry["data_offsets"][0], tuple(shape))

    def _rows(self, name: str, rows: np.ndarray) -> torch.Tensor:
        if self.resident:
            values = self._loaded[name]
            return values[torch.from_numpy(rows).to(values.device)].float()
        out = np.empty((len(rows), *self.shape), np.float16)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard):
            where = np.flatnonzero(shard == number)
            out[where] = self._mapped[name][number][rows[where] - self._starts[number]]
        return torch.from_numpy(out).float()

    def moments(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Moments of some rows, in the order asked for, repeats allowed.

        Returns:
            Mean fp32 [n, C, h, w], and standard deviation of the same shape or ``None`` for a deterministic
            autoencoder.

        Raises:
            UserError: A row number out of range.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise UserError(f"Rows of {self.folder} run from 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}.")
        return self._rows("mean", rows), None if self.deterministic else self._rows("std", rows)

    def statistics(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation per channel of *sampled* latents over some rows: var = var(mean) + E[std²].

        Returns:
            Shift and scale, fp32 [C] each; (latent − shift) / scale has mean 0 and standard deviation 1 per channel.

        Raises:
            UserError: There is no row, or a channel is constant.
        """
        rows = np.sort(np.asarray(rows, dtype=np.int64).reshape(-1))
        if not len(rows):
            raise UserError(f"There is no row of {self.folder} to take the shift and scale from.")
        channels = self.shape[0]
        # Two passes: a difference of large sums would cost digits.
        total, spread = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        pixels = len(rows) * self.shape[1] * self.shape[2]
        chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        for chunk in chunks:
            total += self.moments(chunk)[0].double().sum((0, 2, 3)).cpu()
        shift = total / pixels
        for chunk in chunks:
            mean, std = self.moments(chunk)
            spread += (mean.double().cpu() - shift[:, None, None]).square().sum((0, 2, 3))
            if std is not None:
                spread += std.double().square().sum((0, 2, 3)).cpu()
        scale = (spread / pixels).sqrt()
        if not bool((scale > 1e-6).all()):
            flat = [i for i, s in enumerate(scale.tolist()) if not s > 1e-6]
            raise UserError(
                f"Latent channels {flat} of {self.folder} are constant over the training rows.",
                "Is every patch the same?",
            )
        return shift.float(), scale.float()


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
