"""Distribution of items so that every rank has equal work. It is deterministic and fast enough for every step.

This is scheduling on equal machines with known costs (R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J.
Appl. Math. 17, 1969). The longest-processing-time rule is applied in at most a few dozen vectorized rounds, so that
thousands of ranks take milliseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.02
"""The share of the mean load by which `spread_alike` may exceed it."""
_ROUNDS = 32
_FEW_ITEMS, _FEW_ITEMS_PER_BIN = 8192, 64
"""The numbers of items up to which the rule alone is fast; it balances better than dealing items out first."""


def spread(costs: Sequence[float] | Floats, num_bins: int) -> Ints:
    """Assign items to bins so that all bins hold about the same cost.

    Args:
        costs: the cost of each of n items, not negative.
        num_bins: the number of bins.

    Returns:
        [n], the bin of each item.
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
    """Assign items to bins like `spread`, but so that items of similar cost share a bin.

    Clips of similar length make batches with little padding. In the order of falling cost, each bin takes the next
    items up to the mean plus `TOLERANCE`. The remaining gaps (half an item on average) are filled with the cheapest
    items, which no bin has taken. If items are many and small, all bins but the last use the tolerance, and the last
    gets less.
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

    The costliest expert is placed first, and each goes to the place with the lowest cost so far. If there are more
    places than experts, some stay empty.
    """
    return tuple(spread(costs, ep).tolist())


def _runs(filled: Floats, num_bins: int, limit: float) -> list[int]:
    """Return where the items of each bin end if it takes the next items up to `limit`, at least one.

    `filled` is the running sum of the costs.
    """
    sums, num = filled.data, len(filled)  # single Python floats are several times as fast as those of NumPy
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
    """Return the bins of items that are dealt out back and forth in the order `order`."""
    turn, place = np.divmod(np.arange(len(order)), num_bins)
    bins = np.empty_like(place)
    bins[order] = np.where(turn % 2, num_bins - 1 - place, place)
    return bins


def _surplus(costs: Floats, bins: Ints, loads: Floats, limit: float) -> Ints:
    """Return the items that must leave their bins, the costliest first.

    A bin keeps its costliest items up to `limit`, at least one, so that the items to be moved are small.
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
    """Assign the items `order`, the costliest first, to bins, changing `loads` and `bins` in place.

    In a round, the costliest item goes to the emptiest bin, the second to the second emptiest, and so on while no bin
    is filled beyond the mean. A round assigns at least 1/_ROUNDS of the items. If that is one item, this is the rule
    itself.
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
    """Return the stable order of integers from 0 to `num_values` - 1. Up to 16 bits, sorting takes linear time."""
    return np.argsort(values.astype(np.min_scalar_type(num_values)), kind="stable")


def _descending(costs: Floats) -> Ints:
    """Return the stable order from the costliest item to the cheapest, by 16 bits of the cost, in linear time."""
    top = float(costs.max(initial=0.0))
    if top == 0.0:
        return np.arange(len(costs))
    return np.argsort((65535 * (1 - costs / top)).astype(np.uint16), kind="stable")


def _emptiest_first(loads: Floats, count: int) -> Ints:
    """Return at most `count` bins, the emptiest first, and equally full ones in their order."""
    if count == 1:
        return np.array([int(loads.argmin())])
    top = float(loads.max()) or 1.0
    # Load and number of a bin form one integer. No two are equal, so the order is the same on every machine.
    keys = (loads / top * 2.0**32).astype(np.int64) * len(loads) + np.arange(len(loads))
    keys.sort()
    return keys[:count] % len(loads)
