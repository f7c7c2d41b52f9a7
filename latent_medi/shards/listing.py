"""What a dataset folder will hold, listed before a pixel is read."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from latent_medi.metadata.schema import Schema


@dataclass(frozen=True)
class Listing:
    """The patches of a dataset that is yet to be made.

    Args:
        index: A row per patch: key, patient, slide, fields and ``split_NAME``, as the index will have them.
        schema: Its fields.
        counts: Patches of each shard.
    """

    index: pd.DataFrame
    schema: Schema
    counts: list[int]


def in_shards(patches: int, per_shard: int) -> list[int]:
    """Patches of each shard where all but the last are full."""
    whole, rest = divmod(patches, per_shard)
    return [per_shard] * whole + [rest] * bool(rest)
