"""The loss by noise level and by value of each field, such as by hospital."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from latent_medi.diffusion.conditioning import Conditions
from latent_medi.metadata.schema import Schema

BUCKETS = 10
COLUMNS = ("images", "group", "value", "loss", "n")


class LossTable:
    """Sums of the weighted loss by tenth of the noise levels and by code of every field, over a logging interval.

    Dropped conditions count as "null". Sums stay on the device until :meth:`fold`.

    Args:
        schema: The model's fields, or ``None``.
        timesteps: Number of noise levels.
        device: Where the losses are.
    """

    def __init__(self, schema: Schema | None, timesteps: int, device: torch.device) -> None:
        edges = [i * timesteps // BUCKETS for i in range(BUCKETS + 1)]
        self.labels = [("timestep", f"{low}-{high - 1}") for low, high in pairwise(edges)]
        starts = []
        for field in schema.fields if schema is not None else ():
            starts.append(len(self.labels))
            values = ("value",) if field.continuous else field.values
            self.labels += [(field.name, value) for value in ("null", "unknown", *values)]
        # Every label belongs to one column of a sample's labels: that of its timestep, or of a field.
        counts = [BUCKETS, *(b - a for a, b in pairwise([*starts, len(self.labels)]))]
        self._column = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
        self._label = torch.arange(len(self.labels), device=device)
        self._timesteps = timesteps
        self._starts = torch.tensor(starts, dtype=torch.int64, device=device)
        # fp64 where there is: sums of many small numbers.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._recent = torch.zeros(len(self.labels), 2, dtype=dtype, device=device)
        self._total = np.zeros((len(self.labels), 2))

    def add(self, each: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions | None) -> None:
        """Add the weighted losses fp32 [n] of samples at timesteps int64 [n]."""
        rows = (timesteps * BUCKETS // self._timesteps)[:, None]
        if conditions is not None:
            rows = torch.cat([rows, conditions.codes + self._starts], 1)
        values = each.detach().to(self._recent.dtype)
        if values.device.type == "cpu":
            both = torch.stack([values, torch.ones_like(values)], 1)
            self._recent.index_add_(0, rows.flatten(), both.repeat_interleave(rows.shape[1], 0))
        else:
            self._recent += sums_by_label(values, rows[:, self._column] == self._label)

    def fold(self, accelerator: Accelerator) -> None:
        """Add the sums of all processes to those of the interval; every process must call."""
        self._total += accelerator.reduce(self._recent, "sum").double().cpu().numpy()
        self._recent.zero_()

    def rows(self, images: int) -> list[tuple[Any, ...]]:
        """Rows of :data:`COLUMNS`, one for every group with samples."""
        return [
            (images, *label, repr(float(total / count)), int(count))
            for label, (total, count) in zip(self.labels, self._total, strict=True)
            if count
        ]

    def clear(self) -> None:
        """Begin a new interval."""
        self._total[:] = 0.0

    def state(self) -> list[list[float]]:
        """The interval's sums, JSON-able with every bit."""
        return self._total.tolist()

    def load(self, state: list[list[float]]) -> None:
        """Continue from :meth:`state`."""
        if state:
            self._total = np.array(state, dtype=np.float64)


def sums_by_label(values: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
    """Sum and number of the values [n] that belong (bool [n, labels]) to each label, [labels, 2].

    A GPU's ``index_add_`` adds in an order that varies from run to run, and so do its last digits. These sums have one
    order.
    """
    return torch.stack([torch.where(belongs, values[:, None], 0.0).sum(0), belongs.sum(0)], 1)
