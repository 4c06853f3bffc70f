"""Access to imported files.

Files outside the given folders are read only with `--follow`. A command in place of a path, as in Kaldi's `wav.scp`, is
never run.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from model.errors import UserError
from model.json_text import parse_json
from trainer.importers.csv_table import records
from trainer.importers.row import Row, RowError

MAX_LINE_BYTES = 64 << 20
"""The longest allowed line in a text file, in bytes. Lines may contain audio as base64."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""The error numbers that mean that a file does not exist."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
COMMAND = "is a command, and commands are never run; run it yourself, and specify the path to a file with its output"
"""The end of messages about a command in place of a path."""
URL = "is a URL, and URLs are never fetched; download the file, and specify its path"
"""The end of messages about a URL in place of a path."""


@dataclass(frozen=True)
class Source:
    """The file or folder that is imported."""

    path: Path
    audio_folder: Path | None = None
    """The folder to which paths of audio files are relative; None for the folder of `path`."""
    follow: bool = False
    """Whether audio files outside `folder` and `audio_folder` may be read."""
    columns: tuple[str, ...] = ()
    """The names of the columns of a table without a header."""
    audio_name: str = "audio"
    """The name of the field `audio` in the source."""
    output: Path | None = None
    """The folder to which the import writes. Its files are not part of the source."""

    @cached_property
    def folder(self) -> Path:
        """The folder of the source: `path` itself if it is a folder, and otherwise the folder that contains it."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def base(self) -> Path:
        """The folder to which paths of audio files are relative."""
        return self.audio_folder or self.folder

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The folders whose files may be read without `follow`. Symbolic links in their paths are resolved."""
        return tuple(dict.fromkeys(folder.resolve() for folder in (self.folder, self.base)))

    def audio_file(self, text: str) -> Path:
        """Return the absolute path to an audio file. Symbolic links are resolved.

        Args:
            text: The path as it is written in the source.

        Raises:
            UserError: If the existence of the file cannot be checked because of a disk error or missing permissions.
            RowError: If `text` is a command (`pipe`), a URL (`url`), not a path (`wrong_type`), outside the source
                without `follow` (`outside`), or not an existing regular file (`no_file`).
        """
        check_path_text(text)
        real = self._inside(self.base / text, text)
        if _SURROGATE.search(str(real)):  # A manifest cannot contain this path.
            raise RowError("wrong_type", f"{short(str(real))} is not UTF-8; rename it")
        return real

    def files(self, *patterns: str) -> list[Path]:
        """Return the sorted files in a folder whose names match a pattern, or the source itself if it is a file.

        Raises:
            UserError: If there are no such files.
        """
        if not self.path.is_dir():
            return [self.path]
        found = sorted({p for pattern in patterns for p in self.path.rglob(pattern) if self._is_part(p)})
        if not found:
            raise UserError(f"{self.path}: contains no {' or '.join(patterns)}; check SRC and --from")
        return found

    def walk(self) -> Iterator[Path]:
        """Yield all files below the folder in a fixed order, except hidden files and output of the import."""
        for folder, names, files in os.walk(self.path):
            names[:] = sorted(names)
            yield from (path for path in (Path(folder) / name for name in sorted(files)) if self._is_part(path))

    def open(self, path: Path, decompress: bool = True) -> IO[bytes]:
        """Open a file of the source.

        Args:
            path: The file.
            decompress: Whether the content of `*.gz` is decompressed.

        Raises:
            UserError: If the file cannot be read, or is a link to a file outside the source.
        """
        try:
            if path != self.path:
                self._inside(path, str(path))
            elif not path.is_file():
                raise RowError("no_file", "it is not a file")
            return cast(IO[bytes], gzip.open(path)) if decompress and path.suffix == ".gz" else open(path, "rb")
        except RowError as error:
            raise UserError(f"{path}: cannot be read ({error.detail}); check SRC and --from") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check SRC and --from") from None

    def lines(self, path: Path, keep_empty: bool = False) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the content of each line, without the line break.

        Args:
            path: The file.
            keep_empty: Whether to yield empty lines as well.

        Raises:
            UserError: If the file cannot be read, or a line is too long.
        """
        with self.open(path) as file:
            number = 0
            try:
                while line := file.readline(MAX_LINE_BYTES):
                    number += 1
                    if len(line) == MAX_LINE_BYTES:
                        raise UserError(
                            f"{path}, line {number}: the line is longer than {MAX_LINE_BYTES} bytes; check --from"
                        )
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if keep_empty or line.strip():
                        yield number, line.rstrip(b"\r\n")
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read after line {number} ({error}); copy it again") from None

    def objects(self, path: Path) -> Iterator[Row]:
        """Yield the JSON objects of a file that has one object per line or one array of objects.

        Lines that are not JSON objects become rows with an error.
        """
        for number, line in self.lines(path):
            if number == 1 and line.lstrip()[:1] == b"[":
                yield from self._array(path)
                return
            yield json_row(f"{path.name}:{number}", line)

    def table(self, path: Path, delimiter: str | None = None, quoting: bool = True) -> Iterator[Row]:
        """Yield the rows of a CSV or TSV file as mappings from column names to text. Empty cells are omitted.

        Args:
            path: The file.
            delimiter: The character between cells; None to use the most frequent of tab, comma, semicolon and `|` in
                the first line.
            quoting: Whether quotation marks enclose cells.
        """
        lines = (line for _, line in self.lines(path))
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path}: is empty; check SRC and --from")
        if b"\0" in first:
            raise UserError(f"{path}: is not a text file; check SRC and --from")
        if delimiter is None:
            delimiter = max("\t,;|", key=lambda d: first.count(d.encode()))
        text = (
            (number, line.decode("utf-8", "surrogateescape") + "\n")
            for number, line in self.lines(path, keep_empty=True)
        )
        header = self.columns
        for record in records(text, header, delimiter, quoting):
            where = f"{path.name}:{record.line}"
            if record.problem:
                yield Row(where, error=RowError("wrong_type", record.problem))
            elif record.cells and not header:
                header = _header(path, record.cells)
            elif len(record.cells) > len(header):
                detail = (
                    f"the row has {len(record.cells)} cells, but the table has {len(header)} columns; "
                    f"quote cells that contain {delimiter!r}"
                )
                yield Row(where, error=RowError("wrong_type", detail))
            elif record.cells:
                cells = zip(header, record.cells, strict=False)
                yield Row(where, {name: cell for name, cell in cells if cell.strip()})

    def _is_part(self, path: Path) -> bool:
        """Return whether a file below the folder is neither hidden nor written by this import."""
        hidden = any(part.startswith(".") for part in path.relative_to(self.path).parts)
        return not hidden and (self.output is None or not path.absolute().is_relative_to(self.output))

    def _array(self, path: Path) -> Iterator[Row]:
        with self.open(path) as file:
            try:
                items = parse_json(file.read())
            except (ValueError, OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: is not JSON ({error}); check SRC and --from") from None
        for number, item in enumerate(items):
            where = f"{path.name}[{number}]"
            if isinstance(item, dict):
                yield Row(where, item)
            else:
                yield Row(where, error=RowError("wrong_type", "the element is not a JSON object"))

    def _inside(self, path: Path, text: str) -> Path:
        try:
            real = path.resolve()
        except (ValueError, RuntimeError):  # The name is not allowed, or its links form a loop.
            raise RowError("no_file", f"there is no file {short(text)}") from None
        if not self.follow and not any(real.is_relative_to(root) for root in self.roots):
            raise RowError("outside", f"{short(text)} is outside of {self.roots[0]}; allow it with --follow")
        if not _is_plain_file(real):
            raise RowError("no_file", f"there is no file {short(text)}")
        return real


def _is_plain_file(path: Path) -> bool:
    """Return whether `path` is an existing regular file.

    Raises:
        UserError: If this cannot be checked because of a disk error or missing permissions. This failure is not a
            RowError, because it must stop the import instead of skipping the row.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:  # The name is not allowed.
        return False
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise UserError(
            f"{path}: {error.strerror}; check the disk and permissions, then rerun the same command"
        ) from None


