"""Safetensors files whose tensors are written and read one after the other, and their size before they exist."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TYPES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "F64": 8, "I64": 8}
"""Bytes of one value, in the order that safetensors gives types; a file holds the last ones first."""
_NAMES = {"bool": "BOOL", "bfloat16": "BF16", "uint8": "U8"} | {
    f"{word}{bits}": f"{word[0].upper()}{bits}"
    for word, widths in {"int": (8, 16, 32, 64), "float": (16, 32, 64)}.items()
    for bits in widths
}
_AT_ONCE = 64  # tensors that are read from one mapping of a file


def tensor_file_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of a safetensors file: a length, a JSON header padded to a multiple of 8, and the tensors.

    Args:
        tensors: Name, type (as safetensors names it, such as "F16" or "I64") and shape of each. They are stored by
            type, the widest first, and then by name.
        metadata: Its further entries.
    """
    header, end = _header(tensors, metadata)
    return len(header) + end


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write what safetensors' ``save_file`` would, with one tensor at a time on the CPU and in order of its indices.

    ``save_file`` needs all of them so at once: a second optimizer in memory, where that is on a GPU or channels-last.

    Args:
        tensors: By name; bool, uint8, signed integers, bfloat16 or float16 to float64, on any device.
        file: The file.
    """
    import torch

    kinds = {name: _NAMES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    with file.open("wb") as stream:
        stream.write(_header([(name, kinds[name], tuple(tensors[name].shape)) for name in tensors])[0])
        for name in _ordered(kinds):
            flat = tensors[name].detach().cpu().contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of a safetensors file, on the CPU, one after the other.

    A tensor shares the memory of the mapped file, of which only the part in use stays in memory: copy what is kept.

    Raises:
        SafetensorError, OSError: The file is damaged or missing.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = sorted(opened.keys())
    for start in range(0, len(names), _AT_ONCE):
        with safe_open(file, framework="pt") as opened:
            for name in names[start : start + _AT_ONCE]:
                yield name, opened.get_tensor(name)


def _ordered(kinds: Mapping[str, str]) -> list[str]:
    rank = {kind: -place for place, kind in enumerate(_TYPES)}
    return sorted(kinds, key=lambda name: (rank[kinds[name]], name))


def _header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """What a file begins with, and the bytes of the tensors after it."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end, shapes = 0, {name: (kind, shape) for name, kind, shape in tensors}
    for name in _ordered({name: kind for name, (kind, _) in shapes.items()}):
        kind, shape = shapes[name]
        start, end = end, end + _TYPES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end
