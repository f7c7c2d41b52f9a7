"""The whole demo on the device, its headline compared with that of two CPU cores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from gpu_parts import records
from gpu_parts.child import Context
from gpu_parts.real import command

CPU = {
    "recovery_unseen": {"site": 1.00, "class": 0.95},
    "accuracy_shift": {"real": 0.740, "stain_transfer": 0.762, "medi": 0.814, "oracle": 0.870},
}
"""Of seed 0 on two CPU cores, as docs/results.md has it."""


def _compared(headline: Mapping[str, Any]) -> dict[str, str]:
    """Each figure on this device, and on the CPU."""
    found = {}
    for name, values in CPU.items():
        for key, value in values.items():
            here = headline.get(name, {}).get(key)
            if here is not None:
                found[f"{name} {key}"] = f"{here:.3g} (CPU {value:.3g})"
    return found


def _demo(context: Context) -> None:
    out, settings = context.work / "run", context.work / "demo.yaml"
    changes: dict[str, Any] = {"base": "demo/experiment", "parallel": 2}  # a GPU is too large for one such network
    if context.quick:
        data = context.work / "data"
        if not (data / "dataset.json").is_file():
            words = ["shards", "demo", f"out={data}", "scale=0.15"]
            command(context, words, "shards.log")
        changes |= {
            "data": str(data),
            "train": {"max_steps": 6, "log_every_images": 16},
            "seen_per_cell": 2,
            "unseen_per_cell": 4,
            "evaluate": {"repeats": 1, "real_splits": 0},
        }
    settings.write_text(yaml.safe_dump(changes))
    command(context, ["demo", f"out={out}", f"settings={settings}"], "demo.log")
    headline = json.loads((out / "headline.json").read_text(encoding="utf-8"))
    for name in ("headline.json", "report.html"):
        shutil.copy(out / name, context.pictures / name)
    context.figures(headline=headline)
    stages = {file.stem: json.loads(file.read_text()).get("seconds") for file in (out / "stages").glob("*.json")}
    context.figures(stages={name: seconds for name, seconds in stages.items() if seconds is not None})
    context.figures(compared_with_cpu=_compared(headline))
    if context.quick:
        return
    context.show(**dict(list(_compared(headline).items())[:3]))
    check = records.ROOT / "tests" / "end_to_end" / "check_headline.py"
    if check.is_file():
        done = subprocess.run(
            [sys.executable, str(check), str(out / "headline.json")], capture_output=True, text=True, check=False
        )
        print(done.stdout, done.stderr)
        missed = [line for line in done.stdout.splitlines() if line.startswith("MISS")]
        context.require(done.returncode == 0, "; ".join(missed) or "the headline could not be checked")


ROWS: dict[str, Callable[[Context], None]] = {"demo": _demo}
