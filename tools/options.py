"""Command-line options that several tools share, and checks of options before a command starts hours of work."""

from __future__ import annotations

import argparse
import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.plugins import load_plugins
from trainer.storage.open import scheme_of

_REMEDIES = {
    errno.ENOSPC: "free space, then rerun the same command",
    errno.EDQUOT: "free space or ask for a larger quota, then rerun the same command",
    errno.EROFS: "choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n), then rerun the same command",
    errno.ENFILE: "the machine has too many open files; close programs, then rerun the same command",
}


class AddToTables(argparse.Action):
    """The action of an option that adds entries to tables, such as the tasks, while the command line is parsed.

    Args:
        add: A function of the option's values, which may raise a UserError.
        arguments: The arguments of `argparse.Action`.
    """

    def __init__(self, *, add: Callable[[list[str]], object], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._add = add

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        names = [values] if isinstance(values, str) else [str(value) for value in values or ()]
        setattr(namespace, self.dest, names)
        try:
            self._add(names)
        except UserError as error:
            parser.exit(2, f"error: {error}\n")


def _declare_tasks(recipes: Sequence[str]) -> None:
    from trainer.config.load import load_recipe

    for recipe in recipes:
        load_recipe(recipe)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add the options `--plugins` and `--tasks-of`, for commands that read data but no recipe."""
    parser.add_argument(
        "--plugins",
        nargs="+",
        action=AddToTables,
        add=load_plugins,
        default=[],
        metavar="NAME",
        help="plug-ins that add tasks",
    )
    parser.add_argument(
        "--tasks-of",
        action=AddToTables,
        add=_declare_tasks,
        metavar="RECIPE",
        help="recipe (a name or a file) that declares tasks",
    )


def check_at_least(least: int, **options: int | None) -> None:
    """Check that options are at least `least`.

    Args:
        least: The smallest allowed value.
        options: The values by name, with underscores for hyphens; None for an option that was not given.

    Raises:
        UserError: If a value is smaller.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_model(place: str | Path) -> None:
    """Check that the folder of a run, a checkpoint or an export exists. A place in a bucket is not checked.

    Commands call this function before they import modules, which takes seconds.

    Raises:
        UserError: If there is no such folder.
    """
    if not scheme_of(str(place)) and not Path(place).is_dir():
        raise UserError(f"{place}: no such folder; use the folder of a run, a checkpoint or an export")


@contextmanager
def plain_faults(out: object) -> Iterator[None]:
    """Convert errors of the machine that the user can fix to one-line errors.

    Args:
        out: The path that the command writes, for errors that contain no path.

    Raises:
        UserError: If the disk is full or read-only, a quota is exceeded, or too many files are open.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = error.filename or out
        raise UserError(f"{where}: {error.strerror}; {_REMEDIES[error.errno]}") from None


def check_output(what: str, path: Path, *, is_folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written. Parent folders need not exist.

    Args:
        what: The path, possibly with the name of its option, for the error message.
        path: The file or folder.
        is_folder: True if `path` is a folder.

    Raises:
        UserError: If `path` cannot be written.
    """
    folder = path.absolute()
    try:
        if not is_folder:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = folder.parent
        folder = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}: {folder}); choose another path") from None
