"""The exception for user errors, and functions that remove credentials and control characters from text."""

from __future__ import annotations

import re
import unicodedata

_CREDENTIALS = re.compile(r"(://)[^/\s@]+@")
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""The Unicode categories of control characters, unpaired surrogates, and line and paragraph separators."""
_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""The characters that change the direction of the text after them."""


def without_credentials(text: str) -> str:
    """Return `text` with `***` in place of the credentials in its URLs."""
    return _CREDENTIALS.sub(r"\1***@", text)


def has_credentials(text: str) -> bool:
    """Return whether `text` contains a URL with a user name or a password."""
    return _CREDENTIALS.search(text) is not None


def printable(text: str) -> str:
    """Return `text` as one line that cannot control a terminal. Control characters are escaped as in Python."""
    if text.isprintable():  # Control characters and characters that change the direction are not printable.
        return text
    return "".join(_escaped(char) for char in text)


def printable_lines(text: str) -> str:
    """Return `text` with all control characters except line breaks escaped."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(char: str) -> str:
    if unicodedata.category(char) in _CONTROLS or char in _DIRECTIONS:
        return char.encode("unicode_escape", "surrogatepass").decode("ascii")
    return char


class UserError(ValueError):
    """An error in the user's input, such as a recipe key, a file or a sample.

    The message is one line with the key or file, the value, and a remedy. Commands print it without a traceback and
    exit with code 2. Credentials in URLs are masked, and control characters, which may come from data, are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(without_credentials(str(message))))


def check_least(section: str, config: object, **least: float) -> None:
    """Check that fields of a recipe section are not below their smallest valid values. None is always valid.

    Args:
        section: The name of the section, for the message.
        config: The section.
        **least: The smallest valid value of each field, by the field's name.

    Raises:
        UserError: If a field is below its smallest valid value.
    """
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:  # This condition also rejects NaN.
            raise UserError(f"{section}.{name} = {value}: must be at least {lowest:g}")
