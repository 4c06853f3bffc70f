"""Where a checkpoint's files lie, for whoever reads them: by name and byte range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Folder(Protocol):
    """The files of one checkpoint, frozen ones that it shares with others included."""

    @property
    def url(self) -> str:
        """Names the checkpoint, in messages and to find it again."""
        ...

    def size_bytes(self, name: str) -> int:
        """Raises FileNotFoundError if there is none."""
        ...

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) from `offset`. Raises EOFError if the file ends before."""
        ...


class LocalFolder:
    """A checkpoint's folder in the file system; `<folder of frozen files>/<file>` lies beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[str, int] = {}

    @property
    def url(self) -> str:
        return str(self.path)

    def locate(self, name: str) -> Path:
        """Path of a file."""
        return (self.path.parent if "/" in name else self.path) / name

    def size_bytes(self, name: str) -> int:
        return self.locate(name).stat().st_size

    def handle(self, name: str) -> int:
        """File descriptor, open for reading as long as this object lives."""
        if name not in self._handles:
            self._handles[name] = os.open(self.locate(name), os.O_RDONLY)
        return self._handles[name]

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        # Not mmap: pages of a mapping count as this process's memory.
        at = 0
        while at < len(target):
            count = os.preadv(self.handle(name), [target[at:]], offset + at)
            if count == 0:
                raise EOFError(f"{self.locate(name)} ends at byte {offset + at}")
            at += count

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)


def read_text(folder: Folder, name: str) -> str:
    """A whole file, as UTF-8. Raises FileNotFoundError, UnicodeDecodeError."""
    content = bytearray(folder.size_bytes(name))
    folder.read_into(name, 0, memoryview(content))
    return content.decode("utf-8")
