"""Which rank works slower than the others, and on which host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_STRETCHES = 3
"""So many slow stretches in a row make a straggler."""


@dataclass(frozen=True)
class RankWork:
    """What one rank did since it was last asked."""

    rank: int
    host: str
    phase_sec: Mapping[str, float]
    """Wall time by phase."""
    wait_sec: Mapping[str, float]
    """The part of it that was spent waiting for other ranks."""

    @property
    def work_sec(self) -> dict[str, float]:
        """By phase, without waiting."""
        return {phase: max(0.0, sec - self.wait_sec.get(phase, 0.0)) for phase, sec in self.phase_sec.items()}


@dataclass(frozen=True)
class Straggler:
    """A rank that was slow for `NUM_STRETCHES` in a row."""

    rank: int
    host: str
    times_median: float
    """Its work in the last stretch, against that of the others."""
    phase: str
    """Where it lost most."""


class _Times:
    """Seconds by rank (row) and phase (column), summed over intervals."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.hosts: dict[int, str] = {}
        self.phase_sec = np.zeros((0, 0))
        self.wait_sec = np.zeros((0, 0))

    def add(self, parts: Sequence[RankWork]) -> None:
        """Add what some ranks did; rows and columns are made as they are needed."""
        kinds = {phase for keys in {(*w.phase_sec, *w.wait_sec) for w in parts} for phase in keys}
        self._make_columns(sorted(kinds))
        ranks, columns = [work.rank for work in parts], self.phases
        self._make_rows(max(ranks) + 1)
        self.hosts.update((work.rank, work.host) for work in parts)
        for seconds, times in (
            (self.phase_sec, [work.phase_sec for work in parts]),
            (self.wait_sec, [work.wait_sec for work in parts]),
        ):
            for column, phase in enumerate(columns):
                seconds[ranks, column] += [time.get(phase, 0.0) for time in times]

    def add_all(self, other: _Times) -> None:
        """Add what another one has."""
        self._make_columns(other.phases)
        self._make_rows(len(other.phase_sec))
        self.hosts |= other.hosts
        columns = [self.phases.index(phase) for phase in other.phases]
        self.phase_sec[: len(other.phase_sec), columns] += other.phase_sec
        self.wait_sec[: len(other.wait_sec), columns] += other.wait_sec

    def _make_columns(self, phases: Sequence[str]) -> None:
        self.phases += [phase for phase in phases if phase not in self.phases]
        self._make_rows(len(self.phase_sec))

    def _make_rows(self, num: int) -> None:
        shape = (max(len(self.phase_sec), num), len(self.phases))
        self.phase_sec, self.wait_sec = _grown(self.phase_sec, shape), _grown(self.wait_sec, shape)

    @property
    def ranks(self) -> Array:
        """Ranks that have been added, ascending."""
        return np.sort(np.fromiter(self.hosts, dtype=np.int64))

    @property
    def work_sec(self) -> Array:
        """Without waiting, at least 0."""
        return np.maximum(0.0, self.phase_sec - self.wait_sec)


class StragglerMeter:
    """Collects all ranks' work, on rank 0.

    Args:
        slow: more than this many times the median of the others' work.
        stretch_sec: intervals are joined until so much time is in them: a moment's noise is no verdict.
    """

    def __init__(self, slow: float, stretch_sec: float) -> None:
        self._slow, self._stretch_sec = slow, stretch_sec
        self._stretch, self._whole = _Times(), _Times()
        self._num_steps = 0
        self._slow_in_a_row: defaultdict[int, int] = defaultdict(int)
        self._reported: set[int] = set()

    def add(self, parts: Sequence[RankWork], num_steps: int) -> list[Straggler]:
        """Take what all ranks did in the last `num_steps` steps; returns those that have just become stragglers."""
        self._num_steps += num_steps
        interval = _Times()
        interval.add(parts)
        self._stretch.add_all(interval)
        self._whole.add_all(interval)
        if self._stretch.phase_sec.sum(axis=1).max() < self._stretch_sec:
            return []
        found = self._judge()
        self._stretch = _Times()
        return found

    def _judge(self) -> list[Straggler]:
        ranks = self._stretch.ranks
        by_phase = self._stretch.work_sec[ranks]
        total = by_phase.sum(axis=1)
        # Of the others: of two ranks, the median of both would hide which is slow.
        usual = _medians_of_others(total)
        slow = set(ranks[total > self._slow * usual].tolist())
        self._reported &= slow
        self._slow_in_a_row = defaultdict(int, {rank: self._slow_in_a_row[rank] + 1 for rank in slow})
        found = sorted(r for r in slow if self._slow_in_a_row[r] >= NUM_STRETCHES and r not in self._reported)
        self._reported |= set(found)
        if not found:
            return []
        lost = by_phase - np.stack([_medians_of_others(column) for column in by_phase.T], axis=1)
        stragglers = []
        for rank, at in zip(found, np.searchsorted(ranks, found).tolist(), strict=True):
            ratio = round(float(total[at] / usual[at]), 2) if usual[at] else float("inf")
            worst = self._stretch.phases[int(lost[at].argmax())]
            stragglers.append(Straggler(rank, self._stretch.hosts[rank], ratio, worst))
        return stragglers

    def summary(self) -> list[dict[str, Any]]:
        """Per rank: host, seconds of work and of waiting per step by phase."""
        steps, whole = max(1, self._num_steps), self._whole
        work = whole.work_sec
        return [
            {
                "rank": rank,
                "host": whole.hosts[rank],
                "work_sec": _named(whole.phases, work[rank] / steps, whole.phase_sec[rank] > 0),
                "wait_sec": _named(whole.phases, whole.wait_sec[rank] / steps, whole.wait_sec[rank] > 0),
            }
            for rank in whole.ranks.tolist()
        ]


def work_metrics(parts: Sequence[RankWork], num_steps: int) -> dict[str, float]:
    """Of one interval: the longest work per step by phase, which rank works most, and how much more than usual."""
    times = _Times()
    times.add(parts)
    ranks, steps = times.ranks, max(1, num_steps)
    work, waits = times.work_sec[ranks], times.wait_sec[ranks].sum(axis=1)
    total = work.sum(axis=1)
    usual = float(np.median(total))
    metrics = {"ranks/slowest": float(ranks[total.argmax()])}
    if usual > 0:
        metrics["ranks/slowest_times_median"] = float(total.max()) / usual
    for phase in parts[0].phase_sec:
        metrics[f"ranks/max_work/{phase}_sec"] = float(work[:, times.phases.index(phase)].max()) / steps
    metrics["ranks/min_wait_sec"] = float(waits.min()) / steps
    metrics["ranks/max_wait_sec"] = float(waits.max()) / steps
    return metrics


def _grown(values: Array, shape: tuple[int, int]) -> Array:
    """`values` [rows, columns] in the upper left corner of zeros of `shape`; the same array where it has that shape."""
    if values.shape == shape:
        return values
    grown = np.zeros(shape)
    grown[: values.shape[0], : values.shape[1]] = values
    return grown


def _medians_of_others(values: Array) -> Array:
    """For each of N values, the median of the N - 1 others; of a single one, itself."""
    num_others = len(values) - 1
    if num_others == 0:
        return values
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values))

    def other(at: int) -> Array:
        return ordered[at + (place <= at)]  # the others in order: one's own place is skipped

    return (other((num_others - 1) // 2) + other(num_others // 2)) / 2


def _named(phases: Sequence[str], values: Array, shown: NDArray[np.bool_]) -> dict[str, float]:
    return {phase: round(float(v), 6) for phase, v, show in zip(phases, values, shown, strict=True) if show}
