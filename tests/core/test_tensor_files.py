"""The size of a safetensors file, known before it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latent_medi.core.tensor_files import tensor_file_bytes

TYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sha256": "0" * 64}])
@pytest.mark.parametrize(
    "tensors",
    [
        [("mean", "F16", (3, 4, 8, 8))],
        [("features", "F32", (1000, 48)), ("known", "U8", (1000,))],
        [("a/step", "F32", ()), ("b.weight", "F16", (7,)), ("a/count", "I64", (1, 2)), ("none", "F32", (0, 5))],
        [(f"block.{i}.weight", "F32", (i, 3)) for i in range(120)],
    ],
)
def test_the_size_is_that_of_the_file(tmp_path: Path, tensors: list, metadata: dict[str, str] | None) -> None:
    save_file({n: torch.zeros(s, dtype=TYPES[t]) for n, t, s in tensors}, tmp_path / "x.safetensors", metadata)
    assert tensor_file_bytes(tensors, metadata) == (tmp_path / "x.safetensors").stat().st_size
