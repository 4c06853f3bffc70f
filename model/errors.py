"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a recipe key, a file, a sample.

    The message is one line that names the key or file, the value and the remedy. Command-line entry points print it
    and exit with code 2; they print no traceback.
    """


def check_least(section: str, config: object, **least: float) -> None:
    """Raise UserError for the first of these fields of a recipe's `section` that is below its least legal value.

    A field that is None is left to its owner.
    """
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:  # NaN is refused, too
            raise UserError(f"{section}.{name} = {value}: must be at least {lowest:g}")
