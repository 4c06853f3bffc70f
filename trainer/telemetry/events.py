"""The events of a run, which are appended to `events.jsonl` in its folder.

    python -m trainer.telemetry.events runs/demo submitted job=4711 nodes=16

Each line is a JSON object with the keys `time` (Unix seconds), `event`, `attempt` and `host`. It also has `rank` and
`step` if they are known, and additional keys that depend on the event. An attempt begins with the event `started`.
Events that are written between two attempts belong to the earlier attempt. Attempt 0 means that no attempt has begun.
This module does not import torch, so that shell scripts can use it without a delay.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError, without_credentials
from model.json_text import parse_json

Emit = Callable[[str, int, Mapping[str, Any]], None]
"""A function that emits an event, given its name, the most recently started step, and the fields of the event."""

EVENTS_NAME = "events.jsonl"
"""The name of the file in the run's folder."""

EVENTS = {
    "submitted": "a job was handed to the scheduler",
    "started": "an attempt began",
    "resumed": "the run resumes from a checkpoint",
    "stage_started": "a stage of training begins, or continues after a resume",
    "signal": "ranks were asked to stop",
    "saved": "a checkpoint is complete",
    "save_failed": "a checkpoint could not be written, or not in time",
    "stopped": "the attempt ended cleanly before the run's last step",
    "requeued": "the job will run again",
    "refused": "the job will not run again",
    "cancelled": "a person cancelled the job, which will not run again",
    "node_lost": "a node, or the network to it, failed",
    "fewer_nodes": "the job continues with fewer replicas, because nodes are missing",
    "peer_lost": "a rank lost its connection to another",
    "fenced": "the attempt ended because a newer one had started",
    "hang": "no rank made progress",
    "skip": "a step's update was skipped",
    "rewind": "the weights of an earlier checkpoint were restored",
    "diverged": "too many updates in a row were skipped, and the run ended without saving its weights",
    "corrupted": "replicas of the LLM hold different weights, so a device is faulty",
    "gpu_fault": "a GPU reported a hardware fault, or reduced its clocks",
    "plan_checked": "the time and memory of steps were compared with the run's plan",
    "straggler": "one rank works persistently slower than the others",
    "failed": "an exception ended a rank",
    "finished": "the run did its last step",
}
"""The meaning of every event, by its name."""

_OWN = ("time", "event", "attempt", "host")
Event = Mapping[str, Any]


@dataclass(frozen=True)
class EventLog:
    """A writer of the events of one process.

    Args:
        run_dir: The run's folder, which is created if it does not exist.
        rank: The rank of this process; None if it is not a rank.
        attempt: The attempt to which the events belong; None for the attempt that is current when an event is written.
        notify: A function that is called with every event that was written, such as `trainer.telemetry.alerts.Alerts`.
    """

    run_dir: Path
    rank: int | None = None
    attempt: int | None = None
    notify: Callable[[Event], None] | None = None

    def add(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Append an event that happens now, and flush it to disk.

        Args:
            event: One of `EVENTS`.
            step: The most recently started step; None if there is none.
            fields: Additional keys and values, which must be serializable as JSON.

        Raises:
            OSError: If the event could not be written.
        """
        self.append(self.record(event, step, **fields))

    def record(self, event: str, step: int | None = None, **fields: Any) -> Event:
        """Return an event that happens now without writing it. It has the same arguments as `add`."""
        assert event in EVENTS and not set(fields) & set(_OWN), (event, fields)
        attempt = num_attempts(read_events(self.run_dir)) if self.attempt is None else self.attempt
        record: dict[str, Any] = {"time": round(time.time(), 3), "event": event, "attempt": attempt}
        record["host"] = socket.gethostname()
        if self.rank is not None:
            record["rank"] = self.rank
        if step is not None:
            record["step"] = step
        return {**record, **{key: _public(value) for key, value in fields.items()}}

    def append(self, record: Event) -> None:
        """Append an event that `record` returned.

        Raises:
            OSError: If the event could not be written.
        """
        _append(self.path, json.dumps(record, ensure_ascii=False))
        if self.notify is not None:
            self.notify(record)

    @property
    def path(self) -> Path:
        """The path of `events.jsonl`."""
        return self.run_dir / EVENTS_NAME


def _public(value: Any) -> Any:
    """Return a value of an event with the credentials in its URLs masked."""
    if isinstance(value, str):
        return without_credentials(value)
    return [_public(item) for item in value] if isinstance(value, list | tuple) else value


def begin_attempt(run_dir: Path, **fields: Any) -> EventLog:
    """Start an attempt by writing the event `started`. Only rank 0 calls this function.

    Args:
        run_dir: The run's folder.
        fields: Additional keys and values of the event.

    Returns:
        The event log of the new attempt.
    """
    attempt = num_attempts(read_events(run_dir)) + 1
    log = EventLog(run_dir, 0, attempt)
    log.add("started", **fields)
    return log


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return all events of a run in the order in which they were written. The list is empty if the file does not exist.

    Lines that are incomplete because of a crash, or that have no event name, attempt or time, are skipped.
    """
    try:
        # splitlines() would also split at characters that JSON strings may contain.
        lines = (run_dir / EVENTS_NAME).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_event(record):
            found.append(record)
    return found


def _is_event(record: Event) -> bool:
    name, attempt, at = (record.get(key) for key in ("event", "attempt", "time"))
    if isinstance(attempt, bool) or isinstance(at, bool):
        return False
    return isinstance(name, str) and isinstance(attempt, int) and isinstance(at, int | float) and abs(at) < 1e12


def num_attempts(events: Iterable[Event]) -> int:
    """Return the number of attempts that have started."""
    return sum(e["event"] == "started" for e in events)


def _append(path: Path, line: str) -> None:
    """Append a line with a single write, so that lines from several processes are not mixed on a POSIX file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # A line that another process is writing also looks incomplete. The empty line that then results is harmless.
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; the line is incomplete", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m trainer.telemetry.events`.

    Returns:
        The exit code: 0, or 2 after printing an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.telemetry.events",
        description="Append one event to a run's events.jsonl.",
        epilog=f"Events: {', '.join(EVENTS)}. A value that is not valid JSON is taken as text.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="the run's folder, which is created if it does not exist"
    )
    parser.add_argument("event", metavar="EVENT", help="the name of the event")
    parser.add_argument("fields", metavar="key=value", nargs="*", help="additional fields of the event")
    options = parser.parse_args(arguments)
    try:
        if options.event not in EVENTS:
            raise UserError(f"event {options.event} is not one of {', '.join(EVENTS)}")
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
            raise UserError(f"{pair}: write a field as key=value, with a key other than {', '.join(_OWN)}")
        try:
            fields[key] = json.loads(text)
        except ValueError:
            fields[key] = text
    return fields


if __name__ == "__main__":
    sys.exit(main())
