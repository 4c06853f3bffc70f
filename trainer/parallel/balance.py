"""Equal work for every rank: pure, deterministic, and cheap enough to be planned in every step.

Scheduling jobs on equal machines, with costs known in advance (R. L. Graham, Bounds on multiprocessing timing
anomalies, SIAM J. Appl. Math. 17, 1969). The longest-processing-time rule is followed in at most a few dozen
vectorised rounds, so that thousands of ranks cost milliseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.02
"""Of alike items, a bin takes as many as fit into the mean load and this share of it."""
_ROUNDS = 32
_FEW_ITEMS, _FEW_ITEMS_PER_BIN = 8192, 64
"""Up to so many the rule alone is quick, and closer than dealing out first."""


def spread(costs: Sequence[float] | Floats, num_bins: int) -> Ints:
    """Assign items to bins so that all bins hold about the same cost.

    Args:
        costs: [n] of the items, not negative.
        num_bins: bins there are.

    Returns:
        [n] the bin of every item.
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
    """As `spread`, but items of like cost share a bin: clips of like length make batches with little padding.

    The costliest items first, each bin takes the next ones up to the mean and `TOLERANCE`. The gaps that are left (half
    an item, on average) are filled with what no bin has taken: the cheapest items. Where items are many and small, all
    bins but the last take the tolerance, and the last is left with less.
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
    """For every expert its place in the expert-parallel group (0..ep-1): the costliest first, each to the place that
    has least; equal costs in their order. With more places than experts, places stay empty."""
    return tuple(spread(costs, ep).tolist())


def _runs(filled: Floats, num_bins: int, limit: float) -> list[int]:
    """Where each bin's items end if it takes the next ones up to `limit`, at least one; `filled`: their running sum."""
    sums, num = filled.data, len(filled)  # its floats are Python's, several times as quick as NumPy's one by one
    ends, start, before, step = [], 0, 0.0, 1
    for _ in range(num_bins):
        # A bin takes about as many as the one before it: look no farther than needed.
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
    """The bins of items dealt out back and forth in `order`."""
    turn, place = np.divmod(np.arange(len(order)), num_bins)
    bins = np.empty_like(place)
    bins[order] = np.where(turn % 2, num_bins - 1 - place, place)
    return bins


def _surplus(costs: Floats, bins: Ints, loads: Floats, limit: float) -> Ints:
    """The items, the costliest first, that must leave their bins: a bin keeps the costliest up to `limit`, at least
    one, so that what must find a place is small."""
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
    """Give each of the items `order`, the costliest first, a bin; `loads` and `bins` change in place.

    In a round the costliest item goes to the emptiest bin, the next to the next, and so on as long as none of them is
    filled beyond the mean. At least 1/_ROUNDS of the items go in a round; where that is one, this is the rule itself.
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
    """Stable order of integers from 0 to `num_values` - 1; up to 16 bits they sort in linear time."""
    return np.argsort(values.astype(np.min_scalar_type(num_values)), kind="stable")


def _descending(costs: Floats) -> Ints:
    """Stable order from the costliest item to the cheapest, by 16 bits of the cost (which sort in linear time)."""
    top = float(costs.max(initial=0.0))
    if top == 0.0:
        return np.arange(len(costs))
    return np.argsort((65535 * (1 - costs / top)).astype(np.uint16), kind="stable")


def _emptiest_first(loads: Floats, count: int) -> Ints:
    """At most `count` bins, the emptiest first; of equally full ones the first."""
    if count == 1:
        return np.array([int(loads.argmin())])
    top = float(loads.max()) or 1.0
    # Load and number of a bin as one integer: no two are equal, so every sort gives one order, on every machine.
    keys = (loads / top * 2.0**32).astype(np.int64) * len(loads) + np.arange(len(loads))
    keys.sort()
    return keys[:count] % len(loads)
