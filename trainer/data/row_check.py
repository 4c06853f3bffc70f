"""Checks of the rows of a manifest: of their fields alone, or of their audio files as well."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from model.errors import UserError
from trainer.data.decode import AUDIO_TYPES, check_audio
from trainer.data.errors import SampleError, sample_errors
from trainer.data.manifest import Row
from trainer.data.metadata import check_metadata

_CHECKED_AHEAD = 128
"""The number of rows that are checked in advance. The clips of these rows and of the open shard are held in memory."""

Checked = tuple[list[tuple[str, bytes]], float] | SampleError
"""Either the clips of a row as (type, content) with their total length in seconds, or the reason to skip the row."""


@dataclass(frozen=True)
class SkippedRow:
    """A line of the manifest whose sample is not in the shards, with the reason."""

    line: int
    key: str
    reason: str
    detail: str


class UnusableError(UserError):
    """Raised when too few samples of a manifest can be used."""


def check_fields(manifest: str, rows: Sequence[Row], max_skipped_fraction: float) -> None:
    """Check the fields of a manifest's rows, without reading their audio.

    Args:
        manifest: The manifest, for the error message.
        rows: The rows of one split.
        max_skipped_fraction: The largest fraction of rows that may be skipped.

    Raises:
        UnusableError: If a larger fraction of the rows cannot be used.
    """
    skipped = []
    for row in rows:
        try:
            check_metadata(row.metadata, len(row.audio))
        except SampleError as error:
            skipped.append(SkippedRow(row.line, row.key, error.reason, error.detail))
    check_skipped(manifest, skipped, len(rows), max_skipped_fraction)


def check_skipped(manifest: str, skipped: Sequence[SkippedRow], num_rows: int, max_skipped_fraction: float) -> None:
    """Check that enough of a manifest's rows can be used.

    Args:
        manifest: The manifest, for the error message.
        skipped: The rows that cannot be used.
        num_rows: The number of rows of the split.
        max_skipped_fraction: The largest fraction of rows that may be skipped.

    Raises:
        UnusableError: If a larger fraction of the rows, or every row, cannot be used.
    """
    if len(skipped) <= max_skipped_fraction * num_rows and not 0 < num_rows == len(skipped):
        return
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(s.reason for s in skipped).items()))
    first = {s.reason: s for s in sorted(skipped, key=lambda s: -s.line)}
    examples = "; ".join(f"line {s.line} id {s.key}: {s.detail}" for s in sorted(first.values(), key=lambda s: s.line))
    raise UnusableError(
        f"{manifest}: {len(skipped)} of {num_rows} samples cannot be used ({counts}), more than max_skipped_fraction = "
        f"{max_skipped_fraction}; first of each reason: {examples}; fix the samples or raise the fraction"
    )


def checked_rows(rows: Sequence[Row], num_workers: int) -> Iterator[tuple[Row, Checked]]:
    """Yield the rows in order, each with the result of its check.

    Threads are sufficient, because decoding releases the interpreter's lock.
    """
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        waiting: deque[tuple[Row, Future[Checked]]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(_check, row)))
            if len(waiting) >= _CHECKED_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for row, future in waiting:
            yield row, future.result()


def _check(row: Row) -> Checked:
    try:
        with sample_errors(row.key):
            return _checked_clips(row)
    except SampleError as error:
        return error


def _checked_clips(row: Row) -> tuple[list[tuple[str, bytes]], float]:
    """Return the clips of a row and their total length in seconds.

    Raises:
        SampleError: If the row cannot be used.
        UserError: If an audio file cannot be read.
    """
    if row.error:
        raise row.error
    clips, seconds = [], 0.0
    check_metadata(row.metadata, len(row.audio))
    for path in row.audio:
        extension = path.suffix[1:].lower()
        if extension not in AUDIO_TYPES:
            raise SampleError("wrong_type", f"{path.name}: type must be one of {', '.join(AUDIO_TYPES)}")
        try:
            data = path.read_bytes()
        except OSError as error:  # No sample may be skipped because of a problem with the disk.
            raise UserError(
                f"line {row.line} id {row.key}: {path}: {error.strerror}; rerun the same command to resume"
            ) from None
        seconds += check_audio(data)
        clips.append((extension, data))
    return clips, seconds
