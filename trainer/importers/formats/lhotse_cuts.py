"""lhotse cuts as JSON lines, and Shar folders. The JSON is read without lhotse, which would run the commands in it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.importers.row import Clip, Row, RowError
from trainer.importers.source import COMMAND, URL, Source, short
from trainer.importers.tar_stream import tar_members
from trainer.scoring.fields import is_amount

_Stored = tuple[str, Clip | RowError | None, float | None]
"""A recording in a Shar tar: its id, its audio or the reason why the audio cannot be read, and its duration in
seconds."""
_TOLERANCE_SEC = 1e-3
"""The largest difference between durations that is attributed to rounding."""
_FIELDS = ("language", "speaker", "gender")


def rows(source: Source) -> Iterator[Row]:
    """Yield the samples of one manifest of cuts, or of all files `*cuts*.jsonl` in a folder.

    A cut with several supervisions becomes one sample per supervision. Any other cut becomes one sample.
    """
    for path in source.files("*cuts*.jsonl", "*cuts*.jsonl.gz"):
        for row in source.objects(path):
            yield from _rows_of_cut(row, None)


def shar_rows(source: Source) -> Iterator[Row]:
    """Yield the samples of a Shar folder: the cuts in `cuts.*.jsonl.gz`, with the audio in `recording.*.tar`."""
    for path in source.files("cuts.*.jsonl", "cuts.*.jsonl.gz"):
        number = path.name.split(".")[1]
        tar = path.with_name(f"recording.{number}.tar")
        if not tar.exists():
            raise UserError(f"{path}: there is no recording.{number}.tar next to it; check SRC")
        recordings = _recordings(source, tar)
        for row in source.objects(path):
            try:
                found = next(recordings, None)
            except RowError as error:
                yield Row(tar.name, error=error)
                break
            if row.error is None and (found is None or found[0] != str(row.fields.get("id"))):
                here = "no recording" if found is None else f"the recording {short(found[0])}"
                yield Row(row.where, error=RowError("no_audio", f"{tar.name} has {here} in the place of this cut"))
                continue
            yield from _rows_of_cut(row, found)


def _rows_of_cut(row: Row, stored: _Stored | None) -> Iterator[Row]:
    """Yield the samples of a cut. If `stored` is given, the audio of the cut is stored in a tar."""
    if row.error is not None:
        yield row
        return
    try:
        audio, start, seconds, whole = _audio(row.fields, stored)
        supervisions = row.fields.get("supervisions") or []
        if not isinstance(supervisions, list) or not all(isinstance(s, dict) for s in supervisions):
            raise RowError("wrong_type", f"supervisions = {short(supervisions)}, but must be a list of objects")
        common = {**_custom(row.fields), "audio": audio}
        if len(supervisions) <= 1:
            cut = {} if whole else {"start": start, "end": start + seconds}
            fields = _supervision(supervisions[0]) if supervisions else {}
            yield Row(row.where, {**common, **fields, "id": row.fields.get("id"), **cut})
            return
        for supervision in supervisions:
            begin, length = _number(supervision, "start"), _number(supervision, "duration")
            cut = {"start": max(0.0, start + begin), "end": start + begin + length}
            fields = {**common, **_supervision(supervision), "id": supervision.get("id"), **cut}
            yield Row(f"{row.where} {short(str(supervision.get('id')))}", fields)
    except RowError as error:
        yield Row(row.where, error=error)


def _audio(cut: Mapping[str, Any], stored: _Stored | None) -> tuple[Clip, float, float, bool]:
    """Return a cut's recording, its start and length in seconds, and whether the cut is the whole recording."""
    if cut.get("type", "MonoCut") != "MonoCut":
        raise RowError("unsupported", f"the cut has the type {short(cut['type'])}; only MonoCut is supported")
    start, seconds = _number(cut, "start"), _number(cut, "duration")
    recording = cut.get("recording")
    if stored is not None:
        _, clip, length = stored
        if clip is None:
            raise RowError("no_audio", "the cut has no recording")
        if isinstance(clip, RowError):
            raise clip
        is_cut = length is None or abs(length - seconds) < _TOLERANCE_SEC
        return clip, 0.0 if is_cut else start, seconds, is_cut
    if not isinstance(recording, dict):
        raise RowError("no_audio", "the cut has no recording")
    if recording.get("transforms"):
        transforms = short(recording["transforms"])
        raise RowError("unsupported", f"the recording has transforms {transforms}; store the transformed audio")
    channel, sources = cut.get("channel", 0), recording.get("sources")
    if not isinstance(sources, list):
        raise RowError("wrong_type", "the recording has no list of sources")
    for item in sources:
        of_source = (item.get("channels") or [channel]) if isinstance(item, dict) else None
        if isinstance(of_source, list) and channel in of_source:
            clip = _of_source(item, of_source.index(channel) if len(of_source) > 1 else None)
            break
    else:
        raise RowError("wrong_type", f"channel {short(channel)} is in no source of the recording")
    length = recording.get("duration")
    is_whole = start == 0 and is_amount(length) and abs(length - seconds) < _TOLERANCE_SEC
    return clip, start, seconds, is_whole


def _of_source(source: Mapping[str, Any], channel: int | None) -> Clip:
    kind, value = source.get("type"), source.get("source")
    if kind == "command":
        raise RowError("pipe", f"{short(value)} {COMMAND}")
    if kind == "url":
        raise RowError("url", f"{short(value)} {URL}")
    if kind == "memory" and isinstance(value, str):
        try:
            return Clip("", data=base64.b64decode(value, validate=True), channel=channel)
        except (binascii.Error, ValueError):
            raise RowError("broken", "the audio is not base64") from None
    if kind != "file" or not isinstance(value, str):
        raise RowError("unsupported", f"the audio has the type {short(kind)}; only file and memory are supported")
    return Clip(value, channel=channel)


def _supervision(supervision: Mapping[str, Any]) -> dict[str, Any]:
    fields = {n: supervision[n] for n in _FIELDS if supervision.get(n) is not None}
    return {**_custom(supervision), **fields, "text": supervision.get("text")}


def _custom(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the custom fields, except those that describe arrays or other recordings."""
    custom = item.get("custom")
    return {k: v for k, v in custom.items() if not isinstance(v, dict)} if isinstance(custom, dict) else {}


def _number(item: Mapping[str, Any], name: str) -> float:
    value = item.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise RowError("wrong_type", f"{name} = {short(value)}, but must be a number of seconds")
    return float(value)


def _recordings(source: Source, path: Path) -> Iterator[_Stored]:
    """Yield the recordings of a Shar tar, each of which is a file with audio followed by a file with its description.

    Raises:
        RowError: If the tar is damaged.
    """
    members = tar_members(source, path, lambda name: not name.endswith((".nodata", ".nometa")))
    for _, name, audio in members:
        _, _, described = next(members, (0, "", b""))
        try:
            value = parse_json(described) if isinstance(described, bytes) and described else {}
        except ValueError as error:
            raise RowError("broken", f"the rest of {path.name} after {short(name)} cannot be read: {error}") from None
        seconds = value.get("duration") if isinstance(value, dict) else None
        place = PurePosixPath(name)
        clip = None if place.suffix == ".nodata" else audio if isinstance(audio, RowError) else Clip(name, data=audio)
        yield str(place.parent / place.stem), clip, seconds if is_amount(seconds) else None
