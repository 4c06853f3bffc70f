"""WeNet's data lists: JSON lines with `key`, `wav` and `txt`, or tars with the same names."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.importers.formats import webdataset_tars
from trainer.importers.row import Row
from trainer.importers.source import Source


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of a `data.list` of the type `raw`, or the samples in a tar or a folder of tars."""
    if source.path.is_dir() or source.path.name.endswith((".tar", ".tar.gz", ".tgz")):
        yield from webdataset_tars.rows(source)
    else:
        yield from source.objects(source.path)
