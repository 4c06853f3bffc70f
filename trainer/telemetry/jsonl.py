"""Append-only JSONL files in which every line has a step. A resume does not duplicate steps."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from model.errors import UserError
from model.json_text import parse_json
from trainer.files import write_whole

log = logging.getLogger(__name__)
T = TypeVar("T")
_NOT_FINITE = ("nan", "inf", "-inf")
"""The strings that represent numbers that are not finite, because JSON has no such numbers."""


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
        """Write all waiting items and `item`. If that fails, keep the unwritten items and log a warning."""
        waited = len(self._waiting)
        self._waiting.append(item)
        try:
            self.flush()
        except OSError as error:
            if not waited:
                log.warning(
                    "%s CANNOT BE WRITTEN: %s; its entries are kept in memory, and the run continues", self._name, error
                )
        else:
            if waited:
                log.warning(
                    "%s can be written again; the %d entries that were kept have been written to it", self._name, waited
                )

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
        resume_step: The step from which the run resumes. Lines of later steps, damaged lines and an incomplete last
            line are first removed in one atomic replacement. 0 empties the file.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = list(_undamaged(path, resume_step)) if resume_step else []
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

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace all lines of the file atomically. The lines must end with line breaks.

        Raises:
            OSError: If the lines could not be written. In this case, the file is unchanged.
        """
        write_atomically(self.path, "".join(lines))
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each complete line and its record. If the file does not exist, nothing is yielded.

    Raises:
        UserError: If the file cannot be read, or a line is not a JSON object with a step.
    """
    for number, line, record in _numbered(path):
        if isinstance(record, ValueError):
            raise UserError(f"{path} line {number}: {record}; correct the line or move the file elsewhere")
        yield line, record


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file, in which every value is a number.

    If the file does not exist, nothing is yielded.

    Raises:
        UserError: If the file cannot be read, or a line is not a record of metrics.
    """
    for number, (_, record) in enumerate(read_lines(path), start=1):
        for name, value in record.items():
            if value not in _NOT_FINITE and (isinstance(value, bool) or not isinstance(value, int | float)):
                problem = f"{name} = {ascii(value)[:80]}, but must be a number"
                raise UserError(f"{path} line {number}: {problem}; correct the line or move the file elsewhere")
        yield record


def undamaged_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all undamaged lines. If the file does not exist, nothing is yielded.

    Raises:
        UserError: If the file cannot be read.
    """
    yield from (record for _, _, record in _numbered(path) if not isinstance(record, ValueError))


def _undamaged(path: Path, last_step: int) -> Iterator[str]:
    """Yield the lines up to `last_step`. Log damaged lines, and keep the damaged file under a different name."""
    damaged = []
    for number, line, record in _numbered(path):
        if isinstance(record, ValueError):
            damaged.append(number)
        elif record["step"] <= last_step:
            yield line
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        log.warning(
            "%s: %d damaged lines are dropped (the first is line %d); a copy of the original file is %s",
            path,
            len(damaged),
            damaged[0],
            aside,
        )


def _numbered(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield the number and the text of each complete line, with its record or the reason why there is no record.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    # splitlines() would also split at characters that JSON strings may contain. Text after the last line break was left
    # incomplete by a crash.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        record: Any
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
                record = ValueError("is not a JSON object with a step")
        except ValueError as error:
            record = ValueError(f"is not a JSON object with a step ({error})")
        yield number, line.decode("utf-8", "replace") + "\n", record


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file atomically. After a crash, the file has either the old or the new content."""
    write_whole(path, [text.encode()])