def check_path_text(text: Any) -> None:
    """Check that `text` can be a path. It must not be a command, a URL or empty.

    Raises:
        RowError: If it cannot be a path.
    """
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise RowError("wrong_type", f"audio = {short(text)}, but must be a path")
    if text.rstrip().endswith("|") or text.lstrip().startswith(("|", "pipe:")):
        raise RowError("pipe", f"{short(text)} {COMMAND}")
    if _URL.match(text):
        raise RowError("url", f"{short(text)} {URL}")


def json_row(where: str, line: bytes) -> Row:
    """Return the row that a line of JSON contains."""
    try:
        value = parse_json(line)
    except ValueError as error:
        return Row(where, error=RowError("wrong_type", f"the line is not JSON: {error}"))
    if not isinstance(value, dict):
        return Row(where, error=RowError("wrong_type", "the line is not a JSON object"))
    return Row(where, value)


def short(value: Any) -> str:
    """Return a value as ASCII text with at most 160 characters."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else ascii(value)
    return text if len(text) <= 160 else f"{text[:76]}...{text[-76:]}"


def _header(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    header = tuple(cell.strip() for cell in cells)
    if "" in header or len(set(header)) < len(header):
        raise UserError(
            f"{path}: its columns are {short(list(header))}, but each must have a unique name; "
            "name them with --columns if the first line is not a header"
        )
    return header
