"""Convert an importer's rows to the fields of a manifest, including names, types, defaults and ids."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from model.json_text import parse_json
from trainer.data.errors import SampleError
from trainer.data.metadata import check_metadata, with_last_turn
from trainer.importers.row import Clip, Row, RowError
from trainer.importers.source import Source, short
from trainer.importers.splits import recording_of, split_of
from trainer.scoring.fields import LIST_FIELDS, NUMBER_FIELDS, TEXT_FIELDS, is_amount

ALIASES: dict[str, tuple[str, ...]] = {
    "audio": ("audio_filepath", "audio_path", "audios", "wav", "sound", "path", "file", "file_name", "filename"),
    "answer": ("text", "transcript", "transcription", "sentence", "txt", "normalized_text", "target", "response"),
    "id": ("utt_id", "utt", "key", "uid"),
    "instruction": ("question", "prompt", "query"),
    "language": ("lang", "locale"),
    "start": ("offset", "begin", "start_time", "begin_time"),
    "end": ("end_time",),
}
"""Field of the manifest → its common names in other formats. If a row lacks the field, the first of these names that
occurs in the row is used."""
TRANSCRIPT_NAMES = ("text", "transcript", "transcription", "sentence", "txt", "normalized_text")
"""The names of the answer that imply that it is a transcript. A row without a task then gets the task `asr`."""
DEFAULT_INSTRUCTION = "Transcribe the speech."
"""The instruction for samples of the task `asr` that have no instruction."""
MAX_CUT_SEC = 1e7
_UNSAFE = re.compile(r"[^A-Za-z0-9_\-]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_ID_CHARS, _SHORT_ID_CHARS = 80, 64
_OF_MESSAGES = ("instruction", "answer")
"""The fields that a sample with `messages` does not need."""
_LIBRARY_FIELDS = ("original_id",)


@dataclass(frozen=True)
class Naming:
    """The names and defaults of fields that the user has chosen."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Field of the manifest → its name in the source (`--map`)."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Field of the manifest → its value in rows that lack the field (`--set`)."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Split → the fraction that it gets of the recordings without a split (`--divide`)."""
    drawn: Mapping[str, str] = field(default_factory=dict)
    """Recording → its split, for recordings that are assigned to splits that would otherwise get none."""


@dataclass(frozen=True)
class Sample:
    """A row with the fields of a manifest. Its audio has not been read yet."""

    where: str
    key: str
    """The unique id, which contains only allowed characters."""
    clips: tuple[Clip, ...]
    """The clips; their paths are absolute."""
    fields: dict[str, Any]
    """The fields of the manifest except `id` and `audio`."""
    recording: str | None = None
    """A text that identifies the recording and determines its split; None if the source states the split."""


class Ids:
    """The set of assigned ids, which prevents duplicates. Each id uses about 65 bytes of memory."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.num_changed = 0

    def take(self, original: str, number: int) -> str:
        """Return a unique id that contains only characters that keys may have.

        Args:
            original: The id in the source.
            number: The number of the row in the source. It makes the ids of two rows with the same original id
                different.
        """
        safe = _UNSAFE.sub("-", original).strip("-")
        if safe != original or len(safe) > _MAX_ID_CHARS:
            safe = f"{safe[:_SHORT_ID_CHARS]}-{_digest(original)}".lstrip("-")
        begin, attempt = safe[:_SHORT_ID_CHARS], 0
        while not self._add(safe):
            safe = f"{begin}-{_digest(f'{number} {original}' + '+' * attempt)}"
            attempt += 1
        return safe

    def _add(self, key: str) -> bool:
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        if number in self._seen:
            return False
        self._seen.add(number)
        return True


def to_sample(row: Row, number: int, source: Source, naming: Naming, ids: Ids) -> Sample:
    """Return the sample of a row.

    Args:
        row: The row.
        number: The number of the row in the source.
        source: The source, which resolves the paths of audio files.
        naming: The user's names and defaults.
        ids: The ids that have been assigned.

    Raises:
        RowError: If the row cannot be imported.
    """
    if row.error is not None:
        raise row.error
    recording = None
    try:
        fields, is_transcript = _named(row.fields, naming)
        clips = _clips(fields, source)
        fields = {name: value for name, value in ((n, plain(v)) for n, v in fields.items()) if value is not None}
        original = fields.pop("id", None)
        _set_types(fields)
        _set_defaults(fields, naming, is_transcript, row)
        if "split" not in fields:
            recording = recording_of(clips[0], source) if clips and naming.shares else str(original or number)
            fields["split"] = naming.drawn.get(recording) or split_of(recording, naming.shares)
        _check_text(fields)
        check_metadata(with_last_turn(fields), len(clips))
    except SampleError as error:
        remedy = f"; specify its column with --map audio=NAME ({_names(row)})" if error.reason == "no_audio" else ""
        raise RowError(error.reason, error.detail + remedy) from None
    except RecursionError:
        raise RowError("wrong_type", "the fields are nested too deeply") from None
    if original is None:
        return Sample(row.where, ids.take(_default_id(clips, number), number), clips, fields, recording)
    original = str(original)
    if _SURROGATE.search(original):
        raise RowError("wrong_type", f"id = {short(original)}, but must be UTF-8")
    key = ids.take(original, number)
    if key != original:
        ids.num_changed += 1
        fields = {**fields, "original_id": original}
    return Sample(row.where, key, clips, fields, recording)


def plain(value: Any) -> Any:
    """Convert a value to JSON types. Values that JSON cannot represent (bytes, NaN, infinite numbers) become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return plain(float(value))
    return None


