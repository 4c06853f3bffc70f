"""Cells of CSV files, which people open in spreadsheet programs."""

from __future__ import annotations

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")
"""The first characters of text that a spreadsheet program may execute as a formula."""


def as_cell(value: object) -> object:
    """Return a value for a cell. Text that a spreadsheet may execute as a formula is preceded by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value
