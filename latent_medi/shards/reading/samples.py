"""Samples as they are stored: the image file and the JSON text of each patch, compared with their checksums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from latent_medi.core.errors import UserError
from latent_medi.shards.dataset import RESTORE, PatchDataset
from latent_medi.shards.format.tar import StreamSlices, sample_at


def samples(dataset: PatchDataset, rows: np.ndarray) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, image file and JSON member of each row, as stored.

    Args:
        dataset: Local or remote.
        rows: Row numbers, ascending.

    Raises:
        UserError: A shard is damaged.
    """
    for shard, mine in dataset.index.iloc[rows].groupby("shard", sort=False):
        try:
            with dataset.open_shard(str(shard)) as stream:
                data = StreamSlices(stream)
                for row, key, offset, size in mine[["key", "offset", "size"]].itertuples(name=None):
                    image, text = sample_at(data, key, dataset.info["codec"], offset, size)
                    dataset.check_member(row, image, image=True)
                    dataset.check_member(row, text, image=False)
                    yield key, image, text
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{dataset.place_of(str(shard))} cannot be read: {error}.", RESTORE) from None