def _named(fields: Mapping[str, Any], naming: Naming) -> tuple[dict[str, Any], bool]:
    """Return the fields under their names in a manifest, and whether the answer is known to be a transcript."""
    # A field that the user maps is read only from the mapped column, even if the source has a column with its own name.
    used = {*naming.names, *naming.names.values(), *_LIBRARY_FIELDS}
    named = {k: v for k, v in fields.items() if v is not None and k not in used}
    named |= {new: fields[old] for new, old in naming.names.items() if fields.get(old) is not None}
    answer_from = naming.names.get("answer", "answer")
    for new, others in ALIASES.items():
        if new in named or new in naming.names or (new in _OF_MESSAGES and "messages" in named):
            continue
        # `--map file=file` keeps a field under its own name.
        old = next((name for name in others if name in named and naming.names.get(name) != name), None)
        if old is not None:
            named[new] = named.pop(old)
            if new == "answer":
                answer_from = old
    return named, answer_from in TRANSCRIPT_NAMES


def _clips(fields: dict[str, Any], source: Source) -> tuple[Clip, ...]:
    """Remove the audio and its start, end and channel from the fields, and return the clips with absolute paths."""
    value = fields.pop("audio", None)
    start, end, channel = (_number(fields.pop(name, None), name) for name in ("start", "end", "channel"))
    items = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if start is None and end is None and channel is None:
        cut = None
    elif len(items) > 1:
        raise RowError(
            "wrong_type", f"the row has {len(items)} audio files, but start, end and channel need a single one"
        )
    else:
        start = start or 0.0
        length = _number(fields.get("duration"), "duration") if end is None else end - start
        if length is not None and length <= 0:
            raise RowError("empty", f"the part from {start:g} s has a length of {length:g} s, which must be positive")
        if channel is not None and channel != int(channel):
            raise RowError("wrong_type", f"channel = {channel}, but must be a whole number")
        seconds = length if start or end is not None or channel is None else None
        cut = (start, seconds, None if channel is None else int(channel))
    return tuple(_clip(item, cut, source) for item in items)


def _clip(item: Any, cut: tuple[float, float | None, int | None] | None, source: Source) -> Clip:
    clip = item if isinstance(item, Clip) else Clip(item)
    if clip.data is None:
        clip = replace(clip, path=str(source.audio_file(clip.path)))
    if cut is not None:
        clip = replace(clip, start=cut[0], seconds=cut[1], channel=clip.channel if cut[2] is None else cut[2])
    return clip


def _number(value: Any, name: str) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError("wrong_type", f"{name} = {short(value)}, but must be a number") from None
    if value is None:
        return None
    if not is_amount(value) or value > MAX_CUT_SEC:
        raise RowError("wrong_type", f"{name} = {short(value)}, but must be a number from 0 to {MAX_CUT_SEC:g}")
    return float(value)


def _set_types(fields: dict[str, Any]) -> None:
    """Convert strings to numbers and lists in the fields that require them, and numbers to strings in text fields."""
    for name in NUMBER_FIELDS:
        if isinstance(fields.get(name), str):
            fields[name] = _number(fields[name], name)
    for name in LIST_FIELDS:
        if isinstance(value := fields.get(name), str):
            try:
                fields[name] = parse_json(value)
            except ValueError:
                detail = f'{name} = {short(value)}, but must be a JSON list such as ["a", "b"]'
                raise RowError("wrong_type", detail) from None
    for name in TEXT_FIELDS:
        if isinstance(value := fields.get(name), int | float) and not isinstance(value, bool):
            fields[name] = str(value)


def _set_defaults(fields: dict[str, Any], naming: Naming, is_transcript: bool, row: Row) -> None:
    has_messages = "messages" in fields
    for name, value in naming.defaults.items():
        if not (has_messages and name in _OF_MESSAGES):
            fields.setdefault(name, value)
    if is_transcript:
        fields.setdefault("task", "asr")
    if not has_messages and "answer" not in fields:
        given = "" if "task" in fields else ", and add --set task=asr for transcripts"
        raise RowError(
            "empty_answer", f"answer is missing; specify its column with --map answer=NAME{given} ({_names(row)})"
        )
    if "task" not in fields:
        raise RowError("wrong_type", "task is missing; set it with --set task=asr or another task, or --map task=NAME")
    if has_messages:
        return
    if fields["task"] == "asr":
        fields.setdefault("instruction", DEFAULT_INSTRUCTION)
    if "instruction" not in fields:
        raise RowError("wrong_type", 'instruction is missing; set it with --set "instruction=TEXT" or --map')


def _names(row: Row) -> str:
    """Return the names of a row's fields."""
    return f"the row has {short(', '.join(map(str, row.fields)))}"


def _check_text(value: Any) -> None:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise RowError("wrong_type", f"{short(value)} is not UTF-8")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _default_id(clips: tuple[Clip, ...], number: int) -> str:
    """Return an id for a row that has none.

    The id consists of the name and the start of the row's first clip, or of the row's number if the clip has no name.
    """
    if not clips or not clips[0].path:
        return f"row-{number:08d}"
    start = f"-{round(clips[0].start * 1000):08d}" if clips[0].start else ""
    return (_UNSAFE.sub("-", PurePosixPath(clips[0].path).stem).strip("-") or "row")[:_SHORT_ID_CHARS] + start


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
