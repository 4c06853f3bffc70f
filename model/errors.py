"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe key, a file, a sample.

    The message is one line that names the key or file, the value and the remedy. Command-line entry points print it
    and exit with code 2; they print no traceback.
    """
