"""What commands check of their options before their work, which may take hours."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from model.errors import UserError


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse an option below `least`; None: it was not given.

    Raises:
        UserError: names the option.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_output(what: str, path: Path, *, is_folder: bool = False) -> None:
    """Make sure that the file `path`, or files in the folder `path`, can be written. Folders above may be missing.

    Raises:
        UserError: it cannot; `what` names the path as the user gave it.
    """
    place = path.absolute()
    try:
        if not is_folder:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            place = place.parent
        place = next(p for p in (place, *place.parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}: {place}); choose another path") from None
