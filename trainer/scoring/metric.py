"""A metric as sums over samples and a function of them, and what resampling says about its value.

Shapes: N samples, K statistics of a sample, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
_MAX_DRAWS = 1 << 22
"""Samples that are drawn at once; bounds the memory."""


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """First statistic over second: `[..., 2]` → `[...]`."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Metric:
    """One metric of N samples. Its value over any of them is `value` of the sum of their statistics."""

    name: str
    statistics: NDArray[np.float64]
    """`[N, K]`, e.g. word errors and reference words."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = ratio
    """`[..., K]` → `[...]`."""
    lower_is_better: bool = False
    counted: NDArray[np.bool_] | None = None
    """`[N]`: the samples that the metric is about; None: all."""

    def rows(self, wanted: Sequence[int]) -> NDArray[np.int64]:
        """Those of the samples `wanted` that the metric is about."""
        rows = np.asarray(wanted, dtype=np.int64)
        return rows if self.counted is None else rows[self.counted[rows]]


def mean(name: str, values: Sequence[float], counted: NDArray[np.bool_] | None = None) -> Metric:
    """The mean of a number per sample, the higher the better."""
    column = np.asarray(values, dtype=np.float64)
    return Metric(name, np.stack([column, np.ones_like(column)], axis=1), counted=counted)


def resampled_sums(
    statistics: NDArray[np.float64], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Sums over `num_resamples` draws of N samples with replacement: `[N, K]` → `[R, K]`; N at least 1.

    The draws follow from N and `seed` alone: columns of two systems side by side give a paired bootstrap.
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
    """95 % percentile interval of resampled values (Efron & Tibshirani 1993, chapter 13)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """System B against system A on the same samples: `value` is B − A."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided: how often, twice, resampling turns the difference around."""

    @property
    def is_significant(self) -> bool:
        """The 95 % interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(a: Metric, b: Metric, rows: NDArray[np.int64]) -> Difference:
    """Paired bootstrap over the samples `rows` (Koehn 2004): both systems are resampled with the same draws."""
    assert a.name == b.name and len(rows), (a.name, b.name, len(rows))
    both = np.concatenate([a.statistics[rows], b.statistics[rows]], axis=1)
    width = a.statistics.shape[1]
    sums = resampled_sums(both)
    value = b.value(both[:, width:].sum(0)) - a.value(both[:, :width].sum(0))
    differences = b.value(sums[:, width:]) - a.value(sums[:, :width])
    num_turned = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(float(value), *interval(differences), min(1.0, 2.0 * (num_turned + 1) / (len(sums) + 1)))
