"""Deterministic load balancing, which is fast enough to run in every step.

The problem is equivalent to scheduling jobs of known costs on equal machines (R. L. Graham, Bounds on multiprocessing
timing anomalies, SIAM J. Appl. Math. 17, 1969). The longest-processing-time rule is applied in at most a few dozen
vectorized rounds, so that planning for thousands of ranks takes milliseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.02
"""The fraction by which the load of a bin may exceed the mean load in `spread_alike`."""
_MANY_ITEMS_PER_BIN = 16
"""The number of items per bin above which `_runs_one_by_one` is faster than the vectorized search for the ends of
bins."""
_ROUNDS = 16
_FEW_ITEMS, _FEW_ITEMS_PER_BIN = 8192, 64
"""The largest number of items, in total and per bin, for which the longest-processing-time rule alone is fast enough.

The rule alone balances better than dealing out items first.
"""


def spread(costs: Sequence[float] | Floats, num_bins: int) -> Ints:
    """Assign items to bins so that all bins have about the same total cost.

    Args:
        costs: The non-negative cost of each of n items.
        num_bins: The number of bins.

    Returns:
        The bin of each item, [n].
    """
    if num_bins == 1:
        return np.zeros(len(costs), dtype=np.int64)
    costs = np.asarray(costs, dtype=np.float64)
    bins, loads, order = np.zeros(len(costs), dtype=np.int64), np.zeros(num_bins), _descending(costs)
    mean = float(costs.sum()) / num_bins
    if len(costs) > min(_FEW_ITEMS, num_bins * _FEW_ITEMS_PER_BIN):
        order = _deal(costs, order, bins, loads, mean)
    _fill(loads, bins, order, costs[order], mean)
    return bins


def spread_alike(costs: Sequence[float] | Floats, num_bins: int) -> Ints:
    """Assign items to bins so that all bins have about the same total cost and contain items of similar cost.

    Batches of clips then contain little padding. The items are sorted by cost, the costliest first. Each bin in turn
    takes the next items as long as its load exceeds the mean by at most the fraction `TOLERANCE`. The cheapest items,
    which no bin has taken, then fill the gaps, which on average have half the size of an item. If there are many small
    items, all bins except the last one use the whole tolerance, and the last bin has a lower load.

    Args:
        costs: The non-negative cost of each of n items.
        num_bins: The number of bins.

    Returns:
        The bin of each item, [n].
    """
    if num_bins == 1:
        return np.zeros(len(costs), dtype=np.int64)
    costs = np.asarray(costs, dtype=np.float64)
    bins, order = np.zeros(len(costs), dtype=np.int64), _descending(costs)
    ordered = costs[order]
    filled = np.cumsum(ordered)
    mean = float(filled[-1]) / num_bins if len(filled) else 0.0
    ends = _runs(filled, num_bins, mean * (1 + TOLERANCE))
    run, taken = np.repeat(np.arange(num_bins), np.diff(ends, prepend=0)), int(ends[-1])
    bins[order[:taken]] = run
    loads = np.bincount(run, weights=ordered[:taken], minlength=num_bins).astype(np.float64, copy=False)
    _fill(loads, bins, order[taken:], ordered[taken:], mean)
    return bins


def place_experts(costs: Sequence[float], ep: int) -> tuple[int, ...]:
    """Return the place of each expert in the expert-parallel group, from 0 to ep - 1.

    Experts are placed in descending order of cost, each at the place with the lowest total cost so far. If there are
    more places than experts, some places stay empty.
    """
    return tuple(spread(costs, ep).tolist())


def _runs(filled: Floats, num_bins: int, limit: float) -> Ints:
    """Return the end index of each bin, if a bin takes at least one item and further items up to the total cost
    `limit`.

    Args:
        filled: The running sum of the items' costs.
        num_bins: The number of bins.
        limit: The largest total cost of a bin with more than one item.
    """
    num, start = len(filled), 0
    if num > _MANY_ITEMS_PER_BIN * num_bins:
        return _runs_one_by_one(filled, num_bins, limit)
    # `ends[i]` is the end of a bin that begins at item i. The loop below then only follows these ends.
    limits = np.full(num + 1, limit)
    limits[1:] += filled
    ends = np.searchsorted(filled, limits, side="right")
    np.maximum(ends[:num], np.arange(1, num + 1), out=ends[:num])
    ends[num] = num
    # The loop advances by four bins at once, which takes a quarter of the steps.
    second = ends[ends]
    fourth = second[second]
    end_of = fourth.data  # Single elements of a memoryview are several times faster to read.
    starts = np.array([0, *(start := end_of[start] for _ in range((num_bins - 1) // 4))])
    found = np.stack([ends[starts], second[starts], ends[second[starts]], fourth[starts]], axis=1)
    return found.ravel()[:num_bins]


def _runs_one_by_one(filled: Floats, num_bins: int, limit: float) -> Ints:
    """Compute the result of `_runs` bin by bin, which is faster if there are many items per bin."""
    sums, num = filled.data, len(filled)
    ends, start, before, step = [], 0, 0.0, 1
    for _ in range(num_bins):
        # A bin takes about as many items as the previous one, so the search begins there.
        stop = start + step
        while stop < num and sums[stop] <= before + limit:
            stop += step
        end = bisect_right(sums, before + limit, start, stop if stop < num else num)
        if end == start < num:
            end += 1
        step = end - start or 1
        start, before = end, sums[end - 1] if end else 0.0
        ends.append(end)
    return np.array(ends, dtype=np.int64)


def _deal(costs: Floats, order: Ints, bins: Ints, loads: Floats, limit: float) -> Ints:
    """Deal items out to the bins in alternating directions: first to last, then last to first.

    A bin keeps its costliest items as long as their sum is at most `limit`, and always at least one item, so that the
    remaining items are small.

    Args:
        costs: The cost of each item.
        order: The items, the costliest first.
        bins: The bin of each item, which is set for the items that bins keep.
        loads: The load of each bin, which is set.
        limit: The largest load of a bin with more than one item.

    Returns:
        The remaining items, the costliest first.
    """
    num_bins = len(loads)
    turns = -(-len(order) // num_bins)
    dealt = np.zeros(turns * num_bins)
    dealt[: len(order)] = costs[order]
    filled = dealt.reshape(turns, num_bins)
    filled[1::2] = filled[1::2, ::-1].copy()  # Column b contains the items of bin b.
    keeps = np.ones_like(filled, dtype=bool)
    sums = np.cumsum(filled, axis=0)
    keeps[1:] = sums[1:] <= limit
    loads[:] = np.where(keeps, filled, 0.0).sum(axis=0)
    there_and_back = np.concatenate([np.arange(num_bins), np.arange(num_bins)[::-1]])
    bins[order] = np.resize(there_and_back, len(order))
    keeps[1::2] = keeps[1::2, ::-1].copy()
    return order[~keeps.ravel()[: len(order)]]


def _fill(loads: Floats, bins: Ints, order: Ints, costs: Floats, mean: float) -> None:
    """Assign the items `order`, the costliest of which is first, and update `loads` and `bins` in place.

    In each round, the costliest item is assigned to the emptiest bin, the second to the second emptiest, and so on as
    long as no bin exceeds the mean. A round assigns at least 1/_ROUNDS of the items. If it assigns one item, this is
    the longest-processing-time rule.
    """
    least = max(1, min(len(loads) // 2, len(order) // _ROUNDS))
    start = 0
    while start < len(order):
        emptiest = _emptiest_first(loads, len(order) - start if least > 1 else 1)
        filled = loads[emptiest] + costs[start : start + len(emptiest)]
        over = np.flatnonzero(filled[least:] > mean)
        count = least + int(over[0]) if len(over) else len(filled)
        loads[emptiest[:count]] = filled[:count]
        bins[order[start : start + count]] = emptiest[:count]
        start += count


def stable_order(values: Ints, num_values: int) -> Ints:
    """Return the indices that stably sort integers in [0, num_values).

    Sorting integers of up to 16 bits takes linear time.
    """
    return np.argsort(values.astype(np.min_scalar_type(num_values)), kind="stable")


def _descending(costs: Floats) -> Ints:
    """Return the indices that stably sort the items from the costliest to the cheapest.

    Costs are rounded to 16 bits, so that sorting takes linear time.
    """
    top = float(costs.max(initial=0.0))
    if top == 0.0:
        return np.arange(len(costs))
    scaled = costs / -top
    scaled += 1
    scaled *= 65535
    return np.argsort(scaled.astype(np.uint16), kind="stable")


def _emptiest_first(loads: Floats, count: int) -> Ints:
    """Return at most `count` bins, the emptiest first. Bins with almost equal loads are in ascending order.

    The differences between loads are rounded to 16 bits, so that sorting takes linear time.
    """
    if count == 1:
        return np.array([int(loads.argmin())])
    least = float(loads.min())
    scaled = loads - least
    scaled *= 65535 / (float(loads.max()) - least or 1.0)
    return np.argsort(scaled.astype(np.uint16), kind="stable")[:count]
