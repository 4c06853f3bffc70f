"""Data folders in the format of Kaldi and ESPnet: `wav.scp`, `text`, and optionally `segments` and speaker tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.importers.row import Clip, Row, RowError
from trainer.importers.source import COMMAND, Source

_TABLES = {"utt2spk": "speaker", "utt2lang": "language", "text": "text", "utt2gender": "gender"}
"""Name of a table of utterances → the field that it provides."""
_OPTIONS_WITHOUT_VALUE = {
    "sph2pipe": {"-p", "-u", "-a"},
    "flac": {"-d", "-c", "-s", "-dc", "-cd", "-dcs", "-cds", "--decode", "--stdout", "--silent"},
    "cat": set(),
}
_OPTIONS_WITH_VALUE = {"sph2pipe": {"-f": ("wav", "rif"), "-c": ("1", "2")}, "flac": {}, "cat": {}}
"""Program that only decodes a file → its options that take a value → the allowed values."""
_BYTE_HEADER = 64


def rows(source: Source) -> Iterator[Row]:
    """Yield one row per segment, or per recording if the folder has no `segments` file.

    The tables are kept in memory, and need about 500 bytes per utterance.

    Raises:
        UserError: If `wav.scp` is missing, or a line of a table is not UTF-8.
    """
    folder = source.folder
    recordings = dict(_lines(source, folder / "wav.scp"))
    tables = {field: dict(_lines(source, folder / name)) for name, field in _TABLES.items() if (folder / name).exists()}
    genders = dict(_lines(source, folder / "spk2gender")) if (folder / "spk2gender").exists() else {}
    if (folder / "segments").exists():
        parts = _segments(source, folder / "segments")
    else:
        parts = ((key, key, {}, None) for key in recordings)
    for key, recording, cut, error in parts:
        fields: dict[str, Any] = {"id": key, **{name: table.get(key) for name, table in tables.items()}}
        if genders:
            fields["gender"] = fields.get("gender") or genders.get(fields.get("speaker") or "")
        where = f"{folder.name}/{key}"
        try:
            if error is not None:
                raise error
            if recording not in recordings:
                raise RowError("no_file", f"recording {recording} is not in wav.scp")
            clip = recording_clip(recordings[recording], source)
            if clip.channel is not None and (channel := cut.pop("channel", 0)) != 0:
                raise RowError(
                    "wrong_type",
                    f"the segment uses channel {channel} of {recording}, but the entry "
                    "in wav.scp selects one channel; use channel 0",
                )
            yield Row(where, {**fields, "audio": clip, **cut})
        except RowError as problem:
            yield Row(where, error=problem)


def _lines(source: Source, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in source.lines(path):
        try:
            key, _, rest = line.decode().strip().partition(" ") if b"\t" not in line else _by_tab(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: the line is not UTF-8; convert the file") from None
        yield key, rest.strip()


def _by_tab(line: str) -> tuple[str, str, str]:
    key = line.split(maxsplit=1)[0]
    return key, " ", line.strip()[len(key) :]


def _segments(source: Source, path: Path) -> Iterator[tuple[str, str, dict[str, Any], RowError | None]]:
    for key, rest in _lines(source, path):
        words = rest.split()
        try:
            recording, start, end = words[0], float(words[1]), float(words[2])
            if len(words) > 4:
                raise ValueError
            channel = {"channel": int(words[3])} if words[3:] else {}
        except (IndexError, ValueError):
            yield (
                key,
                "",
                {},
                RowError(
                    "wrong_type", f"the segment is given as {rest!r:.80}, but must be RECORDING START END [CHANNEL]"
                ),
            )
            continue
        yield key, recording, {"start": start, **({} if end == -1 else {"end": end}), **channel}, None


def recording_clip(entry: str, source: Source) -> Clip:
    """Return the recording that an entry in `wav.scp` specifies by a path, a command, or a position in an ark file.

    Raises:
        RowError: If the entry is a command that does more than decode one file (`pipe`), or there is no audio at its
            position in an ark file (`wrong_type`).
        UserError: If an ark file cannot be read.
    """
    if entry.endswith("|"):
        return _decoded_file(entry)
    path, colon, place = entry.rpartition(":")
    if colon and path.endswith(".ark") and place.isascii() and place.isdigit() and len(place) < 16:
        return _ark_clip(source, path, int(place))
    return Clip(entry)


def _decoded_file(entry: str) -> Clip:
    """Return the file and the channel that a command decodes. The command is only parsed, and not run."""
    try:
        program, *words = shlex.split(entry.rstrip()[:-1])
    except ValueError:
        program, words = "", []
    program = program.rpartition("/")[2]
    files, channel, at = [], None, 0
    while at < len(words):
        word = words[at]
        values = _OPTIONS_WITH_VALUE.get(program, {}).get(word)
        if values is not None and at + 1 < len(words) and words[at + 1] in values:
            channel = int(words[at + 1]) - 1 if word == "-c" else channel
            at += 1
        elif word not in _OPTIONS_WITHOUT_VALUE.get(program, set()):
            files.append(word)
        at += 1
    wrong = program not in _OPTIONS_WITHOUT_VALUE or len(files) != 1 or files[0].startswith("-")
    if wrong or any(c in entry[:-1] for c in "|;&<>$`\n(){}*?"):
        raise RowError("pipe", f"{entry[:120]!r} {COMMAND}")
    return Clip(files[0], channel=channel)


def _ark_clip(source: Source, path: str, first: int) -> Clip:
    """Return the audio at a position in an ark file.

    At this position, kaldiio writes either a WAV file, or the marker `AUDIO`, the size of an audio file, and the file.
    """
    real = source.audio_file(path)
    try:
        with open(real, "rb") as file:
            file.seek(first)
            head = file.read(_BYTE_HEADER)
    except OSError as error:
        raise UserError(f"{real}: cannot be read ({error.strerror}); rerun the same command to resume") from None
    if head[:4] == b"RIFF" and len(head) >= 8:
        return Clip(path, span=(first, int.from_bytes(head[4:8], "little") + 8))
    if head[:5] == b"AUDIO" and len(head) > 5 and 0 < head[5] <= 8:
        begin = 6 + head[5]
        return Clip(path, span=(first + begin, int.from_bytes(head[6:begin], "little")))
    raise RowError("wrong_type", f"{path}:{first} is not audio, but features or another matrix")
