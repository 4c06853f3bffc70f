"""Measurement of how long work on a device takes, without waiting for it."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch

Moment: TypeAlias = Any
"""A time of the host in seconds, or a CUDA event."""
Lap: TypeAlias = tuple[Moment, Moment]
"""The begin and the end of a piece of work."""


class DeviceClock:
    """A clock for the work of a device. A CPU has finished when a call returns; a GPU records the moment itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Moment:
        """Return the moment at which all work that has been submitted so far is finished."""
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
