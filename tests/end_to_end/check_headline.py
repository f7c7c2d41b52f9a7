"""Fail unless the demo's headline shows what the demo is there to show: ``python check_headline.py
runs/demo/headline.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def shortfalls(headline: dict) -> list[str]:
    """What the headline falls short of, in words; empty if all is well."""
    accuracy = headline["accuracy_shift"]
    seen = headline["accuracy_seen"]
    gap = accuracy["oracle"] - accuracy["real"]
    distances = {
        name: headline[name] for name in ("distance_unseen", "distance_unseen_colour_free", "distance_per_class")
    }
    others = sorted({found["metric"] for found in distances.values()} - {"kid"})
    if others:
        raise SystemExit(f"The bars are of the kernel distance (kid), the ratios of {', '.join(others)}.")
    lines = [
        ("ratio MeDi/CLS, unseen", distances["distance_unseen"]["ratio"], "<=", 0.25),
        ("ratio MeDi/CLS, unseen, colour-free", distances["distance_unseen_colour_free"]["ratio"], "<=", 0.3),
        ("ratio MeDi/CLS, per class", distances["distance_per_class"]["ratio"], "<=", 0.5),
        ("site recovered", headline["recovery_unseen"]["site"], ">=", 0.95),
        ("class recovered", headline["recovery_unseen"]["class"], ">=", 0.65),
        ("in-distribution accuracy, real", headline["accuracy_in_distribution"]["real"], ">=", 0.80),
        ("in-distribution accuracy, real", headline["accuracy_in_distribution"]["real"], "<=", 0.97),
        ("oracle above real", gap, ">=", 0.10),
        ("stain transfer below oracle", accuracy["oracle"] - accuracy["stain_transfer"], ">", 0.0),
        ("points lost on seen cells", seen["real"] - seen["medi"], "<=", 0.04),
        ("share of the gap that MeDi closes", (accuracy["medi"] - accuracy["real"]) / gap, ">=", 0.5),
        ("MeDi above CLS", accuracy["medi"] - accuracy["cls"], ">", 0.0),
    ]
    holds = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, ">": lambda a, b: a > b}
    found = []
    for name, value, sign, bound in lines:
        good = holds[sign](value, bound)
        print(f"{'ok  ' if good else 'MISS'} {name}: {value:.3f} (must be {sign} {bound})")
        if not good:
            found.append(name)
    if accuracy["medi"] <= accuracy["stain_transfer"]:
        print(f"note stain transfer ({accuracy['stain_transfer']:.3f}) does at least as well as MeDi")
    return found


if __name__ == "__main__":
    sys.exit(1 if shortfalls(json.loads(Path(sys.argv[1]).read_text())) else 0)
