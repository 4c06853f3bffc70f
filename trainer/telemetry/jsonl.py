"""Append-only JSONL with a step in every line, exact across resumes."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from model.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Backlog(Generic[T]):
    """Hands items to `write`, in order. What a full or absent disk does not take waits, and goes first the next time.

    Args:
        write: raises OSError where it could not; nothing of the item may then be in the file.
        name: of the file, for the log.
    """

    def __init__(self, write: Callable[[T], None], name: object) -> None:
        self._write, self._name = write, name
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, item: T) -> None:
        """Write what waits and `item`, or say that they wait."""
        waited = len(self._waiting)
        self._waiting.append(item)
        try:
            self.flush()
        except OSError as error:
            if not waited:
                log.warning("%s CANNOT BE WRITTEN: %s; what belongs there waits, the run goes on", self._name, error)
        else:
            if waited:
                log.warning("%s is written again, with the %d entries that waited", self._name, waited)

    def flush(self) -> None:
        """Raises OSError where something still waits."""
        while self._waiting:
            self._write(self._waiting[0])
            self._waiting.popleft()


class StepLog:
    """Appends one JSON object per call, flushed at once.

    Resumed at step k, the lines of later steps (and a torn last line) are dropped first, in one atomic replacement;
    `resume_step` 0 begins the file anew.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, record in read_lines(path) if record["step"] <= resume_step] if resume_step else []
        write_atomically(path, "".join(kept))
        self._file = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError where the line could not be written; nothing of it is then in the file."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its record) of every whole line; none without the file.

    Raises:
        UserError: a line is no JSON object with a step.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # torn by a crash while it was written
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} line {number}: not a record of this file; repair or move it away") from None
        yield line, record


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content: a crash leaves the old or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
