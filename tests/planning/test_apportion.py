"""Whole numbers that sum exactly, keep to their bounds and depend on nothing but weights and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.planning.apportion import apportion

cells = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9).map(str)), st.integers(1, 10**7), min_size=1, max_size=20
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[tuple[str, ...], int], int, int, int | None]:
    weights = draw(cells)
    low = draw(st.integers(0, 50))
    high = draw(st.none() | st.integers(low, low + 1000))
    total = draw(st.integers(low * len(weights), (high if high is not None else 10**6 + low) * len(weights)))
    return weights, total, low, high


@given(problems(), st.randoms(use_true_random=False))
def test_sums_exactly_within_bounds_monotone_whatever_the_order(problem, random) -> None:
    weights, total, low, high = problem
    shares = apportion(weights, total, low, high)
    assert sum(shares.values()) == total
    assert all(low <= n and (high is None or n <= high) for n in shares.values())
    for a, b in zip(
        sorted(weights, key=weights.__getitem__), sorted(weights, key=weights.__getitem__)[1:], strict=False
    ):
        assert shares[a] <= shares[b] + (weights[a] == weights[b])
    order = list(weights)
    random.shuffle(order)
    assert apportion({cell: weights[cell] for cell in order}, total, low, high) == shares


@given(cells, st.integers(0, 10**6))
def test_without_bounds_nobody_is_a_whole_image_away_from_the_exact_share(weights, total) -> None:
    shares, whole = apportion(weights, total), sum(weights.values())
    assert all(abs(shares[cell] * whole - weight * total) < whole for cell, weight in weights.items())


@given(cells)
def test_the_weights_themselves_are_their_own_division(weights) -> None:
    assert apportion(weights, sum(weights.values())) == weights


def test_rounding_favours_no_class() -> None:
    weights = {(c, s): 1 for c in ("benign", "tumour") for s in ("a", "b", "c", "d")}
    shares = apportion(weights, 12)
    assert [sum(n for (c, _), n in shares.items() if c == name) for name in ("benign", "tumour")] == [6, 6]


def test_by_hand_with_bounds() -> None:
    # λ = 0.6: 2.4, 1.2, 1.8, 1.8, 3.6; those below 2 are lifted to 2; the image that is left goes to the .6.
    weights = dict(zip([("b", "x"), ("b", "y"), ("t", "x"), ("t", "y"), ("t", "z")], (4, 2, 3, 3, 6), strict=True))
    assert list(apportion(weights, 12, low=2).values()) == [2, 2, 2, 2, 4]
    assert list(apportion(weights, 14, high=3).values()) == [3, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("weights", "total", "low", "high"),
    [
        ({("a",): 0}, 1, 0, None),
        ({("a",): 1}, 3, 0, 2),
        ({("a",): 1}, 3, 4, None),
        ({("a",): 1}, -1, 0, None),
        ({}, 1, 0, None),
    ],
)
def test_what_cannot_be_divided(weights, total, low, high) -> None:
    with pytest.raises(ValueError, match=r"divided|combination|weight"):
        apportion(weights, total, low, high)


def test_nothing_among_nobody() -> None:
    assert apportion({}, 0) == {}
