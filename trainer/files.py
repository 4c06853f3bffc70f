"""Atomic writes of files, with the permissions of the user's umask, and file locks."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".part"
_LEFTOVER = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(_SUFFIX)}$")
"""The end of the names of unfinished files, which other programs are unlikely to use."""
_LEFTOVER_SEC = 3600.0
"""The age at which an unfinished file counts as a leftover of a process that was killed."""


def write_whole(
    path: Path, parts: Iterable[bytes | memoryview], finish: Callable[[Path, Path], object] = os.replace
) -> None:
    """Write a file atomically and sync it to disk.

    After a crash, `path` has either its old or its new content. Several processes may write the same file at once,
    because each writes to a hidden file of its own next to it. Another user who can write to the folder cannot redirect
    the write, because the hidden file must be new.

    Args:
        path: The file.
        parts: The content, in order.
        finish: A function that moves the finished hidden file to `path`. `os.link` keeps an existing file.

    Raises:
        OSError: If the file could not be written. In this case, the hidden file is deleted.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
    # Unlike a file of `tempfile`, the hidden file has the permissions of any other new file of the user.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is created if it is missing and deleted afterwards.

    The kernel releases the lock of a process that was killed. On a file system without locks, the body runs without a
    lock.

    Args:
        path: The file. Its folder must exist.
        wait: Whether to wait if another process holds the lock.

    Returns:
        A context manager that yields True, or False on a file system without locks.

    Raises:
        BlockingIOError: If another process holds the lock and `wait` is false.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            held = False
        if not held or _is_at(descriptor, path):
            break
        os.close(descriptor)  # The process that held the lock has deleted the file.
    try:
        yield held
    finally:
        if held and _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def sweep_leftovers(folder: Path, older_sec: float = _LEFTOVER_SEC) -> None:
    """Delete the unfinished files of `write_whole` that killed processes left in a folder.

    Args:
        folder: The folder, which need not exist.
        older_sec: Only files of at least this age in seconds are deleted, because another process may still be writing
            younger files. Pass 0 if no other process writes to the folder.
    """
    for path in folder.glob(f".*{_SUFFIX}"):
        if not _LEFTOVER.search(path.name):
            continue
        try:
            if path.is_file() and not path.is_symlink() and time.time() - path.lstat().st_mtime >= older_sec:
                path.unlink()
        except FileNotFoundError:
            continue
