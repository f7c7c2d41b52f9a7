"""Safetensors files that are written and read tensor by tensor, and their size before they exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_medi.core.tensor_files import read_tensors, tensor_file_bytes, write_tensors

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sha256": "0" * 64}])
@pytest.mark.parametrize(
    "tensors",
    [
        [("mean", "F16", (3, 4, 8, 8))],
        [("features", "F32", (1000, 48)), ("known", "U8", (1000,))],
        [("a/step", "F32", ()), ("b.weight", "F16", (7,)), ("a/count", "I64", (1, 2)), ("none", "F32", (0, 5))],
        [(f"block.{i}.weight", "F32", (i, 3)) for i in range(120)],
        [(f"x{i}", kind, (3, 2)) for i, kind in enumerate(TYPES)],
    ],
)
def test_the_size_is_that_of_the_file(tmp_path: Path, tensors: list, metadata: dict[str, str] | None) -> None:
    save_file({n: torch.zeros(s, dtype=TYPES[t]) for n, t, s in tensors}, tmp_path / "x.safetensors", metadata)
    assert tensor_file_bytes(tensors, metadata) == (tmp_path / "x.safetensors").stat().st_size


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """The same bytes, of tensors in any memory layout; and they are read back, more than a mapping has."""
    torch.manual_seed(0)
    tensors = {f"block.{i}.weight": torch.randn(3, i % 5) for i in range(150)}
    tensors |= {"conv": torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last), "turned": torch.randn(5, 7).T}
    tensors |= {"ä/step": torch.tensor(3.0), "count": torch.tensor(7), "half": torch.randn(9).half()}
    tensors |= {f"type.{kind}": torch.arange(5).to(dtype) for kind, dtype in TYPES.items()}
    tensors |= {"map": torch.arange(256).byte(), "learned": torch.nn.Parameter(torch.randn(2))}
    write_tensors(tensors, tmp_path / "ours.safetensors")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    loaded = load_file(tmp_path / "ours.safetensors")
    read = {name: tensor.clone() for name, tensor in read_tensors(tmp_path / "ours.safetensors")}
    assert read.keys() == tensors.keys() == loaded.keys()
    assert all(
        torch.equal(read[name], tensor) and torch.equal(loaded[name], tensor) for name, tensor in tensors.items()
    )
