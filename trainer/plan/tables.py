"""Aligned text tables, and the formatting of numbers."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with the first column aligned left and the others aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def ranks_text(ranks: Sequence[int]) -> str:
    """Return sorted ranks as text such as `3`, `0-7` or `0,2,4`."""
    if len(ranks) == 1:
        return str(ranks[0])
    contiguous = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if contiguous else ",".join(map(str, ranks))


def count_text(number: float) -> str:
    """Return a count as text such as `70.55 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(int(number))


def bytes_text(number: float) -> str:
    """Return a number of bytes as text such as `4.26 GiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{int(number)} B"


def gib(number: float) -> str:
    """Return bytes as a number of GiB without the unit, such as `54.0` or `0.0049`."""
    return f"{number / 2**30:.1f}" if number >= 0.1 * 2**30 else f"{number / 2**30:.2g}"
