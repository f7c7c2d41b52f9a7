"""Fail unless the demo's headline shows what the demo is there to show: ``python check_headline.py
runs/demo/headline.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def shortfalls(headline: dict) -> list[str]:
    """What the headline falls short of, in words; empty if all is well."""
    accuracy = headline["accuracy_shift"]
    seen = headline["accuracy_seen"]
    gap = _minus(accuracy["oracle"], accuracy["real"])
    closed = _minus(accuracy["medi"], accuracy["real"])
    distances = {
        name: headline[name] for name in ("distance_unseen", "distance_unseen_colour_free", "distance_per_class")
    }
    others = sorted({found["metric"] for found in distances.values()} - {"kid"})
    if others:
        raise SystemExit(f"The bars are of the kernel distance (kid), the ratios of {', '.join(others)}.")
    # Three fresh seeds gave 0.68 to 0.92 of the class, 0.69 to 0.84 of the gap, and an oracle 0.07 above real
    # at the least. A single run misses these bars where what the demo shows is lost, not where it is weaker by chance.
    lines = [
        ("ratio MeDi/CLS, unseen", distances["distance_unseen"]["ratio"], "<=", 0.35),
        ("ratio MeDi/CLS, unseen, colour-free", distances["distance_unseen_colour_free"]["ratio"], "<=", 0.3),
        ("ratio MeDi/CLS, per class", distances["distance_per_class"]["ratio"], "<=", 0.5),
        ("site recovered", headline["recovery_unseen"]["site"], ">=", 0.95),
        ("class recovered", headline["recovery_unseen"]["class"], ">=", 0.45),
        ("in-distribution accuracy, real", headline["accuracy_in_distribution"]["real"], ">=", 0.80),
        ("in-distribution accuracy, real", headline["accuracy_in_distribution"]["real"], "<=", 0.97),
        ("oracle above real", gap, ">=", 0.04),
        ("stain transfer below oracle", _minus(accuracy["oracle"], accuracy["stain_transfer"]), ">", 0.0),
        ("points lost on seen cells", _minus(seen["real"], seen["medi"]), "<=", 0.04),
        ("share of the gap that MeDi closes", closed / gap if gap and closed is not None else None, ">=", 0.4),
        ("MeDi above CLS", _minus(accuracy["medi"], accuracy["cls"]), ">", 0.0),
    ]
    holds = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, ">": lambda a, b: a > b}
    found = []
    for name, value, sign, bound in lines:
        good = value is not None and holds[sign](value, bound)
        shown = "none" if value is None else f"{value:.3f}"
        print(f"{'ok  ' if good else 'MISS'} {name}: {shown} (must be {sign} {bound})")
        if not good:
            found.append(name)
    lead = _minus(accuracy["medi"], accuracy["stain_transfer"])
    if lead is not None and lead <= 0:
        print(f"note stain transfer ({accuracy['stain_transfer']:.3f}) does at least as well as MeDi")
    return found


if __name__ == "__main__":
    sys.exit(1 if shortfalls(json.loads(Path(sys.argv[1]).read_text())) else 0)
