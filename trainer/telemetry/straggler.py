"""Detection of ranks that work more slowly than the others, and a summary of the work of all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUM_STRETCHES = 3
"""The number of consecutive slow periods after which a rank is a straggler. Ranks are compared once per period."""


@dataclass(frozen=True)
class RankWork:
    """The work of one rank in one interval."""

    rank: int
    host: str
    phase_sec: Mapping[str, float]
    """The wall time of each phase, in seconds."""
    wait_sec: Mapping[str, float]
    """The part of each phase's wall time that was spent waiting for other ranks, in seconds."""
    peak_bytes: int = 0
    """The peak memory of the rank's device so far; 0 on a CPU."""

    @property
    def work_sec(self) -> dict[str, float]:
        """The wall time of each phase without waiting, in seconds."""
        return {phase: max(0.0, sec - self.wait_sec.get(phase, 0.0)) for phase, sec in self.phase_sec.items()}


@dataclass(frozen=True)
class Straggler:
    """A rank that was slow in `NUM_STRETCHES` consecutive periods."""

    rank: int
    host: str
    times_median: float
    """The rank's work time in the last period, divided by the median of the other ranks' work times."""
    phase: str
    """The phase in which the rank's work time exceeded the median of the other ranks by the most seconds."""


class _Times:
    """Tables of seconds by rank (row) and phase (column), summed over intervals."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.hosts: dict[int, str] = {}
        self.phase_sec = np.zeros((0, 0))
        self.wait_sec = np.zeros((0, 0))

    def add(self, parts: Sequence[RankWork]) -> None:
        """Add the work of some ranks. Rows and columns are created as needed."""
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
        """Add all times of another table."""
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
        """The ranks whose work has been added, in ascending order."""
        return np.sort(np.fromiter(self.hosts, dtype=np.int64))

    @property
    def work_sec(self) -> Array:
        """The times without waiting, at least 0; [ranks, phases]."""
        return np.maximum(0.0, self.phase_sec - self.wait_sec)


class StragglerMeter:
    """A meter that collects the work of all ranks on rank 0, and finds stragglers.

    Args:
        slow: A rank is slow if its work time exceeds this multiple of the other ranks' median.
        stretch_sec: The length of the periods over which ranks are compared, in seconds. Intervals are merged until
            they last this long together, which averages out noise in short intervals.
    """

    def __init__(self, slow: float, stretch_sec: float) -> None:
        self._slow, self._stretch_sec = slow, stretch_sec
        self._stretch, self._whole = _Times(), _Times()
        self._num_steps = 0
        self._slow_in_a_row: defaultdict[int, int] = defaultdict(int)
        self._reported: set[int] = set()

    def add(self, parts: Sequence[RankWork], num_steps: int) -> list[Straggler]:
        """Add the work of an interval.

        Args:
            parts: The work of all ranks.
            num_steps: The number of steps in the interval.

        Returns:
            The ranks that have become stragglers in this interval.
        """
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
        # Each rank is compared only with the other ranks. With two ranks, a median that includes the slow rank would be
        # halfway between them and hide the slowness.
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
        """Return the host of each rank, and the seconds per step that the rank works and waits in each phase."""
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
    """Compute the metrics of the ranks' work in one interval.

    Args:
        parts: The work of all ranks.
        num_steps: The number of steps in the interval.

    Returns:
        The longest work time per step in each phase, the rank that works longest, the ratio of its work time to the
        median over all ranks, the shortest and longest waits per step, and the peak memory of the fullest device.
    """
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
    peak = max(work.peak_bytes for work in parts)
    if peak:
        metrics["memory/max_peak_bytes"] = float(peak)
    return metrics


def _grown(values: Array, shape: tuple[int, int]) -> Array:
    """Pad a table with zeros at the bottom and on the right.

    A table that already has this shape is returned unchanged.
    """
    if values.shape == shape:
        return values
    grown = np.zeros(shape)
    grown[: values.shape[0], : values.shape[1]] = values
    return grown


def _medians_of_others(values: Array) -> Array:
    """Return the median of the N - 1 other values for each of N values. A single value is returned unchanged."""
    num_others = len(values) - 1
    if num_others == 0:
        return values
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values))

    def other(at: int) -> Array:
        return ordered[at + (place <= at)]  # This is the value with index `at` among the sorted other values.

    return (other((num_others - 1) // 2) + other(num_others // 2)) / 2


def _named(phases: Sequence[str], values: Array, shown: NDArray[np.bool_]) -> dict[str, float]:
    return {phase: round(float(v), 6) for phase, v, show in zip(phases, values, shown, strict=True) if show}
