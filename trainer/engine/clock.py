"""Measurement of the duration of work on a device, without waiting for the work when it is submitted."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch

Moment: TypeAlias = Any
"""A point in time: seconds on the host's clock, or a CUDA event."""
Lap: TypeAlias = tuple[Moment, Moment]
"""The start and the end of a piece of work."""


class DeviceClock:
    """A clock for work on a device. On a CPU it reads the host's time, on a GPU it records CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Moment:
        """Return the moment at which all work submitted so far is finished. The call does not wait for that moment."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, lap: Lap) -> float:
        """Return the seconds between two moments, after waiting for the second one."""
        begin, end = lap
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
