"""Parquet files in the format of the datasets library and the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.importers.row import Clip, Row
from trainer.importers.source import Source

_BATCH_ROWS = 32
_SPLIT = re.compile(r"(train|validation|dev|test)[-_.]")


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one file, or of all Parquet files in a folder.

    If the name of a file begins with a split, such as `train`, its rows have this split. An audio column is a struct of
    `bytes` and `path`. A number in a ClassLabel column is replaced by the class name.
    """
    read = file_rows(source)
    for path in source.files("*.parquet"):
        split = _SPLIT.match(path.name)
        known = {"split": "dev" if split[1] == "validation" else split[1]} if split else {}
        for row in read(path):
            yield row if row.error else Row(row.where, {**known, **row.fields})


def file_rows(source: Source) -> Callable[[Path], Iterator[Row]]:
    """Return a function that yields the rows of a Parquet file.

    That function raises a UserError if pyarrow is not installed or the file cannot be read.
    """

    def read(path: Path) -> Iterator[Row]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(f"{path}: needs the package pyarrow; pip install 'earshot[import]'") from None
        try:
            with source.open(path) as handle, pq.ParquetFile(handle) as file:
                labels = _labels(file.schema_arrow.metadata or {})
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS):
                    for item in batch.to_pylist():
                        yield Row(f"{path.name}:{number}", _fields(item, labels, source.audio_name))
                        number += 1
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0][:200]})") from None

    return read


def _labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes of each ClassLabel column."""
    try:
        features = parse_json(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: [str(n) for n in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _fields(item: Mapping[str, Any], labels: Mapping[str, list[str]], audio_name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    audio = []
    for name, value in item.items():
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            audio.append((name, value))
        elif name in labels and isinstance(value, int):  # The datasets library stores -1 for an unknown label.
            fields[name] = labels[name][value] if 0 <= value < len(labels[name]) else None
        else:
            fields[name] = value
    chosen = [value for name, value in audio if name == audio_name] or [value for _, value in audio]
    clips = [
        v["path"] if v["bytes"] is None else Clip(str(v["path"] or ""), data=v["bytes"])
        for v in chosen
        if v["bytes"] is not None or v["path"] is not None
    ]
    if clips:
        fields[audio_name] = clips
    return fields
