"""Parse CSV text in which quotation marks may be misplaced."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_EXTENSION = re.compile(r"\.[A-Za-z0-9]{2,5}\s*$")


@dataclass(frozen=True)
class Record:
    """A row of a table, or a line that is not a row. In the second case, `problem` is the reason."""

    line: int
    """The number of the row's last line, or of the line that is not a row."""
    cells: tuple[str, ...] = ()
    problem: str = ""
    """The problem with the line; empty if it is a row."""


class _Lines:
    """An iterator over numbered lines that can be moved back to the second line of the current record."""

    def __init__(self, lines: Iterable[tuple[int, str]]) -> None:
        self._lines = iter(lines)
        self._again: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []
        """The lines of the current record."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.taken.append(self._again.popleft() if self._again else next(self._lines))
        return self.taken[-1][1]

    def retry(self) -> None:
        """Continue with the line after the first one of the current record."""
        self._again.extendleft(reversed(self.taken[1:]))


def records(
    lines: Iterable[tuple[int, str]], columns: Sequence[str], delimiter: str, quoting: bool
) -> Iterator[Record]:
    """Yield the records of a CSV file. Empty records have no cells.

    A quotation mark that is never closed, or that is closed by a mark in a later row, would join rows. Such a record is
    detected if the text after the mark is malformed, or if one of its lines looks like a separate row. A line looks
    like a separate row if it has one cell per column, and the record either does not, or has a file name with the same
    extension in the same column. Only the lines with misplaced marks are then reported as problems.

    Args:
        lines: The number and the text of each line, with line breaks.
        columns: The names of the columns; empty if the first record contains them.
        delimiter: The character between cells.
        quoting: Whether quotation marks enclose cells.
    """
    source = _Lines(lines)
    reader = csv.reader(
        source, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    )
    num_columns = len(columns)
    while True:
        source.taken = []
        try:
            cells = tuple(next(reader))
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(source.taken[0][0], problem=f"the line is not a row: {error}{_joined(len(source.taken))}")
            source.retry()
            continue
        if num_columns and _is_joined(cells, [text for _, text in source.taken], num_columns, delimiter):
            problem = f"a quotation mark is missing or misplaced{_joined(len(source.taken))}"
            yield Record(source.taken[0][0], problem=problem)
            number, last = source.taken[-1]
            # If the last line has an odd number of marks, one of them closed the record. The line is not read again.
            if last.count('"') % 2:
                source.taken.pop()
                yield Record(number, problem="a quotation mark is misplaced")
            source.retry()
            continue
        num_columns = num_columns or len(cells)
        yield Record(source.taken[-1][0], cells)


def _joined(num_lines: int) -> str:
    return f"; it would join {num_lines} lines, so the other lines are read separately" if num_lines > 1 else ""


def _is_joined(cells: Sequence[str], lines: Sequence[str], num_columns: int, delimiter: str) -> bool:
    """Return whether a record with several lines consists of several rows."""
    for line in lines[1:]:
        try:
            alone = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(alone) == num_columns and (
            len(cells) != num_columns or any(_same_extension(a, b) for a, b in zip(alone, cells, strict=True))
        ):
            return True
    return False


def _same_extension(one: str, other: str) -> bool:
    first, second = _EXTENSION.search(one), _EXTENSION.search(other)
    return first is not None and second is not None and first[0].strip().lower() == second[0].strip().lower()
