"""Measurement of the time that this rank waits for other ranks in collectives, by phase of the step.

All ranks need the same time for a step, because they wait for the slowest rank. Only the fraction of this time that
they spend waiting differs. To measure the waiting time, a thread checks about fifty times per second whether the
innermost Python frames of the main thread belong to a collective. This method needs no wrappers, and it also covers the
collectives of DeepSpeed and Megatron. It does not detect CUDA kernels that wait for other ranks, since the main thread
then waits for the device.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from types import FrameType, TracebackType

from trainer.telemetry.metrics import PhaseTimer

_PERIOD_SEC = 0.02
_DEPTH = 4
_FILES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "deepspeed/comm/torch.py",
    "deepspeed/comm/comm.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
)
"""The source files of functions that wait for other ranks."""


class WaitSampler:
    """A context manager that measures how long the thread that created it waits for other ranks.

    Example:
        with WaitSampler(timer) as waits:
            ...
            seconds = waits.take()

    Args:
        timer: The timer of the thread's phases.
    """

    def __init__(self, timer: PhaseTimer) -> None:
        self._timer = timer
        self._main = threading.get_ident()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="waits", daemon=True)

    def __enter__(self) -> WaitSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> dict[str, float]:
        """Return the seconds spent waiting since the last call, by phase."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _sample(self) -> None:
        last_sec = time.perf_counter()
        while not self._done.wait(_PERIOD_SEC):
            now_sec = time.perf_counter()
            phase, frame = self._timer.current, sys._current_frames().get(self._main)
            if phase is not None and is_waiting(frame):
                with self._lock:
                    self._seconds[phase] += now_sec - last_sec
            last_sec = now_sec


def is_waiting(frame: FrameType | None) -> bool:
    """Return whether `frame`, the innermost frame of a thread, belongs to a collective."""
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(_FILES):
            return True
        if frame.f_code.co_name == "wait" and "/deepspeed/" in frame.f_code.co_filename:  # an asynchronous collective
            return True
        frame = frame.f_back
    return False
