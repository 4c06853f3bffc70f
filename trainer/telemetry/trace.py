"""A timeline of the phases of a few steps on all ranks, in Chrome's trace format (for ui.perfetto.dev)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.metrics import PhaseTimer
from trainer.telemetry.profile_config import ProfileConfig

log = logging.getLogger(__name__)

WAIT = "wait"
"""The phase in which a rank waits until all ranks have reached the next phase."""
_NUM_MARKS = 9


class Trace:
    """A recorder of the phases of the chosen steps, which writes them to files after the last of these steps.

    During these steps, all ranks wait for each other before each phase, in a phase called `wait`. The trace therefore
    shows how long a rank waits for the others. Without it, this time would be part of the next collective.

    Args:
        config: The recipe's `profile` section, which defines the steps to trace.
        timer: The timer whose phases are recorded.
        folder: The folder for the files: `rank<r>.json` for each rank and `trace.json` for all of them.
        rank: The rank of this process within `group`.
        group: The process group of all ranks; None for the default group.
        gather: A collective function that returns the lists of all ranks on rank 0, and None on other ranks.
    """

    def __init__(
        self,
        config: ProfileConfig,
        timer: PhaseTimer,
        folder: Path,
        rank: int,
        group: dist.ProcessGroup | None,
        gather: Callable[[list[Any]], list[list[Any]] | None],
    ) -> None:
        self._steps, self._timer, self._folder = config.range, timer, folder
        self._rank, self._group, self._gather = rank, group, gather
        self._events: list[dict[str, Any]] = []
        self._offset_sec = 0.0
        self._step, self._step_start_sec = 0, 0.0

    def begin(self, step: int) -> None:
        """Start recording if `step` is one of the chosen steps. This must be called before the first phase of the step.

        Collective: every rank of the group must call it.

        Args:
            step: The step, counted from 1.
        """
        if step not in self._steps:
            return
        if self._timer.listener is None:
            self._offset_sec = _clock_offset_sec(self._group)
            self._timer.listener = self
        self._step, self._step_start_sec = step, time.perf_counter()

    def end(self, step: int, last: bool) -> None:
        """Finish recording `step`, and write the files if it is the last recorded step.

        Collective: every rank of the group must call it.

        Args:
            step: The step, counted from 1.
            last: Whether the run ends after this step.
        """
        if step not in self._steps:
            return
        self._add(f"step {step}", self._step_start_sec, time.perf_counter())
        if last or step + 1 not in self._steps:
            self._timer.listener = None
            self._write()

    def on_phase_begin(self, phase: str, outermost: bool) -> None:
        """Implement `PhaseListener.on_phase_begin`: wait for all ranks before an outermost phase."""
        if outermost and phase != WAIT:
            with self._timer(WAIT):
                _meet(self._group)

    def on_phase_end(self, phase: str, start_sec: float, end_sec: float) -> None:
        """Implement `PhaseListener.on_phase_end`: record the phase."""
        self._add(phase, start_sec, end_sec)

    def _add(self, name: str, start_sec: float, end_sec: float) -> None:
        start_us, end_us = (round((sec - self._offset_sec) * 1e6, 3) for sec in (start_sec, end_sec))
        event = {"name": name, "ph": "X", "ts": start_us, "dur": round(end_us - start_us, 3), "pid": self._rank}
        self._events.append({**event, "tid": 0, "args": {"step": self._step}})

    def _write(self) -> None:
        label = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
        events, self._events = [label, *self._events], []
        _write_events(self._folder / f"rank{self._rank}.json", events)
        everyone = self._gather(events)
        if everyone is not None:
            _write_events(self._folder / "trace.json", [event for part in everyone for event in part])


def _write_events(path: Path, events: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    except OSError as error:
        log.warning("%s: THE TRACE COULD NOT BE WRITTEN: %s", path, error)


def _meet(group: dist.ProcessGroup | None) -> None:
    # A barrier on CUDA devices returns on the host before all devices have reached it. A CPU tensor avoids this.
    dist.all_reduce(torch.zeros(1), group=group)


def _clock_offset_sec(group: dist.ProcessGroup | None) -> float:
    """Return the number to subtract from this rank's `perf_counter` to get the seconds since rank 0 started recording.

    Collective: every rank of the group must call it.

    All ranks leave a barrier at nearly the same moment. The median over several barriers is not affected by a rank that
    is occasionally scheduled late.
    """
    marks = torch.empty(_NUM_MARKS, dtype=torch.float64)
    for i in range(_NUM_MARKS):
        _meet(group)
        marks[i] = time.perf_counter()
    first = marks.clone()
    dist.broadcast(first, src=0, group=group)
    return float((marks - first).median() + first[0])
