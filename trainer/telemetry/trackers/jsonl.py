"""The tracker that writes a file of JSON lines. Every run has this tracker."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.telemetry.jsonl import Backlog, StepLog
from trainer.telemetry.trackers.base import Tracker

log = logging.getLogger(__name__)


class JsonlTracker(Tracker):
    """A tracker that appends one JSON object per record to a file: `{"step": ..., "time": ..., "<metric>": ...}`.

    Values that JSON cannot represent as numbers are written as the strings "nan", "inf" and "-inf".

    Args:
        path: The file.
        resume_step: The step from which the run resumes; see `StepLog`.
    """

    title = "JSON lines"

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._log = StepLog(path, resume_step)
        self._records: Backlog[Mapping[str, Any]] = Backlog(self._log.append, path)

    @property
    def num_lost(self) -> int:
        """The number of records that could not be written to the disk."""
        return len(self._records)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        numbers = {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}
        self._records.add({"step": step, "time": round(time.time(), 3), **numbers})

    def close(self) -> None:
        try:
            self._records.flush()
            self._log.close()
        except OSError as error:
            log.warning("%s: %s; %d records were lost", self._log.path, error, self.num_lost)
