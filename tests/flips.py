"""Single flipped bits in a file, and what a reader makes of each: a helper of the tests of every artefact."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from latent_medi.core.errors import UserError


@dataclass
class Outcomes:
    """What came of some flips.

    Args:
        refused: Flips that the reader refused with a UserError that names the file.
        harmless: Flips after which the reader gave exactly what it gives without.
        silent: A description of each flip after which it gave something else.
        tracebacks: Of each flip that ended in another error than a UserError.
        nameless: Messages that do not name the file.
    """

    refused: int = 0
    harmless: int = 0
    silent: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fail unless every flip was refused by name or was harmless."""
        problems = [*self.silent, *self.tracebacks, *self.nameless]
        assert not problems, f"{len(problems)} flips went wrong, such as\n" + "\n".join(problems[:5])


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """The file with one bit of one byte inverted, in place; put right afterwards."""
    whole = path.read_bytes()
    try:
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(bytes([whole[byte] ^ (1 << bit)]))
        yield
    finally:
        path.write_bytes(whole)


def flips(
    path: Path, read: Callable[[], Any], count: int = 100, seed: int = 0, names: str | tuple[str, ...] = ""
) -> Outcomes:
    """Read a file anew after each of some random flips.

    Args:
        path: The file.
        read: Opens it (nothing may be kept from call to call) and returns all that it gives: arrays, tensors, tables,
            and mappings and sequences of them.
        count: Number of flips, each in another place.
        seed: Seed of the places.
        names: What a refusal has to contain, one of them if there are several; by default the file's name.
    """
    whole, outcomes = read(), Outcomes()
    wanted = (names,) if isinstance(names, str) else names
    wanted = tuple(name or path.name for name in wanted)
    places = np.random.default_rng(seed).choice(8 * path.stat().st_size, count, replace=False)
    for place in places.tolist():
        byte, bit = divmod(place, 8)
        where = f"{path.name}, byte {byte} bit {bit}"
        with flipped(path, byte, bit):
            try:
                value = read()
            except UserError as error:
                if any(name in str(error) for name in wanted):
                    outcomes.refused += 1
                else:
                    outcomes.nameless.append(f"{where}: {error}")
                continue
            except Exception:
                outcomes.tracebacks.append(f"{where}: {traceback.format_exc(limit=-4)}")
                continue
        if equal(whole, value):
            outcomes.harmless += 1
        else:
            outcomes.silent.append(f"{where}: another value without a word")
    return outcomes


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same to the last bit, whatever they are made of; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    if isinstance(a, torch.Tensor):
        a, b = (t.detach().cpu().contiguous() for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(-1).view(torch.uint8) == b.view(-1).view(
            torch.uint8)).all())  # fmt: skip
    if isinstance(a, np.ndarray):
        if a.dtype == object:
            return a.dtype == b.dtype and equal(a.tolist(), b.tolist())
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (isinstance(a, float) and a != a and b != b)
