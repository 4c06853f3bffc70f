"""Reading of manifests, which are JSONL files with one sample per line.

Each line is an object with `id`, `audio` (a path relative to the manifest's folder, a list of such paths, or null),
`task`, `split`, `instruction` and `answer`. All other fields are kept. Samples are sorted by a hash of their id, so
that every shard is a random mixture of the samples, regardless of the order of the manifest.
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
        path: the manifest.
        split: the split to read; None for all. Malformed lines are always included.

    Raises:
        UserError: If the manifest cannot be read, a line is not a JSON object, two lines have the same id, or an audio
            file is missing.
    """
    rows = _rows(path)
    # A malformed line may lack its split. It is kept, so that it is counted and listed as skipped.
    rows = [r for r in rows if split is None or r.error or r.metadata["split"] == split]
    lines: dict[str, int] = {}
    for row in rows:
        if (first := lines.setdefault(row.key, row.line)) != row.line:
            raise UserError(f"{path}, lines {first} and {row.line}: both have id '{row.key}'; make the ids unique")
    missing = [(r, a) for r in rows for a in r.audio if not a.is_file()]
    if missing:
        row, audio = missing[0]
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"{path}, line {row.line} (id {row.key}): no audio file {audio}{more}; restore it or delete the line"
        )
    return sorted(rows, key=lambda r: hashlib.blake2b(r.key.encode(), digest_size=16).digest())


def _rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: manifest cannot be read ({reason}); check its path and data.root") from None
    # Not splitlines(), which also splits at U+2028 and other characters that JSON strings may contain.
    return [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _row(manifest: Path, number: int, line: str) -> Row:
    try:
        metadata = json.loads(line)
    except ValueError as error:
        raise UserError(f"{manifest}, line {number}: not JSON ({error}); write one JSON object per line") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{manifest}, line {number}: not a JSON object; write one JSON object per line")
    key, audio, split = metadata.get("id"), metadata.get("audio"), metadata.get("split")
    paths = audio if isinstance(audio, list) else [] if audio is None else [audio]
    problem = None
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        problem, key = f"id = {key!r}, but must be 1 to 80 letters, digits, '_' or '-'", f"line-{number}"
    elif not isinstance(split, str) or not split:
        problem = f"split = {split!r}, but must be a non-empty string"
    elif not all(isinstance(p, str) and p for p in paths):
        problem = f"audio = {audio!r}, but must be a path, a list of paths or null"
    if problem:
        return Row(number, key, (), metadata, SampleError("wrong_type", problem))
    return Row(number, key, tuple(manifest.parent / p for p in paths), metadata)
