"""Read manifests, which are JSONL files with one sample per line.

Each line is an object with the fields `id`, `audio`, `task`, `split`, `instruction` and `answer`. `audio` is a path
relative to the manifest's folder, a list of these paths, or null. A conversation has `messages` in place of
`instruction` and `answer`, and its messages may contain blocks with paths of audio files. All other fields are kept.
Samples are sorted by a hash of their id, so that every shard is a random mixture of the samples, regardless of the
order of the manifest.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.conversation import audio_blocks
from model.errors import UserError
from model.json_text import BrokenTextError, parse_json
from trainer.data.errors import SampleError
from trainer.data.metadata import with_last_turn

_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")


@dataclass(frozen=True)
class Row:
    """One line of a manifest."""

    line: int
    key: str
    audio: tuple[Path, ...]
    metadata: dict[str, Any]
    error: SampleError | None = None
    """The reason why the line is malformed; None if it is well-formed."""


def read_manifest(path: Path, split: str | None = None) -> list[Row]:
    """Read the lines of a manifest, sorted in the order in which shards store them.

    Args:
        path: The manifest.
        split: The split to read; None for all. Malformed lines are always included.

    Raises:
        UserError: If the manifest cannot be read, a line is not a JSON object, two lines have the same id, or an audio
            file is missing. The message names the first line with the problem.
    """
    lines: dict[str, int] = {}
    rows = []
    for row in _rows(path):
        # A malformed line may lack its split. It is kept, so that it is counted and listed as skipped.
        if split is not None and row.error is None and row.metadata["split"] != split:
            continue
        if (first := lines.setdefault(row.key, row.line)) != row.line:
            raise UserError(f"{path}, lines {first} and {row.line}: both have id '{row.key}'; make the ids unique")
        rows.append(row)
    missing = [(r, a) for r in rows for a in r.audio if not _is_file(a)]
    if missing:
        row, audio = missing[0]
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"{path}, line {row.line} (id {row.key}): no audio file {_short(audio)}{more}; restore it or delete the "
            "line"
        )
    return sorted(rows, key=lambda r: hashlib.blake2b(r.key.encode(), digest_size=16).digest())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # The name is too long or not allowed.
        return False


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _rows(path: Path) -> Iterator[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: manifest cannot be read ({error.strerror}); check its path and data.root") from None
    # splitlines() would also split at characters that JSON strings may contain.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            yield _row(path, number, line)


def _row(manifest: Path, number: int, line: bytes) -> Row:
    try:
        metadata = parse_json(line)
    except BrokenTextError as error:
        return Row(number, f"line-{number}", (), {}, SampleError("wrong_type", str(error)))
    except ValueError as error:
        raise UserError(f"{manifest}, line {number}: not JSON ({error}); write one JSON object per line") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{manifest}, line {number}: not a JSON object; write one JSON object per line")
    key, audio, split = metadata.get("id"), metadata.get("audio"), metadata.get("split")
    paths = audio if isinstance(audio, list) else [] if audio is None else [audio]
    blocks = audio_blocks(metadata.get("messages"))
    problem = None
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        problem, key = f"id = {ascii(key)[:90]}, but must be 1 to 80 letters, digits, '_' or '-'", f"line-{number}"
    elif not isinstance(split, str) or not split:
        problem = f"split = {ascii(split)[:80]}, but must be a non-empty string"
    elif not all(isinstance(p, str) and p and "\0" not in p for p in paths):
        problem = f"audio = {ascii(audio)[:80]}, but must be a path, a list of paths or null"
    elif any(path is not None for path in blocks):
        if paths:
            problem = "both the field audio and messages name audio files; keep one of them"
        elif not all(isinstance(p, str) and p and "\0" not in p for p in blocks):
            problem = f"audio in messages = {ascii(blocks)[:80]}, but each must be a path"
        paths = blocks
    if problem:
        return Row(number, key, (), metadata, SampleError("wrong_type", problem))
    return Row(number, key, tuple(manifest.parent / p for p in paths), with_last_turn(metadata))
