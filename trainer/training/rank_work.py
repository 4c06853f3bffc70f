"""Measurement of the work of all ranks, which is gathered once per logging interval."""

from __future__ import annotations

import socket
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

from trainer.parallel.groups import Groups
from trainer.parallel.values import gather_values
from trainer.telemetry.config import TelemetryConfig
from trainer.telemetry.events import Emit
from trainer.telemetry.metrics import StepReport, peak_memory_bytes
from trainer.telemetry.straggler import RankWork, Straggler, StragglerMeter, work_metrics
from trainer.telemetry.waiting import WaitSampler


class Work:
    """A meter of this rank's work, which compares all ranks to find slow ones.

    Use it as a context manager around the steps.

    Args:
        config: The recipe's `telemetry` section, which determines when a rank counts as slow.
        waits: The sampler that measures how long this rank waits in collectives.
        groups: This rank's process groups.
        emit: The function that is called for each `straggler` event on rank 0.
    """

    def __init__(self, config: TelemetryConfig, waits: WaitSampler, groups: Groups, emit: Emit) -> None:
        self._waits, self._groups, self._emit = waits, groups, emit
        self._meter = StragglerMeter(config.straggler_ratio, config.straggler_stretch_sec)
        self._phase_sec: defaultdict[str, float] = defaultdict(float)
        self._num_steps = 0
        self._judge = ThreadPoolExecutor(1, thread_name_prefix="stragglers")
        self._judged: Future[list[Straggler]] | None = None
        self._judged_step = 0

    def __enter__(self) -> Work:
        self._waits.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waits.__exit__(kind, error, trace)
        try:
            if kind is None:
                self._emit_judged()
        finally:
            self._judge.shutdown()

    def add(self, report: StepReport) -> None:
        """Add a step of this rank to the current interval."""
        self._num_steps += 1
        for phase, sec in report.phase_sec.items():
            self._phase_sec[phase] += sec

    def take(self, report: StepReport) -> StepReport:
        """End the current interval, and return `report` with the metrics of the interval.

        Collective: every rank of the world must call it.

        Another thread on rank 0 looks for stragglers. Their events are emitted at the end of the next interval, but
        contain the step at which this interval ended.

        Args:
            report: The report of the interval's last step.

        Returns:
            On rank 0, the report with metrics of the work of all ranks. On other ranks, the unchanged report.
        """
        peak = peak_memory_bytes().get("device", 0)
        mine = RankWork(self._groups.rank, socket.gethostname(), dict(self._phase_sec), self._waits.take(), peak)
        num_steps, self._num_steps = self._num_steps, 0
        self._phase_sec.clear()
        parts = gather_values(mine, self._groups.world, (RankWork,))
        if parts is None:
            return report
        self._emit_judged()
        self._judged, self._judged_step = self._judge.submit(self._meter.add, parts, num_steps), report.step
        return replace(report, ranks=work_metrics(parts, num_steps))

    def _emit_judged(self) -> None:
        """Wait until the last search for stragglers has finished, and emit an event for each one that it found."""
        judged, self._judged = self._judged, None
        for straggler in judged.result() if judged is not None else ():
            self._emit("straggler", self._judged_step, _fields(straggler))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The work of all ranks over the whole run, on rank 0; see `StragglerMeter.summary`."""
        self._emit_judged()
        return self._meter.summary()


def _fields(slow: Straggler) -> dict[str, Any]:
    return {
        "slow_rank": slow.rank,
        "slow_host": slow.host,
        "times_median": slow.times_median,
        "phase": slow.phase,
        "why": f"rank {slow.rank} on {slow.host} works {slow.times_median} times as long as the others",
    }
