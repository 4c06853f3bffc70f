"""CSV and TSV files, with a header or with the columns that the user names."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.importers.row import Row
from trainer.importers.source import Source


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one file, or of all CSV and TSV files in a folder.

    In TSV files, quotation marks are ordinary characters.
    """
    for path in source.files("*.csv", "*.tsv", "*.csv.gz", "*.tsv.gz"):
        is_tsv = ".tsv" in path.suffixes
        yield from source.table(path, "\t" if is_tsv else None, quoting=not is_tsv)
