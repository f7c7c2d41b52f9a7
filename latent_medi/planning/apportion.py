"""Dividing a number of images among combinations in whole numbers, exactly and the same way every time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from fractions import Fraction
from math import floor

Combination = tuple[str, ...]
"""Values of the combined fields, in order."""


def apportion(
    weights: Mapping[Combination, int], total: int, low: int = 0, high: int | None = None
) -> dict[Combination, int]:
    """Shares of ``total`` in proportion to the weights, each between ``low`` and ``high``, by largest remainder.

    The exact shares are min(max(λ·weight, low), high), with the λ at which they sum to ``total``; each is rounded down,
    and what is left goes to the largest remainders (Hamilton's method). Equal remainders take turns over the first
    value of their combinations (the class), so that rounding favours no class; the order of ``weights`` does not
    matter. All arithmetic is exact.

    Args:
        weights: Weight > 0 by combination.
        total: Images to divide.
        low: Least images of a combination.
        high: Most images of a combination; ``None`` for no bound.

    Returns:
        Images by combination in the order of ``weights``; they sum to ``total``. A larger weight never gets fewer
        images, and equal weights differ by one image at most.

    Raises:
        ValueError: A weight that is not above 0, or no division keeps to the bounds.
    """
    if any(weight <= 0 for weight in weights.values()):
        raise ValueError("every weight must be above 0")
    count = len(weights)
    if low < 0 or total < low * count or (high is not None and (high < low or total > high * count)):
        raise ValueError(f"{total} images cannot be divided among {count} combinations of {low} to {high}")
    if not count:
        if total:
            raise ValueError(f"there is no combination for {total} images")
        return {}
    scale = _scale(Counter(weights.values()), total, low, high)
    exact: dict[int, Fraction] = {}
    for weight in set(weights.values()):
        share = max(scale * weight, Fraction(low))
        exact[weight] = share if high is None else min(share, Fraction(high))
    shares = {cell: floor(exact[weight]) for cell, weight in weights.items()}
    remainders: dict[Fraction, list[Combination]] = defaultdict(list)
    for cell, weight in weights.items():
        remainders[exact[weight] - shares[cell]].append(cell)
    left = total - sum(shares.values())
    for remainder in sorted(remainders, reverse=True):
        for cell in _in_turns(remainders[remainder])[:left]:
            shares[cell] += 1
        left -= min(left, len(remainders[remainder]))
    return shares


def _scale(numbers: Mapping[int, int], total: int, low: int, high: int | None) -> Fraction:
    """The λ at which Σ number·min(max(λ·weight, low), high) is ``total``: that sum rises in straight pieces."""
    bends = [(Fraction(low, weight), weight * number) for weight, number in numbers.items()]
    if high is not None:
        bends += [(Fraction(high, weight), -weight * number) for weight, number in numbers.items()]
    at, reached, slope = Fraction(0), Fraction(low * sum(numbers.values())), 0
    for bend, change in sorted(bends):
        if reached + slope * (bend - at) >= total:
            break
        at, reached, slope = bend, reached + slope * (bend - at), slope + change
    return at + (total - reached) / slope if slope else at


def _in_turns(combinations: list[Combination]) -> list[Combination]:
    """Combinations in an order that depends on their names alone: one of each first value, then another of each."""
    order = []
    before: Counter[str] = Counter()
    for combination in sorted(combinations):
        order.append((before[combination[0]], combination))
        before[combination[0]] += 1
    return [combination for _, combination in sorted(order)]
