"""The rows that importers yield. The same code converts the rows of all importers to samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class RowError(Exception):
    """Raised when a row cannot be imported. The row is skipped, counted by `reason` and listed with `detail`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, self.detail)  # Worker processes send errors to the main process as pickles.


@dataclass(frozen=True)
class Clip:
    """A reference to audio, which is stored in a file, in a part of a file, or in memory."""

    path: str = ""
    """The path to the file, absolute or relative to the folder of the audio. If `data` is set, it is only a name that
    shows the type of the audio."""
    data: bytes | None = None
    """The content of an audio file that was stored within another file; None if the audio is read from `path`."""
    span: tuple[int, int] | None = None
    """The first byte and the number of bytes of an audio file within `path`; None for the whole file."""
    start: float = 0.0
    """The beginning of the part that is used, in seconds."""
    seconds: float | None = None
    """The length of the part that is used, in seconds; None for all audio after `start`."""
    channel: int | None = None
    """The channel that is used, counted from 0; None for all channels."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the audio is used."""
        return self.start == 0 and self.seconds is None and self.channel is None


@dataclass(frozen=True)
class Row:
    """One sample of the data that is imported.

    The fields have the names of the source. They are renamed later, by the option `--map` and by the table of usual
    names (`trainer.importers.fields.ALIASES`). The field `audio` is a path, a Clip, or a list of them.
    """

    where: str
    """The place of the row in the source, for messages: file and line."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: RowError | None = None
    """The reason why the row cannot be imported; None if the importer has not found one."""
