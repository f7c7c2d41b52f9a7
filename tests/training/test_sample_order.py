"""Order of rows: once per epoch for any number of processes, exactly reproducible when weighted."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.training.sample_order import balance_weights, epoch_order, rank_slice, rows_at


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    processes=st.sampled_from([1, 2, 3, 4, 8]),
    per_process=st.integers(1, 9),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_each_row_once_per_epoch_over_all_processes(
    n: int, processes: int, per_process: int, seed: int, epochs: int
) -> None:
    batch = processes * per_process
    updates = -(-n * epochs // batch)
    seen: list[tuple[int, int]] = []  # (position in the run, row), as the processes see them
    for number in range(updates):
        rows = rows_at(number * batch, batch, n, seed)
        for rank in range(processes):
            mine = rank_slice(rank, processes)
            seen += zip(range(number * batch, (number + 1) * batch)[mine], rows[mine].tolist(), strict=True)
    in_order = [row for _, row in sorted(seen)]
    assert sorted(position for position, _ in seen) == list(range(updates * batch))
    for epoch in range(epochs):
        assert sorted(in_order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 20_000), count=st.integers(1, 300), weighted=st.booleans())
def test_rows_are_a_function_of_the_position(first: int, count: int, weighted: bool) -> None:
    weights = np.arange(37, dtype=float) if weighted else None
    together = rows_at(first, count, 37, 3, weights)
    one_by_one = [int(rows_at(first + i, 1, 37, 3, weights)[0]) for i in range(count)]
    assert together.tolist() == one_by_one
    assert len(together) == count


def test_weights_are_the_frequencies() -> None:
    weights = np.array([0.0, 1.0, 3.0, 0.0])
    counts = np.bincount(rows_at(1000, 20_000, 4, 0, weights), minlength=4) / 20_000
    assert counts[0] == counts[3] == 0  # never a row of weight zero
    assert abs(counts[2] - 0.75) < 0.02


def test_balance_draws_every_cell_alike() -> None:
    cells = np.array([[2, 2]] * 90 + [[2, 3]] * 9 + [[3, 2]])
    flat, none = balance_weights(cells, 1.0), balance_weights(cells, 0.0)
    assert np.allclose([flat[:90].sum(), flat[90:99].sum(), flat[99]], 1 / 3)
    assert np.allclose(none, 0.01)
