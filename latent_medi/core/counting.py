"""Counts in sentences."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """A count and its noun: "1 patient", "1,880 patches"."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"
