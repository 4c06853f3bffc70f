"""Checks of the types of a sample's fields, for all code that reads samples or predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

ALL = "all"
"""The key of scores over all subsets of a task. A subset therefore cannot have this name."""

TEXT_FIELDS = (
    "task",
    "split",
    "instruction",
    "answer",
    "subset",
    "source",
    "language",
    "target_language",
    "qtype",
    "slot",
)
"""The fields that are text."""
LIST_FIELDS = ("choices", "references")
"""The fields that are lists of strings."""
NUMBER_FIELDS = ("duration",)
"""The fields that are numbers and at least 0."""


def field_problem(fields: Mapping[str, Any]) -> str | None:
    """Return a description of the first field with a wrong type, or None if all fields are valid.

    Fields that are null or absent are valid.

    Args:
        fields: The fields of a line of a manifest, or of a prediction. Fields that this program does not use may have
            any type.
    """
    for name in TEXT_FIELDS:
        if not isinstance(value := fields.get(name), str | None):
            return f"{name} = {_short(value)}, but must be text"
    for name in LIST_FIELDS:
        value = fields.get(name)
        if value is not None and not (isinstance(value, list | tuple) and all(isinstance(t, str) for t in value)):
            return f"{name} = {_short(value)}, but must be a list of texts"
    for name in NUMBER_FIELDS:
        value = fields.get(name)
        if value is not None and not is_amount(value):
            return f"{name} = {_short(value)}, but must be a number, at least 0"
    name = "subset" if fields.get("subset") else "source"
    if fields.get(name) == ALL:
        return f"{name} = '{ALL}', which is the name of the scores over all samples; rename it"
    return None


def is_amount(value: Any) -> TypeGuard[int | float]:
    """Return whether `value` is a finite number that is at least 0. Booleans are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:  # an integer with hundreds of digits
        return False


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
