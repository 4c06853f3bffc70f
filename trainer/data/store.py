"""Where shards lie. A store reads whole objects and byte ranges by name; nothing else of the pipeline knows paths."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from model.errors import UserError


class Store(Protocol):
    """A flat folder of named objects."""

    @property
    def url(self) -> str:
        """For messages and for identity: two stores with one url hold the same objects."""
        ...

    def size_bytes(self, name: str) -> int:
        """Size of an object; UserError if there is none."""
        ...

    def read(self, name: str) -> bytes:
        """A whole object; UserError if there is none."""
        ...

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` from `offset`; UserError if the object ends before."""
        ...


class LocalStore:
    """A folder of the file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def url(self) -> str:
        return str(self.folder)

    def size_bytes(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise UserError(
                f"{self.folder / name}: {error.strerror}; check the path or make the shards again"
            ) from None

    def read(self, name: str) -> bytes:
        return self.read_range(name, 0, self.size_bytes(name))

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                file.seek(offset)
                data = file.read(num_bytes)
        except OSError as error:
            raise UserError(
                f"{self.folder / name}: {error.strerror}; check the path or make the shards again"
            ) from None
        if len(data) != num_bytes:
            raise UserError(
                f"{self.folder / name}: ends at byte {offset + len(data)}, before {offset + num_bytes}: "
                "the shard is cut; make or copy it again"
            )
        return data
