"""Rectangles of a tensor that is viewed as a matrix [rows, cols].

The first dimension of the tensor is the rows, and all other dimensions together are the columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rect(NamedTuple):
    """A rectangle of a tensor's matrix: `rows` rows starting at `row`, and `cols` columns starting at `col`."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """The number of elements in the rectangle."""
        return self.rows * self.cols

    def overlap(self, other: Rect) -> Rect | None:
        """Return the intersection of two rectangles, or None if it is empty."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Rect(row, col, rows, cols) if rows > 0 and cols > 0 else None

    def within(self, outer: Rect) -> tuple[slice, slice]:
        """Return the slices that select this rectangle from a matrix with the elements of the rectangle `outer`."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.rows), slice(col, col + self.cols)


def matrix_of(shape: Sequence[int]) -> Rect:
    """Return the rectangle that covers a whole tensor of shape `shape`."""
    rows = shape[0] if shape else 1
    return Rect(0, 0, rows, math.prod(shape[1:]))


def rects_of_range(box: Rect, start: int, stop: int) -> Iterator[tuple[int, Rect]]:
    """Split a range of elements of `box` into at most three rectangles.

    Args:
        box: The rectangle that contains the range. Its elements are numbered row by row.
        start: The number of the first element in the range.
        stop: The number of the last element in the range, plus 1.

    Yields:
        Pairs of an offset and a rectangle. The offset is the number of elements in the range before the rectangle.
    """
    assert 0 <= start <= stop <= box.numel, (box, start, stop)
    at = start
    while at < stop:
        row, col = divmod(at, box.cols)
        if col or stop - at < box.cols:
            rect = Rect(box.row + row, box.col + col, 1, min(box.cols - col, stop - at))
        else:
            rect = Rect(box.row + row, box.col, (stop - at) // box.cols, box.cols)
        yield at - start, rect
        at += rect.numel
