"""Equal work: every item gets a bin, bins are about equally full, and what need not move stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.parallel.balance import TOLERANCE, place_experts, spread


def loads_of(costs: list[float], bins: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(bins, weights=np.asarray(costs, dtype=float), minlength=num_bins)


def test_few_items_follow_the_longest_processing_time_rule() -> None:
    assert sorted(loads_of([7, 6, 5, 4, 3, 2], spread([7, 6, 5, 4, 3, 2], 3), 3)) == [9, 9, 9]
    assert sorted(loads_of([5, 4, 3, 3, 3], spread([5, 4, 3, 3, 3], 2), 2)) == [8, 10]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 9), st.booleans(), st.randoms(use_true_random=False))
def test_no_bin_exceeds_grahams_bound(costs: list[float], num_bins: int, prefer: bool, random: object) -> None:
    preferred = np.array([random.randrange(num_bins) for _ in costs], dtype=np.int64) if prefer else None  # type: ignore[attr-defined]
    bins = spread(costs, num_bins, preferred)
    assert bins.shape == (len(costs),) and ((bins >= 0) & (bins < num_bins)).all()
    # Any list order: an item goes to the emptiest bin, which holds at most the mean (Graham 1969).
    limit = sum(costs) / num_bins * (1 + TOLERANCE) + max(costs, default=0.0)
    assert loads_of(costs, bins, num_bins).max() <= limit + 1e-6
    assert (spread(costs, num_bins, preferred) == bins).all()


def test_balanced_bins_keep_everything() -> None:
    home = np.repeat(np.arange(8), 4)
    assert (spread([1.0] * 32, 8, home) == home).all()


def test_thousands_of_ranks_are_balanced_to_a_few_percent() -> None:
    costs = np.random.default_rng(0).lognormal(0.0, 0.5, 64 * 16)
    home = np.repeat(np.arange(64), 16)
    before, bins = loads_of(costs, home, 64), spread(costs, 64, home)
    after = loads_of(costs, bins, 64)
    assert before.max() / before.mean() > 1.3 and after.max() / after.mean() <= 1.05
    assert (bins != home).mean() < 0.2, "most clips stay where they are"


def test_with_many_items_per_rank_few_move_and_the_rest_is_even() -> None:
    costs = np.random.default_rng(0).lognormal(0.0, 0.6, 64 * 40)
    home = np.repeat(np.arange(64), 40)
    bins = spread(costs, 64, home)
    after = loads_of(costs, bins, 64)
    assert after.max() / after.mean() <= 1 + TOLERANCE + 1e-9 and (bins != home).mean() < 0.1


def test_many_items_without_preference_fill_all_bins_alike() -> None:
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
