"""Access to the files of a checkpoint by name and byte range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from trainer.files import write_whole


class Folder(Protocol):
    """The files of one checkpoint, including frozen ones that it shares with other checkpoints."""

    @property
    def url(self) -> str:
        """The URL of the checkpoint, which `find_checkpoint` accepts."""
        ...

    def size_bytes(self, name: str) -> int:
        """Return the size of a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        ...

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file, starting at `offset`.

        Raises:
            EOFError: If the file ends before `target` is full.
        """
        ...

    def replace(self, name: str, text: str) -> None:
        """Replace the content of a text file atomically."""
        ...


class LocalFolder:
    """A checkpoint in the file system. The folders of frozen files are next to the checkpoint's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[str, int] = {}

    @property
    def url(self) -> str:
        return str(self.path)

    def locate(self, name: str) -> Path:
        """Return the path to a file."""
        return (self.path.parent if "/" in name else self.path) / name

    def size_bytes(self, name: str) -> int:
        return self.locate(name).stat().st_size

    def handle(self, name: str) -> int:
        """Return a file descriptor for reading, which stays open as long as this object exists."""
        if name not in self._handles:
            self._handles[name] = os.open(self.locate(name), os.O_RDONLY)
        return self._handles[name]

    def replace(self, name: str, text: str) -> None:
        write_whole(self.locate(name), [text.encode()])
        if name in self._handles:
            os.close(self._handles.pop(name))

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        # mmap is not used, since mapped pages count towards the memory of this process.
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
    """Return the content of a UTF-8 file.

    Raises:
        FileNotFoundError: If there is no such file.
        UnicodeDecodeError: If it is not UTF-8.
    """
    content = bytearray(folder.size_bytes(name))
    folder.read_into(name, 0, memoryview(content))
    return content.decode("utf-8")
