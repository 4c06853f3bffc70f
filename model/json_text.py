"""Parsing of JSON that other programs may have written. Every defect raises a ValueError."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_SURROGATE = re.compile("[\ud800-\udfff]")


class BrokenTextError(ValueError):
    """Raised when a document has valid syntax, but contains text that cannot be written as UTF-8."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON document.

    Python's parser also accepts NaN, infinities and unpaired surrogates, although JSON or UTF-8 cannot represent them.
    For deeply nested values, it raises RecursionError. This function raises ValueError in all of these cases.

    Args:
        text: The document. Bytes must be UTF-8; a byte order mark is skipped.

    Raises:
        ValueError: If the document is not valid. The message is a one-line reason. The error is a BrokenTextError if
            the syntax is valid, but a string in the document is not.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # An unpaired surrogate can only come from an escape such as \ud800, or from the text itself.
    if ("\\u" in text or _SURROGATE.search(text)) and (broken := _broken_text(value)) is not None:
        raise BrokenTextError(f"{ascii(broken)[:80]} contains half of a surrogate pair, which is not a character")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _broken_text(value: Any) -> str | None:
    """Return a string in `value` that has an unpaired surrogate, or None if there is none."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                return item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
    return None
