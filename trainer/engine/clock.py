"""Measurement of the time that work takes on a device. The host waits for the device only when a result is read."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch

Moment: TypeAlias = Any
"""A point in time: seconds of the host's clock on a CPU, or a CUDA event on a GPU."""
Lap: TypeAlias = tuple[Moment, Moment]
"""The moments at which a piece of work starts and ends."""


class DeviceClock:
    """A clock for work on a device. It reads the host's clock on a CPU and records CUDA events on a GPU."""

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
        """Wait until the end of a lap, and return its length in seconds."""
        begin, end = lap
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
