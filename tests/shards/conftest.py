from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch


@pytest.fixture(scope="session")
def make_patches() -> Callable[..., list[Patch]]:
    """``n`` patches of four per patient with a class, a site (one is NA) and an age that is unknown now and then."""

    def make(n: int = 24, size: int = 16, origin: str = "real") -> list[Patch]:
        rng = np.random.default_rng(0)
        return [
            Patch(
                key=f"p{i // 4}/{i:03d}",
                image=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
                patient=f"p{i // 4}",
                slide=f"p{i // 4}-s{i % 2}",
                x=16 * i,
                y=0,
                source_mpp=0.25,
                fields={
                    "class": "ab"[i // 4 % 2],
                    "site": ("NA", "01")[i // 8 % 2],
                    "age": "unknown" if i < 8 else 40.1 + i,
                },
                origin=origin,
                extra={"number": i, "note": f"n{i}", "score": float(i)},
            )
            for i in range(n)
        ]

    return make


@pytest.fixture(scope="session")
def schema(make_patches: Callable[..., list[Patch]]) -> Schema:
    table = pd.DataFrame([dict(p.fields) for p in make_patches()])
    return Schema.from_table(table, "class", ["site"], ["age"], {"age": "years"})
