"""The exception whose message is written for the user."""

from __future__ import annotations


class UserError(ValueError):
    """An error in the user's input, such as a recipe key, a file or a sample.

    The message is one line that names the key or file, the value, and what to do next. Commands print it without a
    traceback and exit with code 2.
    """


def check_least(section: str, config: object, **least: float) -> None:
    """Check that fields of a recipe section are not below their least legal values. None is always legal.

    Args:
        section: The name of the section, for the message.
        config: The section.
        **least: The least legal value of each field, by the field's name.

    Raises:
        UserError: If a field is below its least legal value.
    """
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:  # NaN is rejected, too
            raise UserError(f"{section}.{name} = {value}: must be at least {lowest:g}")
