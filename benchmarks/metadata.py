"""Audit and split of a generated table of a million patches: seconds and peak memory.

    python benchmarks/metadata.py [--quick] [--json FILE]

The peer is ``pandas.read_csv`` on the same file with every cell as a string, the least that any program must do.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from output import options, report

AUDIT = ["fields=[race,gender]"]
SPLIT = ["hold_out_fields=[class,site]", "hold_out_share=0.2", "stratify=[class]", "fractions={train: 0.9, val: 0.1}"]
PEER = "import pandas, sys; pandas.read_csv(sys.argv[1], dtype=str, keep_default_na=False)"


def generate(path: Path, rows: int) -> None:
    """A table of patches: 40 per slide, 2 slides per patient, 32 classes, each at a few of up to 600 sites."""
    draw = np.random.default_rng(0)
    slide = np.arange(rows) // 40
    patient = slide // 2
    patients = int(patient.max()) + 1
    site = draw.integers(0, rows * 600 // 1_000_000, patients)
    kind = (site % 32 + draw.integers(0, 3, patients)) % 32
    columns = {
        "slide": slide,
        "patient": patient,
        "class": kind[patient],
        "site": site[patient],
        "gender": draw.choice(["male", "female"], patients)[patient],
        "race": draw.choice(["white", "black", "asian", "not reported"], patients, p=[0.7, 0.1, 0.1, 0.1])[patient],
    }
    pd.DataFrame(columns).to_csv(path, index=False)


def timed(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in GiB (of the largest child so far) of a command."""
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    parser = options(__doc__, "200,000 rows instead of 1,000,000")
    arguments = parser.parse_args()
    rows = 200_000 if arguments.quick else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "patches.csv"
        generate(table, rows)
        program = [sys.executable, "-m", "latent_medi.cli"]
        read, _ = timed([sys.executable, "-c", PEER, str(table)])
        audit, memory = timed([*program, "audit", str(table), *AUDIT])
        split, most = timed([*program, "split", str(table), f"out={name}/split.csv", *SPLIT])
    result = {
        "rows": rows,
        "audit_seconds": audit,
        "split_seconds": split,
        "peak_gib": max(memory, most),
        "audit_over_pandas_read_csv": audit / read,
        "split_over_pandas_read_csv": split / read,
    }
    report(result, arguments.json)


if __name__ == "__main__":
    main()
