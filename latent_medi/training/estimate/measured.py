"""Training speed and memory as measured on GPUs, shipped with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from latent_medi.core.files import read_object
from latent_medi.core.json_types import check_types

MEASURED = Path(__file__).parent / "measured.json"
"""Comes with the package."""


@dataclass(frozen=True)
class Measured:
    """A measurement of training: one network on one GPU.

    Args:
        card: Name of the GPU, from torch.
        revision: Git revision of this program.
        network: Preset of the network: "S", "B" or "L", on latents of 4×32×32.
        precision: "fp32", "bf16" or "fp16".
        compile: Whether it was compiled.
        images_per_second: Images trained on, in whole updates.
        peak_gib: Most GiB that torch had allocated.
    """

    card: str
    revision: str
    network: str
    precision: str
    compile: bool
    images_per_second: float
    peak_gib: float


_TYPES: dict[str, type] = get_type_hints(Measured)


def read_measured(path: Path = MEASURED) -> list[Measured]:
    """Rows of measurements.

    The file is a JSON object ``{"rows": [row, …]}``; a row is an object with all entries of :class:`Measured`::

        {"card": "NVIDIA H100 80GB HBM3", "revision": "2bebcb5", "network": "S", "precision": "bf16", "compile": true,
         "images_per_second": 5400.0, "peak_gib": 5.1}

    Args:
        path: Of the file.

    Raises:
        UserError: The file is absent or damaged, or a row lacks an entry or has one of another type.
    """
    remedy = "Install latent-medi again, or write the file as benchmarks/gpu.py does."
    value = read_object(path)
    check_types(value, {"rows": [_TYPES]}, path, remedy)
    return [Measured(**{name: kind(row[name]) for name, kind in _TYPES.items()}) for row in value["rows"]]


def measured_text(rows: list[Measured], network: str) -> list[str]:
    """Lines with the cards on which training of a network was measured, and the results.

    Args:
        rows: The measurements.
        network: Preset of the network; empty for another.
    """
    if not rows:
        return ["training has not been measured on a GPU yet"]
    alike = [row for row in rows if row.network == network]
    if not alike:
        known = ", ".join(sorted({f"{row.network} on {row.card}" for row in rows}))
        return [f"this network has not been measured on a GPU yet; measured: {known}"]
    return [
        f"measured on {row.card} at {row.revision}: network {row.network}, {row.precision}, "
        f"{'compiled' if row.compile else 'not compiled'}: {row.images_per_second:.4g} images/s, peak "
        f"{row.peak_gib:.2f} GiB"
        for row in alike
    ]
