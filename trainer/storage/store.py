"""Stores of named objects, in a folder or a bucket, for shards and checkpoints.

A store is opened by URL (`trainer.storage.open`). The name of an object is a path relative to the store, with '/' as
separator.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from trainer.files import write_whole


class MissingError(UserError):
    """Raised when an object or a bucket does not exist."""


class ChangedError(UserError):
    """Raised when an object differs from what was expected, for example in its size."""


class UnreachableError(UserError):
    """Raised when the store has not answered within the time for retries."""


class Store(Protocol):
    """The interface of a store.

    Every method that accesses the store may raise UserError. The message contains the URL, what failed, and, for a
    bucket, the origin of the credentials.
    """

    @property
    def url(self) -> str:
        """The URL or path of the store. Two stores with the same `url` contain the same objects."""
        ...

    def get(self, name: str) -> bytes:
        """Return the content of an object.

        Raises:
            MissingError: If there is no such object.
        """
        ...

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        """Return a byte range of an object.

        Args:
            name: The name of the object.
            offset: The first byte of the range.
            num_bytes: The length of the range.
            total_bytes: The expected size of the whole object; None if unknown.

        Raises:
            MissingError: If there is no such object.
            ChangedError: If the object ends before the range does, or its size is not `total_bytes`.
        """
        ...

    def size_bytes(self, name: str) -> int:
        """Return the size of an object.

        Raises:
            MissingError: If there is no such object.
        """
        ...

    def exists(self, name: str) -> bool:
        """Return whether there is an object with this name."""
        ...

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write an object whose content is the concatenation of `parts`.

        The write is atomic. An existing object of the same name is replaced.
        """
        ...

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Write a small object unless an object with this name exists.

        If several processes try at once, only one succeeds.

        Returns:
            Whether the object with this name now has this `content`.
        """
        ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """List objects by name.

        Args:
            prefix: The beginning of the names to list. It is empty for all objects, and must end with '/' otherwise.

        Returns:
            The size in bytes of each object by name, sorted by name.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete an object. Do nothing if it does not exist."""
        ...


class LocalStore:
    """A `Store` in a folder of the file system. The first `put` creates the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._buffers = _Buffers()

    @property
    def url(self) -> str:
        return str(self.folder)

    def get(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise self._error(name, error) from None

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                check_size(f"{self.url}/{name}", size, offset + num_bytes, total_bytes)
                data = self._buffers.take(num_bytes)
                num_read = os.preadv(file.fileno(), [data], offset)
        except OSError as error:
            raise self._error(name, error) from None
        if num_read != num_bytes:  # The file was truncated after its size was read.
            check_size(f"{self.url}/{name}", offset + num_read, offset + num_bytes, None)
        return data.toreadonly()

    def size_bytes(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise self._error(name, error) from None

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        self._write(name, parts, os.replace)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        try:
            self._write(name, [content], os.link)
        except FileExistsError:
            return self.exists(name) and self.get(name) == content
        return True

    def _write(self, name: str, parts: Iterable[bytes | memoryview], finish: Callable[[Path, Path], object]) -> None:
        path = self.folder / name
        try:
            self._make_folder(path.parent)
            write_whole(path, parts, finish)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._error(name, error) from None

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{folder}: is a file, not a folder; choose another path") from None

    def list(self, prefix: str = "") -> dict[str, int]:
        assert not prefix or prefix.endswith("/"), prefix
        # Hidden files belong to a `put` that has not finished.
        files = (p for p in (self.folder / prefix).rglob("*") if p.is_file() and not p.name.startswith("."))
        found = {}
        for path in sorted(files):
            with suppress(FileNotFoundError):  # The file may have been deleted since the folder was listed.
                found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def delete(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise self._error(name, error) from None

    def _error(self, name: str, error: OSError) -> UserError:
        kind = MissingError if isinstance(error, FileNotFoundError | NotADirectoryError) else UserError
        return kind(f"{self.folder / name}: {error.strerror}; check the path and its permissions")


class _Buffers:
    """A thread-safe pool of read buffers. A buffer is reused when no view of it exists anymore.

    Newly allocated memory causes a page fault for every 4 KiB, and the page faults take as long as reading the data.
    """

    LEAST_BYTES = 1 << 20
    """The size of the smallest buffer."""
    KEPT_BYTES = 64 << 20
    """The largest total size of unused buffers that are kept for each buffer size, in bytes."""

    def __init__(self) -> None:
        # Sizes are rounded up to powers of two, so that reads of different lengths can reuse a buffer.
        self._free: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)

    def take(self, num_bytes: int) -> memoryview:
        """Return a writable view of `num_bytes` bytes.

        The buffer returns to the pool when this view and all views derived from it have been deleted.
        """
        size = max(self.LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        try:
            memory = self._free[size].pop()
        except IndexError:
            memory = np.empty(size, dtype=np.uint8)
        owner = memory[:num_bytes]
        # Views keep the array alive, so the finalizer runs when the last of them is deleted.
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return owner.data

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        free = self._free[len(memory)]
        if (len(free) + 1) * len(memory) <= self.KEPT_BYTES:
            free.append(memory)


def check_size(where: str, size: int, end: int, total_bytes: int | None) -> None:
    """Check that an object has the expected size and contains all bytes before `end`.

    Args:
        where: The URL of the object, for the message.
        size: The size of the object in bytes.
        end: The byte after the last one to be read.
        total_bytes: The expected size of the object; None if unknown.

    Raises:
        ChangedError: If the object is shorter than `end`, or its size is not `total_bytes`.
    """
    if total_bytes is not None and size != total_bytes:
        raise ChangedError(f"{where}: has {size} bytes, but its index says {total_bytes}; copy or make it again")
    if size < end:
        raise ChangedError(f"{where}: is truncated at byte {size}, but {end} bytes are needed; copy or make it again")
