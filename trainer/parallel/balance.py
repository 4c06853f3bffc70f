"""Deterministic load balancing, which is fast enough to run in every step.

This is scheduling on equal machines with known costs (R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J.
Appl. Math. 17, 1969). The longest-processing-time rule is applied in at most a few dozen vectorized rounds, so that
planning for thousands of ranks takes milliseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.02
"""The fraction of the mean load by which `spread_alike` may exceed the mean."""
_ROUNDS = 32
_FEW_ITEMS, _FEW_ITEMS_PER_BIN = 8192, 64
"""The numbers of items, in total and per bin, up to which the rule alone is fast enough.

It balances better than dealing items out first.
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
        bins = _dealt(order, num_bins)
        loads = np.bincount(bins, weights=costs, minlength=num_bins).astype(np.float64, copy=False)
        order = _surplus(costs, bins, loads, mean)
        loads -= np.bincount(bins[order], weights=costs[order], minlength=num_bins)
    _fill(loads, bins, order, costs[order], mean)
    return bins


def spread_alike(costs: Sequence[float] | Floats, num_bins: int) -> Ints:
    """Assign items to bins so that all bins have about the same total cost and contain items of similar cost.

    For clips, this gives batches with little padding. In descending order of cost, each bin takes the next items up to
    a load of the mean plus `TOLERANCE`. The remaining gaps, half an item on average, are filled with the cheapest
    items, which no bin has taken yet. If there are many small items, all bins except the last use the whole tolerance,
    and the last bin has a lower load.

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
    run, taken = np.repeat(np.arange(num_bins), np.diff(ends, prepend=0)), ends[-1]
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


def _runs(filled: Floats, num_bins: int, limit: float) -> list[int]:
    """Return the end index of each bin if every bin takes the next items up to the cost `limit`, but at least one.

    Args:
        filled: The running sum of the items' costs.
        num_bins: The number of bins.
        limit: The largest total cost of a bin with more than one item.
    """
    sums, num = filled.data, len(filled)  # reading single elements of a memoryview is several times faster
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
    return ends


def _dealt(order: Ints, num_bins: int) -> Ints:
    """Return the bin of each item if the items are dealt out back and forth in the order `order`."""
    turn, place = np.divmod(np.arange(len(order)), num_bins)
    bins = np.empty_like(place)
    bins[order] = np.where(turn % 2, num_bins - 1 - place, place)
    return bins


def _surplus(costs: Floats, bins: Ints, loads: Floats, limit: float) -> Ints:
    """Return the items to be removed from bins whose load exceeds `limit`, the costliest first.

    Such a bin keeps its costliest items up to `limit`, but at least one, so that the removed items are small.
    """
    crowded = np.flatnonzero((loads > limit)[bins])
    crowded = crowded[_descending(costs[crowded])]
    crowded = crowded[stable_order(bins[crowded], len(loads))]
    bin_of, filled = bins[crowded], np.cumsum(costs[crowded])
    first = np.flatnonzero(np.diff(bin_of, prepend=-1))
    leaves = filled > np.repeat(filled[first] - costs[crowded[first]] + limit, np.diff(first, append=len(bin_of)))
    leaves[first] = False
    surplus = crowded[leaves]
    return surplus[_descending(costs[surplus])]


def _fill(loads: Floats, bins: Ints, order: Ints, costs: Floats, mean: float) -> None:
    """Assign the items `order`, which are sorted from the costliest, and update `loads` and `bins` in place.

    In each round, the costliest item is assigned to the emptiest bin, the second to the second emptiest, and so on as
    long as no bin exceeds the mean. A round assigns at least 1/_ROUNDS of the items. If that is one item, the method is
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
    """Return the indices that stably sort integers in [0, num_values). Up to 16 bits, sorting takes linear time."""
    return np.argsort(values.astype(np.min_scalar_type(num_values)), kind="stable")


def _descending(costs: Floats) -> Ints:
    """Return the indices that stably sort the items from the costliest to the cheapest.

    Costs are rounded to 16 bits, so that sorting takes linear time.
    """
    top = float(costs.max(initial=0.0))
    if top == 0.0:
        return np.arange(len(costs))
    return np.argsort((65535 * (1 - costs / top)).astype(np.uint16), kind="stable")


def _emptiest_first(loads: Floats, count: int) -> Ints:
    """Return at most `count` bins, the emptiest first. Equally full bins are in ascending order."""
    if count == 1:
        return np.array([int(loads.argmin())])
    top = float(loads.max()) or 1.0
    # A bin's load and index form one key. No two keys are equal, so the order is the same on every machine.
    keys = (loads / top * 2.0**32).astype(np.int64) * len(loads) + np.arange(len(loads))
    keys.sort()
    return keys[:count] % len(loads)
