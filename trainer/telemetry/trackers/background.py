"""A tracker that stores its records in a separate thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.errors import without_credentials
from trainer.telemetry.trackers.base import Tracker, main_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The metrics of one step."""

    step: int
    time_ms: int
    """The time at which the metrics were logged, in milliseconds since the Unix epoch."""
    metrics: Mapping[str, float]


class BackgroundTracker(Tracker):
    """A tracker that runs in a separate thread, so that a slow import or a slow store does not delay training.

    Subclasses implement `open_run`, `write` and `close_run`, which the thread calls and which may raise exceptions. The
    first failure is logged as a warning, and no failure stops training.
    """

    _NUM_QUEUED = 10_000
    _NUM_PER_BATCH = 1_000
    _CLOSE_SEC = 120.0

    def __init__(self) -> None:
        self._num_lost = 0
        self._queue: queue.Queue[Record | None] = queue.Queue(self._NUM_QUEUED)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=self.title, daemon=True)
        self._thread.start()

    @abstractmethod
    def open_run(self) -> None:
        """Open the store and create the run there, or continue it after a resume."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Store at least one record, in order."""

    @abstractmethod
    def close_run(self) -> None:
        """End the run in the store. It is called only if `open_run` succeeded."""

    @property
    def num_lost(self) -> int:
        """The number of records that could not be stored."""
        return self._num_lost

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        try:
            self._queue.put_nowait(Record(step, time.time_ns() // 1_000_000, main_metrics(metrics)))
        except queue.Full:
            self._lose(1, "its queue is full because the store is slower than training")

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=self._CLOSE_SEC)
            self._thread.join(self._CLOSE_SEC)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._lose(self._queue.qsize(), f"the store did not finish within {self._CLOSE_SEC:.0f} s")
        if self.num_lost:
            log.warning("%s: %d records were lost; metrics.jsonl has them", self.title, self.num_lost)

    def _lose(self, num: int, reason: object) -> None:
        with self._lock:
            first = self._num_lost == 0
            self._num_lost += num
        if first and num:
            log.warning(
                "%s RECORDS ARE BEING LOST: %s; training continues and metrics.jsonl has them",
                self.title.upper(),
                without_credentials(str(reason)),
            )

    def _work(self) -> None:
        is_open = True
        try:
            self.open_run()
        except Exception as error:  # noqa: BLE001 - no failure of a tracker may end training
            is_open = False
            self._lose(1, f"{type(error).__name__}: {error}")
        done = False
        while not done:
            items = [self._queue.get()]
            while len(items) < self._NUM_PER_BATCH and not self._queue.empty():
                items.append(self._queue.get_nowait())
            done = items[-1] is None
            records = [item for item in items if item is not None]
            if not is_open:
                self._lose(len(records), "no connection")
            elif records:
                try:
                    self.write(records)
                except Exception as error:  # noqa: BLE001
                    self._lose(len(records), f"{type(error).__name__}: {error}")
        if is_open:
            try:
                self.close_run()
            except Exception as error:  # noqa: BLE001
                self._lose(1, f"{type(error).__name__}: {error}")
