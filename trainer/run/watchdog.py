"""The watchdog, which ends a run that hangs: all ranks write their stacks and exit with `ExitCode.HUNG`.

Every rank has a thread that checks when the rank last made progress. If one rank hangs, the others wait for it in a
collective and make no progress either, so all of them notice the hang. The first rank that notices it creates a folder,
and the other ranks stop as soon as the folder exists. If C code holds the interpreter's lock, no Python thread can run.
In this case, the thread of faulthandler, which does not need the lock, writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from trainer.run.exit_codes import ExitCode
from trainer.telemetry.events import EventLog

_GATHER_SEC = 10.0
"""The time that a rank waits for the stacks of the other ranks before it exits, in seconds."""

_FLIGHT_RECORDERS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
"""Backend → the name of the function in `torch._C._distributed_c10d` that returns the record of its collectives. The
function for NCCL does not exist in CPU builds."""


def hang_folder(events: EventLog) -> Path:
    """Return the folder to which the ranks of an attempt write their stacks if they hang."""
    return events.run_dir / f"hang-{events.attempt}"


def clear_hang(events: EventLog) -> None:
    """Rename an existing folder of stacks. It can exist if a user deleted only the events of an earlier run."""
    folder = hang_folder(events)
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-until-{int(time.time())}"))


class Watchdog:
    """A thread that ends the process with `ExitCode.HUNG` if there is no heartbeat for too long.

    Use it as a context manager: `with Watchdog(…) as dog: … dog.heartbeat("step 3") …`.

    Args:
        timeout_sec: The maximum time between two heartbeats; 0 disables the watchdog.
        events: The event log of this rank. The folder `hang-<attempt>` is created in the same folder as the log.
        world: The number of ranks.
    """

    def __init__(self, timeout_sec: float, events: EventLog, world: int) -> None:
        self._timeout_sec, self._events, self._world = timeout_sec, events, world
        self._folder = hang_folder(events)
        self._poll_sec = min(5.0, timeout_sec / 10)
        self._last = (time.monotonic(), "start")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._last_words: TextIO | None = None

    def heartbeat(self, what: str) -> None:
        """Record progress.

        Args:
            what: A description of the work that has started or is continuing, such as "step 3".
        """
        self._last = (time.monotonic(), what)

    def disarm(self) -> None:
        """Stop watching, so that the rest of the process may take any amount of time."""
        self._last = (math.inf, "the end")

    def __enter__(self) -> Watchdog:
        self.heartbeat("start")
        if self._timeout_sec > 0:
            # The file is opened in advance, since faulthandler cannot open files when it has to write.
            path = self._events.run_dir / ".watchdog" / f"rank-{self._events.rank}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last_words = path.open("w+", encoding="utf-8")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._last_words is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._last_words.close()
            path = Path(self._last_words.name)
            path.unlink(missing_ok=True)
            with suppress(OSError):  # The folder may still contain files of other ranks.
                path.parent.rmdir()

    def _watch(self) -> None:
        while True:
            assert self._last_words is not None
            # Each iteration postpones this dump, so it happens only if this thread cannot run for that long.
            faulthandler.dump_traceback_later(self._timeout_sec + _GATHER_SEC, exit=True, file=self._last_words)
            if self._done.wait(self._poll_sec):
                return
            since_sec, what = self._last
            silent_sec = time.monotonic() - since_sec
            if silent_sec > self._timeout_sec or self._folder.exists():
                self._end(silent_sec, what)

    def _end(self, silent_sec: float, what: str) -> None:
        assert self._last_words is not None
        faulthandler.dump_traceback_later(3 * _GATHER_SEC, exit=True, file=self._last_words)
        try:
            first = self._is_first()
            self._write_stacks(silent_sec, what)
            self._write_flight_record()
            missing = self._wait_for_others()
            if first:
                self._emit(silent_sec, what, missing)
        except OSError as error:  # The process must exit even if the disk is full or unreachable.
            print(f"watchdog of rank {self._events.rank}: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        os._exit(ExitCode.HUNG)

    def _is_first(self) -> bool:
        try:
            self._folder.mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def _write_stacks(self, silent_sec: float, what: str) -> None:
        rank = self._events.rank
        assert rank is not None
        part = self._folder / f".rank-{rank}"
        with part.open("w", encoding="utf-8") as file:
            file.write(
                f"rank {rank} on {socket.gethostname()}, process {os.getpid()}: {silent_sec:.1f} s in {what}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        part.replace(self._file(rank))

    def _write_flight_record(self) -> None:
        """Write torch's record of the last collectives next to the stacks."""
        record = flight_record()
        if record is not None:
            (self._folder / f"collectives-{self._events.rank}.json").write_text(record, encoding="utf-8")

    def _wait_for_others(self) -> list[int]:
        """Wait for the stacks of all ranks, and return the ranks that did not write theirs in time."""
        deadline = time.monotonic() + _GATHER_SEC
        while True:
            missing = [rank for rank in range(self._world) if not self._file(rank).exists()]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)

    def _emit(self, silent_sec: float, what: str, missing: Sequence[int]) -> None:
        fields: dict[str, Any] = {"silent_sec": round(silent_sec, 1), "in": what, "folder": self._folder.name}
        if missing:
            fields["ranks_without_stacks"] = list(missing)
        self._events.add("hang", **fields)
        suspects = f"; no stacks from ranks {', '.join(map(str, missing))}" if missing else ""
        print(
            f"hung: {silent_sec:.0f} s in {what}; stacks are in {self._folder}{suspects}", file=sys.stderr, flush=True
        )


def flight_record() -> str | None:
    """Return torch's records of the last collectives as one JSON object, or None if no collective was recorded.

    CUDA builds keep two records, one of gloo's collectives and one of NCCL's. The key `entries` contains the entries of
    both records in the order in which the collectives were issued. Each entry names its `recorder` ("gloo" or "nccl").
    The key `recorders` contains all other fields of each record.
    """
    entries: list[dict[str, Any]] = []
    recorders: dict[str, Any] = {}
    for name, dump_name in _FLIGHT_RECORDERS.items():
        dump = getattr(torch._C._distributed_c10d, dump_name, None)
        if dump is None:
            continue
        text = dump()
        record = json.loads(text.decode(errors="replace") if isinstance(text, bytes) else text)
        entries += [{"recorder": name, **entry} for entry in record.pop("entries", None) or []]
        recorders[name] = record
    if not entries:
        return None
    entries.sort(key=lambda entry: int(entry.get("time_created_ns", 0)))
    return json.dumps({"entries": entries, "recorders": recorders})
