"""Manifest: JSONL in the kit's format.

Each line is an object with `id`, `audio` (a path relative to the manifest's folder, a list of them, or null), `task`,
`split`, `instruction`, `answer`; all other fields travel along. Samples are stored in the order of a hash of their id,
so that a shard is a fair mixture whatever the manifest's order.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.decode import SampleError

_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")


@dataclass(frozen=True)
class Row:
    """One line of a manifest; `error` if it is malformed."""

    line: int
    key: str
    audio: tuple[Path, ...]
    metadata: dict[str, Any]
    error: SampleError | None = None


def read_manifest(path: Path, split: str | None = None) -> list[Row]:
    """The lines of `split` (null: all), in the order in which they are stored.

    Raises:
        UserError: no such manifest, a line that is no JSON object, two lines with one id, an audio file that is not
            there.
    """
    rows = _rows(path)
    # A line without a legal split belongs to none: it is kept, so that it is reported.
    rows = [r for r in rows if split is None or r.error or r.metadata["split"] == split]
    lines: dict[str, int] = {}
    for row in rows:
        if (first := lines.setdefault(row.key, row.line)) != row.line:
            raise UserError(f"{path}, lines {first} and {row.line}: both have id '{row.key}'; ids must be unique")
    missing = [(r, a) for r in rows for a in r.audio if not a.is_file()]
    if missing:
        row, audio = missing[0]
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"{path}, line {row.line} (id {row.key}): no audio file {audio}{more}; restore it or drop the line"
        )
    return sorted(rows, key=lambda r: hashlib.blake2b(r.key.encode(), digest_size=16).digest())


def _rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: manifest cannot be read ({reason}); check data.root and the set's path") from None
    # Not splitlines(): JSON text may hold U+2028 and other characters that it takes for line ends.
    return [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _row(manifest: Path, number: int, line: str) -> Row:
    try:
        metadata = json.loads(line)
    except ValueError as error:
        raise UserError(f"{manifest}, line {number}: not JSON ({error}); one object per line") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{manifest}, line {number}: not a JSON object; one object per line")
    key, audio, split = metadata.get("id"), metadata.get("audio"), metadata.get("split")
    paths = audio if isinstance(audio, list) else [] if audio is None else [audio]
    problem = None
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        problem, key = f"id = {key!r} must be 1 to 80 letters, digits, '_' or '-'", f"line-{number}"
    elif not isinstance(split, str) or not split:
        problem = f"split = {split!r} must be text"
    elif not all(isinstance(p, str) and p for p in paths):
        problem = f"audio = {audio!r} must be a path, a list of paths or null"
    if problem:
        return Row(number, key, (), metadata, SampleError("wrong_type", problem))
    return Row(number, key, tuple(manifest.parent / p for p in paths), metadata)
