"""NeMo's manifests for speech recognition: JSON lines with `audio_filepath`, `duration`, `text` and `offset`."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.importers.row import Row, RowError
from trainer.importers.source import Source


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one manifest, or of all JSON files in a folder.

    A row with an `offset` is a part of its recording that lasts `duration` seconds. In a row without `offset`, the
    `duration` only describes the file. Rows with `_skipme` are skipped.
    """
    for path in source.files("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz"):
        for row in source.objects(path):
            if row.error is None and row.fields.get("_skipme"):
                row = Row(row.where, error=RowError("skipme", "the manifest marks it as _skipme"))
            yield row
