"""Read tar files in one pass, without loading a whole tar. The tars may be compressed or concatenated.

tarfile stops without an error at a damaged header and at the first end mark. `tar_members` reports a damaged header,
and continues after an end mark.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from model.errors import UserError
from trainer.importers.audio import MAX_FILE_BYTES
from trainer.importers.row import RowError
from trainer.importers.source import Source, short

_BLOCK_BYTES = tarfile.BLOCKSIZE
_KEPT_BYTES = 2 * _BLOCK_BYTES
_SKIPPED_BYTES = 1 << 20


def tar_members(
    source: Source, path: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[int, str, bytes | RowError]]:
    """Yield the files of a tar, or of several concatenated ones.

    Args:
        source: The file or folder that is imported.
        path: The tar, which may be compressed with gzip, bzip2 or xz.
        wanted: A function that returns whether the content of a file with the given name is needed.

    Yields:
        The number of the tar among the concatenated tars, the name of the file, and its content. The content is empty
        if it is not wanted. If the file is a link, a sparse or special file, or larger than `MAX_FILE_BYTES`, an error
        takes the place of the content.

    Raises:
        RowError: If the rest of the tar is damaged, or the tar does not end with an end mark (`broken`).
        UserError: If the tar cannot be read from the disk.
    """
    part, last = 0, ""
    with source.open(path, decompress=False) as stream:
        try:
            file = _Forward(_decompressed(stream))
            while True:
                with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
                    while (info := tar.next()) is not None:
                        if info.size < 0:
                            raise tarfile.ReadError(f"damaged header at byte {info.offset}")
                        if not info.isdir():
                            yield part, info.name, _content(file, info) if wanted(info.name) else b""
                        last = f" after {short(info.name)}"
                        tar.members = []  # type: ignore[attr-defined]
                    end = tar.offset
                if not _has_next(file, end):
                    return
                part += 1
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"{path}: {error.strerror}; rerun the same command to resume") from None
            raise _broken(path, last, error) from None
        except (zlib.error, lzma.LZMAError) as error:
            raise _broken(path, last, error) from None


class _Forward:
    """A stream that is read in one pass. Only seeking forward, or a short distance back, is possible."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = b""
        """The bytes that were read last from the stream, at most `_KEPT_BYTES`."""
        self._end = 0
        """The number of bytes that were read from the stream."""
        self._place = 0

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES:  # The size may come from a damaged header of a long name.
            raise tarfile.ReadError(f"damaged header before byte {self._place}")
        back = self._end - self._place
        known = self._last[len(self._last) - back :][:size]
        new = self._stream.read(size - len(known))
        self._last = (self._last + new[-_KEPT_BYTES:])[-_KEPT_BYTES:]
        self._end += len(new)
        self._place += len(known) + len(new)
        return known + new

    def seek(self, place: int) -> None:
        """Seek to a position, or to the end of the stream if the stream ends before it."""
        if place < self._end - len(self._last):
            raise tarfile.ReadError(f"damaged header before byte {self._place}")
        self._place = min(place, self._end)
        while self._place < place and self.read(min(place - self._place, _SKIPPED_BYTES)):
            pass


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    head = stream.read(10)
    stream.seek(0)
    if head.startswith(b"\x1f\x8b\x08"):
        return cast(IO[bytes], gzip.open(stream))
    if head.startswith(b"BZh") and head[4:] == b"1AY&SY":
        return cast(IO[bytes], bz2.open(stream))
    if head.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")):
        return cast(IO[bytes], lzma.open(stream))
    return stream


def _content(file: _Forward, info: tarfile.TarInfo) -> bytes | RowError:
    if info.issym() or info.islnk():
        return RowError("wrong_type", f"{short(info.name)} is a link; store the file itself")
    if not info.isreg() or info.issparse():
        return RowError("wrong_type", f"{short(info.name)} is not a plain file")
    if info.size > MAX_FILE_BYTES:
        return RowError("too_long", f"{short(info.name)} has {info.size} bytes, but the limit is {MAX_FILE_BYTES}")
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError(f"{len(data)} of {info.size} bytes of {info.name}")
    return data


def _has_next(file: _Forward, end: int) -> bool:
    """Return whether another tar follows the one that ends at byte `end`, and seek to it.

    Raises:
        tarfile.ReadError: If there is no end mark.
    """
    file.seek(end)
    if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise tarfile.ReadError(f"damaged header, or no end mark, at byte {end}")
    while block := file.read(_BLOCK_BYTES):
        if block.strip(b"\0"):
            file.seek(file.tell() - len(block))
            return True
    return False


def _broken(path: Path, last: str, error: Exception) -> RowError:
    return RowError("broken", f"the rest of {path.name}{last} cannot be read: {short(str(error))}")
