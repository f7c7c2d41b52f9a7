"""As train.py, and notes which patches each process reads: recorded_train.py FOLDER ARGUMENTS…"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.cli import main
from latent_medi.latents.store import LatentStore
from latent_medi.training.data import TrainingData

FOLDER = Path(sys.argv[1])
batch, moments = TrainingData.batch, LatentStore.moments
read: list[np.ndarray] = []


def watched_moments(store: LatentStore, rows: np.ndarray, *views: Any) -> Any:
    read.append(np.asarray(rows))
    return moments(store, rows, *views)


def watched_batch(data: TrainingData, number: int, *rest: Any) -> Any:
    read.clear()
    result = batch(data, number, *rest)
    key_of = dict(zip(data.rows.tolist(), data.keys.tolist(), strict=True))
    keys = [key_of[int(row)] for row in np.concatenate(read)]
    rank = os.environ.get("RANK", "0")
    with open(FOLDER / f"rank-{rank}.jsonl", "a") as file:
        file.write(json.dumps({"number": number, "rank": int(rank), "keys": keys}) + "\n")
    return result


LatentStore.moments, TrainingData.batch = watched_moments, watched_batch  # type: ignore[method-assign]
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[2:]]))
