"""Named objects in a folder or a bucket: what shards are read from and written to, and what checkpoints may use.

A store is opened by URL (`trainer.storage.open`) and is flat: names are paths below it, with '/' between parts.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError


class MissingError(UserError):
    """There is no such object, or no such bucket."""


class ChangedError(UserError):
    """An object is not as long as it must be."""


class UnreachableError(UserError):
    """The store did not answer in all the time that retries may take."""


class Store(Protocol):
    """All methods raise UserError: one line that names URL, what failed, and where credentials came from."""

    @property
    def url(self) -> str:
        """For messages and for identity: two stores with one url hold the same objects."""
        ...

    def get(self, name: str) -> bytes:
        """A whole object. Raises MissingError."""
        ...

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        """`num_bytes` from `offset`. Raises MissingError; ChangedError if the object ends before, or, with
        `total_bytes`, if that is not its whole size."""
        ...

    def size_bytes(self, name: str) -> int:
        """Size of an object. Raises MissingError."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        ...

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write `parts`, end to end, as one object: it appears whole or not at all, and replaces what was there."""
        ...

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Write a small object unless there is one of this name. Of several who try, one succeeds.

        Returns:
            Whether the object holds `content` now.
        """
        ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name → bytes of all objects whose names begin with `prefix`, which is empty or ends with '/'."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; it is no error if there is none."""
        ...


class LocalStore:
    """A folder of the file system; it is made by the first `put`."""

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
        if num_read != num_bytes:  # cut since its size was asked
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

    def _write(self, name: str, parts: Iterable[bytes | memoryview], finish: Callable[[str, Path], None]) -> None:
        path = self.folder / name
        temporary = None
        try:
            self._make_folder(path.parent)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            finish(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._error(name, error) from None
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{folder}: is no folder; choose another place") from None

    def list(self, prefix: str = "") -> dict[str, int]:
        assert not prefix or prefix.endswith("/"), prefix
        # Hidden files are those that `put` has not finished.
        files = (p for p in (self.folder / prefix).rglob("*") if p.is_file() and not p.name.startswith("."))
        found = {}
        for path in sorted(files):
            with suppress(FileNotFoundError):  # somebody has just deleted it
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
    """Memory that is read into again once nothing refers to what was read before: fresh memory costs a page fault for
    every 4 KiB, as much time as the reading itself. For several threads."""

    LEAST_BYTES, KEPT_BYTES = 1 << 20, 64 << 20
    """Of one size at the most so many bytes lie free."""

    def __init__(self) -> None:
        # By size, a power of two: reads differ in length, and whatever lies free of a size fits the next one.
        self._free: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)

    def take(self, num_bytes: int) -> memoryview:
        """`num_bytes` to write to; they are free again when the view and all views of it are gone."""
        size = max(self.LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        try:
            memory = self._free[size].pop()
        except IndexError:
            memory = np.empty(size, dtype=np.uint8)
        owner = memory[:num_bytes]
        # Views of the array keep it alive; when the last is gone, so is the array.
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return owner.data

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        free = self._free[len(memory)]
        if (len(free) + 1) * len(memory) <= self.KEPT_BYTES:
            free.append(memory)


def check_size(where: str, size: int, end: int, total_bytes: int | None) -> None:
    """Raise ChangedError if an object of `size` bytes cannot be read up to `end`, or is not `total_bytes` long."""
    if total_bytes is not None and size != total_bytes:
        raise ChangedError(f"{where}: {size} bytes, its index says {total_bytes}: cut or altered; make it again")
    if size < end:
        raise ChangedError(f"{where}: ends at byte {size}, before {end}: it is cut; copy or make it again")
