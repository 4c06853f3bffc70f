"""Folders of audio in the layout of the datasets library, with a metadata file or with one folder per label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.decode import AUDIO_TYPES
from trainer.importers.formats import parquet
from trainer.importers.row import Row
from trainer.importers.source import Source

_SPLITS = {"train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev"}
_SPLITS |= {"test": "test", "testing": "test", "eval": "test"}
_OTHER_TYPES = ("m4a", "mp4", "aac", "webm", "mka", "wma", "amr", "3gp", "sph", "aiff", "aif", "au", "caf", "w64")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def rows(source: Source) -> Iterator[Row]:
    """Yield one row for each row of the metadata files, or for each audio file if there are no metadata files.

    Paths in a metadata file are relative to its folder. Without metadata, the answer of a file is the name of its
    folder. A folder with a name such as `train` or `validation` determines the split.
    """
    metadata = [path for path in source.walk() if path.name in _METADATA]
    for path in metadata:
        folder = path.parent.relative_to(source.folder)
        reader = {".csv": source.table, ".jsonl": source.objects, ".parquet": parquet.file_rows(source)}[path.suffix]
        for row in reader(path):
            yield row if row.error else Row(row.where, {**_split(folder), **_with_audio(row.fields, folder)})
    if not metadata:
        for path in source.walk():
            if path.suffix[1:].lower() in (*AUDIO_TYPES, *_OTHER_TYPES):
                yield _of_file(path.relative_to(source.folder))


def _of_file(path: Path) -> Row:
    fields: dict[str, Any] = {"id": str(path.with_suffix("")), "audio": str(path), **_split(path.parent)}
    if path.parent.name and path.parent.name.lower() not in _SPLITS:
        fields["answer"] = path.parent.name
    return Row(str(path), fields)


def _with_audio(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields, with `audio` instead of `file_name`, `*_file_name` and `*_file_names`."""
    rest, audio = {}, []
    for name, value in fields.items():
        if name == "file_name" or name.endswith(("_file_name", "_file_names")):
            audio += value if isinstance(value, list) else [value]
        else:
            rest[name] = value
    placed = [str(PurePosixPath(folder) / item) if isinstance(item, str) else item for item in audio]
    return {**rest, "audio": placed} if placed else rest


def _split(folder: Path) -> dict[str, str]:
    found = [_SPLITS[part.lower()] for part in folder.parts if part.lower() in _SPLITS]
    return {"split": found[0]} if found else {}
