"""What work on a device takes, measured without waiting for it."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch

Moment: TypeAlias = Any
"""Seconds of the host, or a CUDA event."""
Lap: TypeAlias = tuple[Moment, Moment]


class DeviceClock:
    """Moments in the work of `device`. A CPU has done its work when the call returns; a GPU marks the moment itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Moment:
        """Return the moment at which all work asked for so far is done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, lap: Lap) -> float:
        """Return what passed between two moments; waits until the second has come."""
        begin, end = lap
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
