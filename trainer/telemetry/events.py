"""What happened to a run, attempt by attempt: `events.jsonl` in its folder. Needs no torch, so that shells can use it.

    python -m trainer.telemetry.events runs/demo submitted job=4711 nodes=16

Append-only, one JSON object per line: `time` (Unix seconds), `event`, `attempt`, `host`, where known `rank` and `step`,
and whatever else belongs to the event. An attempt begins with `started`; what is written before it belongs to the
attempt before (0: none yet).
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError

Emit = Callable[[str, int, Mapping[str, Any]], None]
"""Event, step, fields."""

EVENTS_NAME = "events.jsonl"
"""File in the run's folder."""

EVENTS = {
    "submitted": "a job was handed to the scheduler",
    "started": "an attempt began",
    "resumed": "it goes on from a checkpoint",
    "signal": "ranks were asked to stop",
    "saved": "a checkpoint is complete",
    "save_failed": "a checkpoint could not be written, or not in time",
    "stopped": "the attempt ended in order before the run's last step",
    "requeued": "the job is to run again",
    "refused": "it is not",
    "node_lost": "a node, or the network to it, went away",
    "peer_lost": "a rank lost its connection to another",
    "hang": "no rank made progress",
    "skip": "a step's update was left out",
    "rewind": "the weights of an earlier checkpoint were taken up again",
    "straggler": "one rank works persistently slower than the others",
    "failed": "an exception ended a rank",
    "finished": "the run did its last step",
}
"""Every event, in words."""

_OWN = ("time", "event", "attempt", "host")
Event = Mapping[str, Any]


@dataclass(frozen=True)
class EventLog:
    """Writes the events of one process.

    Args:
        run_dir: the run's folder; made where absent.
        rank: of this process; None: no rank.
        attempt: this process's; None: the one that is under way when an event is written.
    """

    run_dir: Path
    rank: int | None = None
    attempt: int | None = None

    def add(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Append one event; it is on its way to disk when this returns. Raises OSError."""
        self.append(self.record(event, step, **fields))

    def record(self, event: str, step: int | None = None, **fields: Any) -> Event:
        """An event that happens now."""
        assert event in EVENTS and not set(fields) & set(_OWN), (event, fields)
        attempt = num_attempts(read_events(self.run_dir)) if self.attempt is None else self.attempt
        record: dict[str, Any] = {"time": round(time.time(), 3), "event": event, "attempt": attempt}
        record["host"] = socket.gethostname()
        if self.rank is not None:
            record["rank"] = self.rank
        if step is not None:
            record["step"] = step
        return {**record, **fields}

    def append(self, record: Event) -> None:
        """Write what `record` gave. Raises OSError."""
        _append(self.path, json.dumps(record, ensure_ascii=False))

    @property
    def path(self) -> Path:
        """The file."""
        return self.run_dir / EVENTS_NAME


def begin_attempt(run_dir: Path, **fields: Any) -> EventLog:
    """Write `started` and return the log of the attempt that it begins. For rank 0."""
    attempt = num_attempts(read_events(run_dir)) + 1
    log = EventLog(run_dir, 0, attempt)
    log.add("started", **fields)
    return log


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, in the order of writing; none without the file.

    Left out are lines that a crash tore, and what has no name, attempt or time.
    """
    try:
        lines = (run_dir / EVENTS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_event(record):
            found.append(record)
    return found


def _is_event(record: Event) -> bool:
    name, attempt, at = (record.get(key) for key in ("event", "attempt", "time"))
    return isinstance(name, str) and isinstance(attempt, int) and isinstance(at, int | float) and math.isfinite(at)


def num_attempts(events: Iterable[Event]) -> int:
    """How often the run was started."""
    return sum(e["event"] == "started" for e in events)


def _append(path: Path, line: str) -> None:
    """One write to the end of the file: lines of several processes do not mix on a POSIX file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # A line that another process is writing looks torn, too; then an empty line is left, which no reader minds.
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; the line is torn", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.telemetry.events",
        description="Append one event to a run's events.jsonl.",
        epilog=f"Events: {', '.join(EVENTS)}. Values are JSON where they can be read so, else text.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder; made where absent")
    parser.add_argument("event", metavar="EVENT")
    parser.add_argument("fields", metavar="key=value", nargs="*")
    options = parser.parse_args(arguments)
    try:
        if options.event not in EVENTS:
            raise UserError(f"event {options.event}: not one of {', '.join(EVENTS)}")
        EventLog(options.run_dir).add(options.event, **_fields(options.fields))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _fields(pairs: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or key in _OWN:
            raise UserError(f"{pair}: a field has the form key=value, and none of {', '.join(_OWN)} for its key")
        try:
            fields[key] = json.loads(text)
        except ValueError:
            fields[key] = text
    return fields


if __name__ == "__main__":
    sys.exit(main())
