"""Equal work for every rank: pure, deterministic, and cheap enough to be planned in every step.

Scheduling jobs on equal machines, with costs known in advance (R. L. Graham, Bounds on multiprocessing timing
anomalies, SIAM J. Appl. Math. 17, 1969). The longest-processing-time rule is followed in a few dozen
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


def spread(costs: Sequence[float] | Floats, num_bins: int, preferred: Ints | None = None) -> Ints:
    """Assign items to bins so that all bins hold about the same cost.

    Args:
        costs: [n] of the items, not negative.
        num_bins: bins there are.
        preferred: [n] bin in which an item costs nothing to have: a bin keeps its costliest items up to the mean load,
            and only the rest moves. None: items have no preference.

    Returns:
        [n] the bin of every item.
    """
    costs = np.asarray(costs, dtype=np.float64)
    order = _descending(costs)
    bins, loads = np.full(len(costs), -1, dtype=np.int64), np.zeros(num_bins)
    if preferred is not None:
        by_bin = order[np.argsort(preferred[order].astype(np.min_scalar_type(num_bins)), kind="stable")]
        sizes = np.bincount(preferred, minlength=num_bins)
        fits = _fit(costs[by_bin], sizes, costs.sum() / num_bins * (1 + TOLERANCE))
        kept, order = by_bin[fits], by_bin[~fits]
        order = order[_descending(costs[order])]
        bins[kept] = preferred[kept]
        loads += np.bincount(bins[kept], weights=costs[kept], minlength=num_bins)
    # The costliest `width` items go to the `width` emptiest bins, and so on; width 1 is the rule itself.
    width = max(1, min(num_bins // 2, len(order) // _ROUNDS))
    for start in range(0, len(order), width):
        items = order[start : start + width]
        emptiest = _emptiest(loads, len(items))
        bins[items] = emptiest
        loads[emptiest] += costs[items]
    return bins


def place_experts(costs: Sequence[float], ep: int) -> tuple[int, ...]:
    """For every expert its place in the expert-parallel group (0..ep-1): the costliest first, each to the place that
    has least; equal costs in their order. With more places than experts, places stay empty."""
    return tuple(spread(costs, ep).tolist())


def _descending(costs: Floats) -> Ints:
    """Stable order from the costliest item to the cheapest, by 16 bits of the cost (which sort in linear time)."""
    top = float(costs.max(initial=0.0))
    if top == 0.0:
        return np.arange(len(costs))
    return np.argsort((65535 * (1 - costs / top)).astype(np.uint16), kind="stable")


def _fit(costs: Floats, sizes: Ints, limit: float) -> NDArray[np.bool_]:
    """[n] whether the item still fits into its bin; the first of a bin always does.

    Args:
        costs: [n] bin after bin.
        sizes: items of every bin.
        limit: what a bin may hold.
    """
    filled = np.cumsum(costs)
    starts = np.cumsum(sizes) - sizes
    before = np.concatenate([[0.0], filled])[starts]
    fits = filled <= np.repeat(before + limit, sizes)
    fits[starts[sizes > 0]] = True
    return fits


def _emptiest(loads: Floats, count: int) -> Ints:
    """The `count` emptiest bins, the emptiest first; of equally full ones the first."""
    if count == 1:
        return np.array([int(loads.argmin())])
    found = np.argpartition(loads, count - 1)[:count]
    return found[np.lexsort((found, loads[found]))]
