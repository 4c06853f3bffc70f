"""Metrics as functions of sums over samples, and bootstrap estimates of their uncertainty.

Shapes: N samples, K statistics per sample, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
_MAX_DRAWS = 1 << 22
"""The maximum number of samples that are drawn at once. It limits the memory use."""


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide the first statistic by the second: `[..., 2]` → `[...]`."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Metric:
    """One metric of N samples. On any subset, the metric is `value` applied to the sum of the statistics."""

    name: str
    statistics: NDArray[np.float64]
    """[N, K] statistics per sample, such as word errors and reference words."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = ratio
    """The function that maps sums of statistics to the metric: `[..., K]` → `[...]`."""
    lower_is_better: bool = False
    counted: NDArray[np.bool_] | None = None
    """[N] mask of the samples that the metric applies to; None if it applies to all."""

    def rows(self, wanted: Sequence[int]) -> NDArray[np.int64]:
        """Return the samples among `wanted` that the metric applies to."""
        rows = np.asarray(wanted, dtype=np.int64)
        return rows if self.counted is None else rows[self.counted[rows]]


def mean(name: str, values: Sequence[float], counted: NDArray[np.bool_] | None = None) -> Metric:
    """Return a metric that is the mean of one number per sample. Higher is better."""
    column = np.asarray(values, dtype=np.float64)
    return Metric(name, np.stack([column, np.ones_like(column)], axis=1), counted=counted)


def resampled_sums(
    statistics: NDArray[np.float64], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return the sum of statistics over each resample. A resample consists of N samples drawn with replacement.

    The draws depend only on N and `seed`. Statistics of two systems can be concatenated along K for a paired bootstrap.

    Args:
        statistics: [N, K] statistics per sample, with N ≥ 1.
        num_resamples: The number of resamples, R.
        seed: The seed of the draws.

    Returns:
        [R, K] sums.
    """
    num = len(statistics)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, num_resamples, chunk := max(1, _MAX_DRAWS // num)):
        count = min(chunk, num_resamples - start)
        draws = generator.integers(num, size=(count, num)) + num * np.arange(count)[:, None]
        weights = np.bincount(draws.ravel(), minlength=count * num).reshape(count, num)
        parts.append(weights.astype(np.float64) @ statistics)
    return np.concatenate(parts)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of resampled values (Efron & Tibshirani 1993, chapter 13)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """The difference between systems A and B on the same samples. `value` is B − A."""

    value: float
    low: float
    high: float
    """The bounds of the 95 % bootstrap interval."""
    p: float
    """The two-sided p-value, min(1, 2 · (n + 1) / (R + 1)). Here, n is the number of resamples in which the difference
    is at most 0, or the number in which it is at least 0, whichever is smaller. A difference of 0 counts in both."""

    @property
    def is_significant(self) -> bool:
        """True if the 95 % interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(a: Metric, b: Metric, rows: NDArray[np.int64]) -> Difference:
    """Compare two systems with a paired bootstrap over the samples `rows` (Koehn 2004).

    Both systems are resampled with the same draws.
    """
    assert a.name == b.name and len(rows), (a.name, b.name, len(rows))
    both = np.concatenate([a.statistics[rows], b.statistics[rows]], axis=1)
    width = a.statistics.shape[1]
    sums = resampled_sums(both)
    value = b.value(both[:, width:].sum(0)) - a.value(both[:, :width].sum(0))
    differences = b.value(sums[:, width:]) - a.value(sums[:, :width])
    num_turned = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(float(value), *interval(differences), min(1.0, 2.0 * (num_turned + 1) / (len(sums) + 1)))
