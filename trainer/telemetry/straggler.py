"""Which rank works slower than the others, and on which host."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class _Total:
    host: str = ""
    phase_sec: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wait_sec: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, work: RankWork) -> None:
        self.host = work.host
        for phase, sec in work.phase_sec.items():
            self.phase_sec[phase] += sec
        for phase, sec in work.wait_sec.items():
            self.wait_sec[phase] += sec

    @property
    def work_sec(self) -> dict[str, float]:
        return RankWork(0, self.host, self.phase_sec, self.wait_sec).work_sec


class StragglerMeter:
    """Collects all ranks' work, on rank 0.

    Args:
        slow: more than this many times the median of the others' work.
        stretch_sec: intervals are joined until so much time is in them: a moment's noise is no verdict.
    """

    def __init__(self, slow: float, stretch_sec: float) -> None:
        self._slow, self._stretch_sec = slow, stretch_sec
        self._stretch: defaultdict[int, _Total] = defaultdict(_Total)
        self._whole: defaultdict[int, _Total] = defaultdict(_Total)
        self._num_steps = 0
        self._slow_in_a_row: defaultdict[int, int] = defaultdict(int)
        self._reported: set[int] = set()

    def add(self, parts: Sequence[RankWork], num_steps: int) -> list[Straggler]:
        """Take what all ranks did in the last `num_steps` steps; returns those that have just become stragglers."""
        self._num_steps += num_steps
        for work in parts:
            self._stretch[work.rank].add(work)
            self._whole[work.rank].add(work)
        if max(sum(total.phase_sec.values()) for total in self._stretch.values()) < self._stretch_sec:
            return []
        found = self._judge()
        self._stretch.clear()
        return found

    def _judge(self) -> list[Straggler]:
        found = []
        work = {rank: total.work_sec for rank, total in self._stretch.items()}
        for rank, mine in work.items():
            # Of the others: of two ranks, the median of both would hide which is slow.
            usual = statistics.median([sum(w.values()) for r, w in work.items() if r != rank] or [sum(mine.values())])
            if sum(mine.values()) <= self._slow * usual:
                self._slow_in_a_row[rank] = 0
                self._reported.discard(rank)
                continue
            self._slow_in_a_row[rank] += 1
            if self._slow_in_a_row[rank] >= NUM_STRETCHES and rank not in self._reported:
                self._reported.add(rank)
                ratio = round(sum(mine.values()) / usual, 2) if usual else float("inf")
                found.append(Straggler(rank, self._stretch[rank].host, ratio, _worst_phase(rank, work)))
        return found

    def summary(self) -> list[dict[str, Any]]:
        """Per rank: host, seconds of work and of waiting per step by phase."""
        steps = max(1, self._num_steps)
        return [
            {
                "rank": rank,
                "host": total.host,
                "work_sec": {phase: round(sec / steps, 6) for phase, sec in total.work_sec.items()},
                "wait_sec": {phase: round(sec / steps, 6) for phase, sec in total.wait_sec.items()},
            }
            for rank, total in sorted(self._whole.items())
        ]


def work_metrics(parts: Sequence[RankWork], num_steps: int) -> dict[str, float]:
    """Of one interval: the longest work per step by phase, which rank works most, and how much more than usual."""
    totals = {work.rank: sum(work.work_sec.values()) for work in parts}
    slowest = max(totals, key=lambda rank: totals[rank])
    usual = statistics.median(totals.values())
    metrics = {"ranks/slowest": float(slowest)}
    if usual > 0:
        metrics["ranks/slowest_times_median"] = totals[slowest] / usual
    for phase in parts[0].phase_sec:
        metrics[f"ranks/max_work/{phase}_sec"] = max(w.work_sec.get(phase, 0.0) for w in parts) / max(1, num_steps)
    metrics["ranks/min_wait_sec"] = min(sum(w.wait_sec.values()) for w in parts) / max(1, num_steps)
    metrics["ranks/max_wait_sec"] = max(sum(w.wait_sec.values()) for w in parts) / max(1, num_steps)
    return metrics


def _worst_phase(rank: int, work: Mapping[int, Mapping[str, float]]) -> str:
    def lost_sec(phase: str) -> float:
        return work[rank][phase] - statistics.median([w.get(phase, 0.0) for r, w in work.items() if r != rank])

    return max(work[rank], key=lost_sec)
