"""The size of a safetensors file, before it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

_TYPES = {"F16": 2, "F32": 4, "I64": 8, "U8": 1}


def tensor_file_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of a safetensors file: a length, a JSON header padded to a multiple of 8, and the tensors.

    Args:
        tensors: Name, type ("F16", "F32", "I64" or "U8") and shape of each. They are stored by type, the widest first,
            and then by name.
        metadata: Its further entries.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, kind, shape in sorted(tensors, key=lambda tensor: (-_TYPES[tensor[1]], tensor[0])):
        start, end = end, end + _TYPES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + end
