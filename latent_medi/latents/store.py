"""Random access to the moments of a latent folder: read from disk on demand, or resident in RAM or on a device.

Every file is compared with its hash once per process, before it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from latent_medi.core.errors import UserError
from latent_medi.latents.info import INFO_FILE, held_rows, read_info
from latent_medi.latents.shard_files import OpenFiles, ShardFile
from latent_medi.metadata.row_filter import only_text

Residence = Literal["auto", "mmap", "ram", "device"]
Moments = tuple[torch.Tensor, torch.Tensor | None]

_SHARE = 0.4  # most of the free RAM that "auto" fills
DEVICE_SHARE = 0.1  # most of a device's free memory, which the model needs as well
_CHUNK = 4096  # latents per step of the statistics


class LatentStore:
    """The moments of the patches of a dataset, by row number of its index; of all, or of those that a filter kept.

    Args:
        folder: Latent folder.
        resident: "mmap" reads rows from disk on demand, "ram" loads everything, "device" loads everything onto
            ``device``; "auto" takes a device other than the CPU if the moments fill at most 10 % of its free memory,
            else RAM if they fill at most 40 % of that, else "mmap".
        device: Device on which moments are needed, such as "cuda".

    Attributes:
        info: The content of ``latents.json``.
        shape: (C, h, w) of a latent.
        deterministic: Whether there is a mean only.
        views: Symmetries stored per patch, 1 or 8.
        rows: Row numbers of the dataset that have latents, ascending int64.
        resident: "mmap", "ram" or "device".

    Raises:
        UserError: The folder is absent, unfinished or damaged.
    """

    def __init__(self, folder: str | Path, resident: Residence = "auto", device: torch.device | str = "cpu") -> None:
        self.folder = Path(folder)
        if not (self.folder / INFO_FILE).is_file():
            state = "is not finished" if (self.folder / ".progress").is_dir() else "is no latent folder"
            raise UserError(f"{folder} {state}: it has no {INFO_FILE}.", "Run `latent-medi encode` (again).")
        self.info: dict[str, Any] = read_info(self.folder)
        self.shape: tuple[int, int, int] = tuple(self.info["shape"])
        self.deterministic = bool(self.info["autoencoder"]["deterministic"])
        self.views = int(self.info.get("views", 1))
        self._names = ["mean"] if self.deterministic else ["mean", "std"]
        self._starts = np.concatenate([[0], np.cumsum([s["count"] for s in self.info["shards"]])]).astype(np.int64)
        held = held_rows(self.info, self.folder)
        self._whole, self.rows = held is None, np.arange(len(self)) if held is None else held
        inner = [*([self.views] if self.views > 1 else []), *self.shape]
        self._shards = [
            ShardFile(self.folder / s["file"], s["sha256"], {name: [s["count"], *inner] for name in self._names})
            for s in self.info["shards"]
        ]
        self._files = OpenFiles()
        if resident not in ("auto", "mmap", "ram", "device"):
            raise UserError(f"resident must be 'auto', 'mmap', 'ram' or 'device', not {resident!r}.")
        self.resident = choose_residence(self.nbytes, device) if resident == "auto" else resident
        self._loaded: dict[str, torch.Tensor] = {}
        if self.resident != "mmap":
            self._load(torch.device(device if self.resident == "device" else "cpu"))

    def _load(self, device: torch.device) -> None:
        """Load all moments, [n·views, C, h, w] by name, shard by shard, so that RAM never holds all for a device."""
        shape = (len(self) * self.views, *self.shape)
        self._loaded = {name: torch.empty(shape, dtype=torch.float16, device=device) for name in self._names}
        for start, shard in zip(self._starts * self.views, self._shards, strict=False):
            parts = {name: np.empty(shard.tensors[name].shape, np.float16) for name in self._names}
            self._files.read(shard, [(name, 0, part) for name, part in parts.items()])
            for name, part in parts.items():
                flat = torch.from_numpy(part.reshape(-1, *self.shape))
                self._loaded[name][int(start) : int(start) + len(flat)] = flat
        self._files.close()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all moments in bytes."""
        return len(self) * self.views * int(np.prod(self.shape)) * 2 * (1 if self.deterministic else 2)

    @property
    def identity(self) -> str:
        """What distinguishes these moments from others of the same patches and autoencoder; empty for one view."""
        return f"views={self.views}" if self.views > 1 else ""

    def _rows(self, rows: np.ndarray, views: np.ndarray) -> dict[str, torch.Tensor]:
        """Moments by name, fp32, of valid rows and views."""
        at = rows * self.views + views
        if self.resident != "mmap":
            index = moved(torch.from_numpy(at), self._loaded["mean"].device)
            return {name: values[index].float() for name, values in self._loaded.items()}
        out = {name: np.empty((len(rows), *self.shape), np.float16) for name in self._names}
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard):
            where = np.flatnonzero(shard == number)
            inside = at[where] - self._starts[number] * self.views
            # Consecutive rows are read at once.
            breaks = np.flatnonzero((np.diff(inside) != 1) | (np.diff(where) != 1)) + 1
            first = np.concatenate([[0], breaks])
            runs = [
                (int(inside[i]), int(where[i]), int(where[j - 1]) + 1)
                for i, j in zip(first, [*breaks, len(where)], strict=True)
            ]
            self._files.read(
                self._shards[number], [(name, row, out[name][a:b]) for name in self._names for row, a, b in runs]
            )
        return {name: torch.from_numpy(values).float() for name, values in out.items()}

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        """The place of some rows of the dataset among those that have latents.

        Raises:
            UserError: A row has none.
        """
        at = np.minimum(np.searchsorted(self.rows, rows), max(len(self) - 1, 0))
        if absent := int((self.rows[at] != rows).sum()):
            raise UserError(
                f"{absent:,} of {len(rows):,} patches have no latents in {self.folder}: it holds those with "
                f"{only_text(self.info['only'])}.",
                "Use the same filter (only.FIELD=…), or encode without one into another folder.",
            )
        return at

    def check_held(self, rows: np.ndarray) -> None:
        """Refuse rows without latents.

        Raises:
            UserError: Says how many.
        """
        if not self._whole:
            self._positions(rows)

    def moments(self, rows: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | None = None) -> Moments:
        """Moments of some rows, in their order; rows may repeat.

        Args:
            rows: Row numbers.
            views: The symmetry of each row, 0 to :attr:`views` − 1 as in :func:`latent_medi.latents.views.view_of`;
                ``None`` takes the patches as they were cut.

        Returns:
            Mean fp32 [n, C, h, w], and standard deviation of the same shape or ``None`` for a deterministic
            autoencoder.

        Raises:
            UserError: A row or view number is out of range, or a row has no latents.
        """
        of = len(self) if self._whole else int(self.info["of"])
        rows, views = check_rows(rows, views, of, self.views, str(self.folder))
        found = self._rows(rows if self._whole else self._positions(rows), views)
        return found["mean"], found.get("std")

    def statistics(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation per channel of *sampled* latents over some rows and all their views.

        Returns:
            Shift and scale, fp32 [C] each; (latent − shift) / scale has mean 0 and standard deviation 1 per channel.

        Raises:
            UserError: There is no row, or a channel is constant.
        """
        rows = np.sort(np.asarray(rows, dtype=np.int64).reshape(-1))
        rows, views = np.repeat(rows, self.views), np.tile(np.arange(self.views), len(rows))

        def chunks() -> Iterable[Moments]:
            for i in range(0, len(rows), _CHUNK):
                yield self.moments(rows[i : i + _CHUNK], views[i : i + _CHUNK])

        return channel_statistics(chunks, self.shape, len(rows), str(self.folder))


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the CPU in pinned memory, from which a GPU copies asynchronously; others unchanged."""
    return tensor.contiguous().pin_memory() if tensor.device.type == "cpu" else tensor


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device, copied asynchronously.

    A copy from memory that is not :func:`pinned` would wait for all work of the GPU, and delay the next batch.
    """
    device = torch.device(device)
    ready = device.type != "cuda" or tensor.is_cuda or (tensor.is_contiguous() and tensor.is_pinned())
    return (tensor if ready else pinned(tensor)).to(device, non_blocking=True)


def check_rows(
    rows: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | None, count: int, known: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Row and view numbers as int64 [n] each.

    Raises:
        UserError: A number is out of range.
    """
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    if len(rows) and (rows.min() < 0 or rows.max() >= count):
        raise UserError(f"Rows of {where} must be from 0 to {count - 1}, not {rows.min()} to {rows.max()}.")
    if views is None:
        return rows, np.zeros(len(rows), np.int64)
    views = np.asarray(views, dtype=np.int64).reshape(-1)
    if len(views) != len(rows):
        raise UserError(f"There must be a view for each of {len(rows)} rows, not {len(views)}.")
    if len(views) and (views.min() < 0 or views.max() >= known):
        raise UserError(f"Views of {where} must be from 0 to {known - 1}, not {views.min()} to {views.max()}.")
    return rows, views


def channel_statistics(
    chunks: Callable[[], Iterable[Moments]], shape: tuple[int, int, int], count: int, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel of sampled latents: var = var(mean) + E[std²].

    Args:
        chunks: Gives the moments in parts; called twice, because a difference of large sums would lose digits.
        shape: (C, h, w).
        count: Latents in all parts.
        where: Their folder, for messages.

    Returns:
        Shift and scale, fp32 [C] each, on the CPU.

    Raises:
        UserError: There is no latent, or a channel is constant.
    """
    if not count:
        raise UserError(f"There is no row of {where} to measure shift and scale on.")
    channels = shape[0]
    total, spread = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    pixels = count * shape[1] * shape[2]
    for mean, _ in chunks():
        total += mean.double().sum((0, 2, 3)).cpu()
    shift = total / pixels
    for mean, std in chunks():
        spread += (mean.double() - shift.to(mean.device)[:, None, None]).square().sum((0, 2, 3)).cpu()
        if std is not None:
            spread += std.double().square().sum((0, 2, 3)).cpu()
    scale = (spread / pixels).sqrt()
    if not bool((scale > 1e-6).all()):
        flat = [i for i, s in enumerate(scale.tolist()) if not s > 1e-6]
        raise UserError(
            f"Latent channels {flat} of {where} are constant over the training rows.", "Check that patches differ."
        )
    return shift.float(), scale.float()


def choose_residence(nbytes: int, device: torch.device | str) -> Literal["mmap", "ram", "device"]:
    """Where to hold moments of ``nbytes``.

    On the device if it is no CPU and they take at most 10 % of its free memory; else in RAM if they take at most 40 %
    of it; else on disk.
    """
    device = torch.device(device)
    if device.type != "cpu" and nbytes <= DEVICE_SHARE * _free_on(device):
        return "device"
    return "ram" if nbytes <= _SHARE * _free_memory() else "mmap"


def _free_on(device: torch.device) -> int:
    """Free bytes of an accelerator; 0 if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _free_memory() -> int:
    """Free bytes of RAM for this process: its share of the free memory of the machine or container."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max", or no such limit on this system
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
