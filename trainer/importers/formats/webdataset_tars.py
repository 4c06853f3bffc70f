"""WebDataset tars from other programs. The webdataset library groups their files into samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.data.decode import AUDIO_TYPES
from trainer.importers.row import Clip, Row, RowError
from trainer.importers.source import Source, short
from trainer.importers.tar_stream import tar_members

_OTHER_AUDIO = ("m4a", "mp4", "aac", "webm", "mka", "wma", "amr", "3gp", "sph", "aiff", "aif", "au", "caf", "w64")
_TEXT_TYPES = ("txt", "text", "transcript", "lab")
_READ_TYPES = (*AUDIO_TYPES, *_OTHER_AUDIO, "json", "cls", *_TEXT_TYPES)
_IGNORED = re.compile(r"__[^/]*__($|/)")
"""Matches the names of metadata about a whole tar, which the webdataset library ignores."""
_TWICE = ".~twice"
"""The suffix that marks the second of two files with the same name, so that no file replaces another."""


def rows(source: Source) -> Iterator[Row]:
    """Yield the samples in one tar, or in all tars in a folder.

    A sample may have audio, `.json` with its fields, `.txt` with its text, and `.cls` with its label. No data is
    unpickled.

    Raises:
        UserError: If the webdataset library is not installed.
    """
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise UserError("--from webdataset needs the package webdataset; pip install 'earshot[import]'") from None
    for path in source.files("*.tar", "*.tar.gz", "*.tgz"):
        try:
            for sample in group_by_keys(_members(tar_members(source, path, _is_read))):
                yield _row(f"{path.name}/{short(sample['__key__'])}", sample)
        except RowError as error:
            yield Row(path.name, error=error)


def _members(members: Iterable[tuple[int, str, bytes | RowError]]) -> Iterator[dict[str, Any]]:
    names: set[str] = set()
    key, number = "", 0
    try:
        for part, name, content in members:
            if part != number:
                yield {}  # A sample cannot continue in the next tar.
                key, number = "", part
            folder, slash, base = name.removeprefix("./").rpartition("/")
            if base.startswith("._") or _IGNORED.match(name):  # Names of macOS companion files begin with "._".
                continue
            stem, _, extension = base.partition(".")
            if folder + slash + stem != key:
                key, names = folder + slash + stem, set()
            if extension.lower() in names:
                extension += _TWICE
            names.add(extension.lower())
            yield {"fname": f"{key}.{extension}", "data": content, "__url__": ""}
    except RowError as error:
        lost = f"; the last sample {short(key)} may lack files, so it is skipped as well" if key else ""
        raise RowError(error.reason, error.detail + lost) from None


def _is_read(name: str) -> bool:
    return _kind(name.lower()) in _READ_TYPES


def _row(where: str, sample: Mapping[str, Any]) -> Row:
    try:
        return Row(where, _fields(sample))
    except RowError as error:
        return Row(where, error=error)


def _fields(sample: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: data for name, data in sample.items() if not name.startswith("__")}
    if twice := next((name for name in files if name.endswith(_TWICE)), None):
        raise RowError("ambiguous", f"there are two files {sample['__key__']}.{twice.removesuffix(_TWICE)}")
    if problem := next((data for data in files.values() if isinstance(data, RowError)), None):
        raise problem
    fields: dict[str, Any] = {"id": sample["__key__"]}
    texts = [name for name in files if _kind(name) in ("json", "cls", *_TEXT_TYPES)]
    if deep := next((name for name in texts if "." in name), None):
        raise RowError(
            "ambiguous", f"the name of a file ends in .{deep}, so it is not clear where the sample's name ends"
        )
    for name in texts:
        try:
            text = files[name].decode("utf-8-sig")
            value = parse_json(text) if name == "json" else text.strip()
        except ValueError as error:
            raise RowError("wrong_type", f"{name}: {error}") from None
        if name != "json":
            fields["label" if name == "cls" else "text"] = value
        elif isinstance(value, dict):
            fields |= {k: v for k, v in value.items() if k != "audio"}
        else:
            raise RowError("wrong_type", "the .json file is not a JSON object")
    clips = [Clip(f"{sample['__key__']}.{name}", data=files[name]) for name in _ordered(files)]
    return {**fields, "audio": clips} if clips else fields


def _ordered(files: Mapping[str, bytes]) -> list[str]:
    """Return the names of the audio files in the order of their numbers. A single file need not have a number."""
    names = [name for name in files if _kind(name) in (*AUDIO_TYPES, *_OTHER_AUDIO)]
    stems = [name.rpartition(".")[0] for name in names]
    if len(names) == 1 and not stems[0]:
        return names
    if names and not all(s.isascii() and s.isdigit() and len(s) < 7 for s in stems):
        raise RowError("ambiguous", f"the audio files are {', '.join(names[:8])}; name clips as in KEY.0.flac")
    numbers = [int(s) for s in stems]
    if sorted(numbers) not in (list(range(len(names))), list(range(1, len(names) + 1))):
        raise RowError("ambiguous", f"the audio files are {', '.join(names[:8])}; number clips from 0")
    return [name for _, name in sorted(zip(numbers, names, strict=True))]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
