"""Append-only JSONL files in which every line has a step, without duplicate steps after a resume."""

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
    """A queue of items that are written in order. Items that cannot be written are kept, and are written later.

    Args:
        write: A function that writes an item. If it raises OSError, no part of the item may remain in the file.
        name: The name of the file, for the log.
    """

    def __init__(self, write: Callable[[T], None], name: object) -> None:
        self._write, self._name = write, name
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        """Return the number of items that are not written yet."""
        return len(self._waiting)

    def add(self, item: T) -> None:
        """Write all waiting items and `item`; if that fails, keep them and log a warning."""
        waited = len(self._waiting)
        self._waiting.append(item)
        try:
            self.flush()
        except OSError as error:
            if not waited:
                log.warning("%s CANNOT BE WRITTEN: %s; its entries wait and the run continues", self._name, error)
        else:
            if waited:
                log.warning("%s is written again, including the %d entries that waited", self._name, waited)

    def flush(self) -> None:
        """Write all waiting items.

        Raises:
            OSError: If an item could not be written. This item and the items after it remain in the queue.
        """
        while self._waiting:
            self._write(self._waiting[0])
            self._waiting.popleft()


class StepLog:
    """A file to which JSON objects with a step are appended, unbuffered.

    Args:
        path: The file. Its folder is created if it does not exist.
        resume_step: The step from which the run resumes. The lines of later steps and an incomplete last line are
            first removed in one atomic replacement; 0 empties the file.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, record in read_lines(path) if record["step"] <= resume_step] if resume_step else []
        write_atomically(path, "".join(kept))
        self._file = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            OSError: If the line could not be written. In this case, no part of it remains in the file.
        """
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
    """Yield each complete line and its record; nothing if the file does not exist.

    Raises:
        UserError: If a line is not a JSON object with a step.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # The line is incomplete because of a crash.
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} line {number}: not a JSON object with a step; correct the line or move the file elsewhere"
            ) from None
        yield line, record


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file atomically: after a crash, the file has either the old or the new content."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
