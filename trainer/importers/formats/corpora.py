"""The corpora Common Voice, FLEURS and GigaSpeech, in the layout in which they are distributed."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.importers.row import Row, RowError
from trainer.importers.source import Source, short

_BLOCK_BYTES = 1 << 20
_MOST_CHARS = 1 << 28
"""The largest number of characters in the description of one recording of GigaSpeech."""
_GAP = re.compile(r"[\s,]*")
_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_NO_SPEECH = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
_FLEURS_COLUMNS = ("sentence_id", "file", "raw_transcription", "transcription", "characters", "num_samples", "gender")


def commonvoice_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one Common Voice table, or of `train.tsv`, `dev.tsv` and `test.tsv` in a folder.

    The name of the folder is the language, unless the table has a column `locale`.
    """
    for path in source.files("train.tsv", "dev.tsv", "test.tsv"):
        clips = path.parent.resolve().relative_to(source.folder.resolve()) / "clips"
        known = {"split": path.stem, "language": path.parent.resolve().name}
        for row in source.table(path, "\t", quoting=False):
            if row.error is not None:
                yield row
                continue
            fields = dict(row.fields)
            name = str(fields.pop("path", ""))
            fields["language"] = fields.pop("locale", None) or known["language"]
            audio = {"audio": str(clips / name), "id": Path(name).stem} if name else {}
            yield Row(row.where, {**known, **fields, "speaker": fields.pop("client_id", None), **audio})


def fleurs_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one FLEURS table, or of the tables in the folder of a language.

    The recordings are in `audio/SPLIT`, in `SPLIT`, or next to the table. The id is the file name, because the id in
    the table identifies the sentence, which several speakers may read.
    """
    for path in source.files("train.tsv", "dev.tsv", "test.tsv"):
        split = path.stem if path.stem in ("train", "dev", "test") else "train"
        folder = path.parent.resolve().relative_to(source.folder.resolve())
        places = [folder / "audio" / split, folder / split, folder]
        for number, line in source.lines(path):
            where = f"{path.name}:{number}"
            try:
                cells = line.decode().split("\t")
            except UnicodeDecodeError:
                yield Row(where, error=RowError("wrong_type", "the line is not UTF-8"))
                continue
            if len(cells) != len(_FLEURS_COLUMNS):
                detail = f"the row has {len(cells)} columns, but FLEURS has {len(_FLEURS_COLUMNS)}"
                yield Row(where, error=RowError("wrong_type", detail))
                continue
            fields: dict[str, Any] = dict(zip(_FLEURS_COLUMNS, cells, strict=True))
            del fields["characters"], fields["num_samples"]
            name = fields.pop("file")
            place = next((p for p in places if _is_audio(source, str(p / name))), places[0])
            yield Row(where, {**fields, "id": Path(name).stem, "audio": str(place / name), "split": split})


def gigaspeech_rows(source: Source) -> Iterator[Row]:
    """Yield the segments of `GigaSpeech.json`, which is read in blocks. Segments without speech are skipped."""
    for path in source.files("*.json"):
        for number, audio in enumerate(_items(source, path, "audios")):
            where = f"{path.name}[{number}]"
            segments = audio.get("segments")
            if not isinstance(segments, list):
                yield Row(where, error=RowError("wrong_type", "the recording has no list of segments"))
                continue
            for segment in segments:
                yield _segment(where, audio, segment)


def _segment(where: str, audio: Mapping[str, Any], segment: Any) -> Row:
    if not isinstance(segment, dict) or not isinstance(segment.get("text_tn"), str):
        return Row(where, error=RowError("wrong_type", f"the segment {short(segment)} must have a text_tn"))
    where = f"{where} {short(str(segment.get('sid')))}"
    text = segment["text_tn"]
    if any(tag in text for tag in _NO_SPEECH):
        return Row(where, error=RowError("no_speech", f"the text of the segment is {short(text)}"))
    for tag, mark in _MARKS.items():
        text = re.sub(rf"\s*{tag}", mark, text)
    subsets = segment.get("subsets")
    names = {str(s).strip("{}").lower() for s in subsets} if isinstance(subsets, list) else set()
    split = next((name for name in ("dev", "test") if name in names), "train")
    fields = {"id": segment.get("sid"), "audio": audio.get("path"), "text": text, "split": split, "language": "en"}
    fields |= {"start": segment.get("begin_time"), "end": segment.get("end_time"), "speaker": segment.get("speaker")}
    return Row(where, {**fields, "title": audio.get("title"), "category": audio.get("category")})


def _items(source: Source, path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of the array `name` of a JSON file, without reading all of it into memory.

    Raises:
        UserError: If the file has no such array, or is damaged.
    """
    decoder, as_text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, is_inside = "", False
    with source.open(path) as file:
        while True:
            # The block size grows with the size of the current object, so that the total time is linear in its size.
            try:
                block = file.read(max(_BLOCK_BYTES, len(text)))
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read ({error}); copy it again") from None
            text += as_text.decode(block, final=not block)
            at = 0
            if not is_inside and (begin := re.search(rf'"{name}"\s*:\s*\[', text)) is not None:
                is_inside, at = True, begin.end()
            while is_inside:
                at = _GAP.match(text, at).end()  # type: ignore[union-attr]
                if text[at : at + 1] == "]":
                    return
                try:
                    value, at = decoder.raw_decode(text, at)
                except (ValueError, RecursionError):
                    break
                if isinstance(value, dict):
                    yield value
            text = text[at:]
            if not block or len(text) > _MOST_CHARS:
                raise UserError(f"{path}: contains no complete array {name} of recordings; check SRC and --from")


def _is_audio(source: Source, text: str) -> bool:
    try:
        source.audio_file(text)
    except RowError:
        return False
    return True
