"""Import a source.

Rows are converted to samples, several processes prepare the audio, and the samples are written in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.errors import UserError
from trainer.importers.fields import Ids, Naming, to_sample
from trainer.importers.row import Row, RowError
from trainer.importers.sinks import Sink, Totals
from trainer.importers.source import Source
from trainer.importers.splits import draw_for_empty_splits
from trainer.importers.work import Item, outcomes

_CHUNK_ROWS, _MOST_CHUNK_ROWS = 32, 1024
_CHUNK_BYTES = 16 << 20
_FEW_ROWS = 1000
"""The largest number of rows with which an import makes sure that each split of `--divide` gets a recording."""
_CHANGED = "the source has changed since the import began; delete the output, then rerun the same command"


@dataclass(frozen=True)
class ImportReport:
    """The result of an import."""

    totals: Totals
    num_resumed: int
    """The number of rows that an earlier, interrupted import has written."""
    num_changed_ids: int
    """The number of ids that had to be changed. Their samples have the original id in the field `original_id`."""

    @property
    def skipped_fraction(self) -> float:
        """The fraction of the rows that were skipped."""
        return sum(self.totals.skipped.values()) / max(1, self.totals.num_rows)


def run_import(
    rows: Callable[[Source], Iterator[Row]],
    source: Source,
    naming: Naming,
    sink: Sink,
    identity: Mapping[str, Any],
    *,
    jobs: int = 1,
    on_progress: Callable[[int], object] = lambda done: None,
) -> ImportReport:
    """Import the rows of a source.

    Args:
        rows: The function of the importer, which yields the rows.
        source: The file or folder that is imported.
        naming: The names and defaults of fields.
        sink: The output.
        identity: The values that determine the output, as JSON. An unfinished import is resumed only if it has the same
            identity.
        jobs: The number of processes that prepare audio.
        on_progress: A function that is called with the number of rows that are done.

    Raises:
        UserError: If the source cannot be read, the output cannot be written or contains something else, no row can be
            imported, or the rows have changed since the import began.
    """
    ids = Ids()
    sink.begin(identity)
    naming = replace(naming, drawn=_drawn(rows(source), source, naming))
    totals, num_resumed = sink.totals, sink.totals.num_rows
    on_progress(num_resumed)
    items = _after(_items(rows(source), source, naming, ids), num_resumed, totals.digest)
    for done in outcomes(_chunks(items), sink.target, jobs):
        sink.add(done)
        on_progress(totals.num_rows)
    if not totals.num_samples:
        sink.discard()
        raise UserError(f"{source.path}: no row can be imported ({totals.reasons() or 'the source has none'})")
    sink.finish()
    return ImportReport(totals, num_resumed, ids.num_changed)


def _drawn(rows: Iterator[Row], source: Source, naming: Naming) -> dict[str, str]:
    """Return recordings for the splits of `--divide` that would otherwise get none, if the source has few rows."""
    recordings: dict[str, None] = {}
    if not naming.shares:
        return {}
    for number, row in enumerate(rows):
        if number == _FEW_ROWS:  # With more rows, every split is expected to get recordings anyway.
            return {}
        try:
            sample = to_sample(row, number, source, naming, Ids())
        except RowError:
            continue  # The import itself reports this row.
        if sample.recording is not None:
            recordings[sample.recording] = None
    return draw_for_empty_splits(recordings, naming.shares)


def _items(rows: Iterator[Row], source: Source, naming: Naming, ids: Ids) -> Iterator[Item]:
    digest = hashlib.blake2b(digest_size=16)
    for number, row in enumerate(rows):
        sample, error = None, None
        try:
            sample = to_sample(row, number, source, naming, ids)
        except RowError as problem:
            error = problem
        if sample is None:
            text = f"{row.where} {error}"
        else:
            clips = [(c.path, c.span, c.start, c.seconds, c.channel, len(c.data or b"")) for c in sample.clips]
            text = json.dumps([row.where, sample.key, clips, sample.fields], sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        yield Item(row.where, sample, error, digest.hexdigest(), number)


def _after(items: Iterator[Item], num: int, digest: str) -> Iterator[Item]:
    """Yield the items after the first `num`, which must have the given digest.

    Raises:
        UserError: If they have a different digest, or there are fewer items.
    """
    number = 0
    for number, item in enumerate(items, 1):
        if number == num and item.digest != digest:
            raise UserError(_CHANGED)
        if number > num:
            yield item
    if number < num:
        raise UserError(_CHANGED)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists, each of which one process handles.

    Consecutive parts of a recording are in the same list.
    """
    chunk: list[Item] = []
    num_bytes, path = 0, ""
    for item in items:
        clips = item.sample.clips if item.sample is not None else ()
        here = clips[0].path if clips and clips[0].data is None else ""
        is_full = len(chunk) >= _CHUNK_ROWS or num_bytes >= _CHUNK_BYTES
        if is_full and (here != path or not here or len(chunk) >= _MOST_CHUNK_ROWS):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(item)
        num_bytes += sum(len(c.data or b"") for c in clips)
        path = here
    if chunk:
        yield chunk
