"""Equal work for every rank: pure, deterministic, and cheap enough to be planned in every step.

Scheduling jobs on equal machines, with costs known in advance (R. L. Graham, Bounds on multiprocessing timing
anomalies, SIAM J. Appl. Math. 17, 1969). The longest-processing-time rule is followed in at most a few dozen
vectorised rounds, so that thousands of ranks cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE = 0.02
"""An item leaves its preferred bin only where this bin would hold more than the mean load by this share."""
_ROUNDS = 32
_FEW_ITEMS, _FEW_ITEMS_PER_BIN = 8192, 64
"""Up to so many the rule alone is quick, and closer than dealing out first."""
_MANY_ITEMS_PER_BIN = 28
"""Of clips of log-normal length (sigma 0.6) so many fill bins to the tolerance in any order; 24 leave 1 % more."""


def spread(costs: Sequence[float] | Floats, num_bins: int, preferred: Ints | None = None) -> Ints:
    """Assign items to bins so that all bins hold about the same cost.

    Args:
        costs: [n] of the items, not negative.
        num_bins: bins there are.
        preferred: [n] bin in which an item costs nothing to have: a bin keeps items up to the mean load, and only the
            rest moves. None: items have no preference.

    Returns:
        [n] the bin of every item.
    """
    if num_bins == 1:
        return np.zeros(len(costs), dtype=np.int64)
    costs = np.asarray(costs, dtype=np.float64)
    mean = float(costs.sum()) / num_bins
    if preferred is None and len(costs) <= min(_FEW_ITEMS, num_bins * _FEW_ITEMS_PER_BIN):
        bins, loads, order = np.zeros(len(costs), dtype=np.int64), np.zeros(num_bins), _descending(costs)
    else:
        bins = _dealt(costs, num_bins) if preferred is None else preferred.copy()
        loads = np.bincount(bins, weights=costs, minlength=num_bins).astype(np.float64, copy=False)
        order = _surplus(costs, bins, loads, mean if preferred is None else mean * (1 + TOLERANCE))
        loads -= np.bincount(bins[order], weights=costs[order], minlength=num_bins)
    _fill(loads, bins, order, costs[order], mean)
    return bins


def place_experts(costs: Sequence[float], ep: int) -> tuple[int, ...]:
    """For every expert its place in the expert-parallel group (0..ep-1): the costliest first, each to the place that
    has least; equal costs in their order. With more places than experts, places stay empty."""
    return tuple(spread(costs, ep).tolist())


def _dealt(costs: Floats, num_bins: int) -> Ints:
    """The bins of items dealt out back and forth, the costliest first."""
    turn, place = np.divmod(np.arange(len(costs)), num_bins)
    bins = np.empty_like(place)
    bins[_descending(costs)] = np.where(turn % 2, num_bins - 1 - place, place)
    return bins


def _surplus(costs: Floats, bins: Ints, loads: Floats, limit: float) -> Ints:
    """The items, the costliest first, that must leave their bins: a bin keeps items up to `limit`, at least one. Of
    few it keeps the costliest, so that what must find a place is small; of many the first: each is small beside the
    bin, no sort of them all is needed, and fewer move."""
    crowded = np.flatnonzero((loads > limit)[bins])
    if len(costs) < _MANY_ITEMS_PER_BIN * len(loads):
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
