"""Tests of balancing: every item gets a bin, and the bins are about equally full.

`spread_alike` must also put items of similar cost into the same bin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.parallel import balance
from trainer.parallel.balance import TOLERANCE, place_experts, spread, spread_alike


def loads_of(costs: list[float], bins: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(bins, weights=np.asarray(costs, dtype=float), minlength=num_bins)


def test_few_items_follow_the_longest_processing_time_rule() -> None:
    assert sorted(loads_of([7, 6, 5, 4, 3, 2], spread([7, 6, 5, 4, 3, 2], 3), 3)) == [9, 9, 9]
    assert sorted(loads_of([5, 4, 3, 3, 3], spread([5, 4, 3, 3, 3], 2), 2)) == [8, 10]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 9), st.sampled_from([spread, spread_alike]))
def test_no_bin_exceeds_grahams_bound(costs: list[float], num_bins: int, spread_any: Callable[..., Any]) -> None:
    bins = spread_any(costs, num_bins)
    assert bins.shape == (len(costs),) and ((bins >= 0) & (bins < num_bins)).all()
    # Whatever the order, an item is put into the emptiest bin, whose load is at most the mean (Graham 1969).
    limit = sum(costs) / num_bins * (1 + TOLERANCE) + max(costs, default=0.0)
    assert loads_of(costs, bins, num_bins).max() <= limit + 1e-6
    assert (spread_any(costs, num_bins) == bins).all()


def test_equal_items_keep_their_order() -> None:
    assert (spread_alike([1.0] * 64, 8) == np.repeat(np.arange(8), 8)).all()


@pytest.mark.parametrize("num_bins", [8, 64])
def test_similar_items_share_a_bin_and_bins_are_even(num_bins: int) -> None:
    costs = np.random.default_rng(0).lognormal(0.0, 0.5, 1024)
    bins = spread_alike(costs, num_bins)
    loads = loads_of(costs, bins, num_bins)
    assert loads.max() / loads.mean() <= 1.05
    assert variance_within(costs, bins) < 0.5 * variance_within(costs, spread(costs, num_bins))


def variance_within(costs: np.ndarray, bins: np.ndarray) -> float:
    return sum(float(costs[bins == b].var()) * int((bins == b).sum()) for b in set(bins.tolist()))


def test_many_items_fill_all_bins_equally() -> None:
    costs = np.random.default_rng(0).lognormal(0.0, 0.5, 10_000)
    bins = spread(costs, 40)
    loads = loads_of(costs, bins, 40)
    assert loads.max() / loads.mean() <= 1.005 and set(bins.tolist()) == set(range(40))


@pytest.mark.parametrize(
    ("costs", "ep", "places"),
    [([1, 5, 2], 2, (1, 0, 1)), ([3, 2, 1], 4, (0, 1, 2)), ([2, 2, 2, 2], 2, (0, 1, 0, 1)), ([1.0], 1, (0,))],
)
def test_the_costliest_expert_is_placed_first(costs: list[float], ep: int, places: tuple[int, ...]) -> None:
    assert place_experts(costs, ep) == places


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12), st.floats(0.5, 30))
def test_ends_of_bins_do_not_depend_on_the_way_to_search(costs: list[int], num_bins: int, limit: float) -> None:
    filled = np.cumsum(np.array(costs, dtype=np.float64))
    with patch.object(balance, "_MANY_ITEMS_PER_BIN", 1000):
        at_once = balance._runs(filled, num_bins, limit)
    assert at_once.tolist() == balance._runs_one_by_one(filled, num_bins, limit).tolist()
