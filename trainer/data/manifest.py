"""Manifest (JSONL in the kit's format) → checked shards.

Each line is an object with `id`, `audio` (a path relative to the manifest's folder, a list of them, or null), `task`,
`split`, `instruction`, `answer`; all other fields travel along. Samples are stored in the order of a hash of their id,
so that a shard is a fair mixture whatever the manifest's order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.decode import AUDIO_TYPES, SampleError, check_audio, check_metadata
from trainer.data.shards import ShardSetWriter

SKIPPED_NAME = "skipped.jsonl"
MAX_SHARD_SAMPLES = 4096
MAX_SHARD_BYTES = 256 << 20
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")
_CHUNK_ROWS = 128


@dataclass(frozen=True)
class SkippedRow:
    """A manifest line that is not in the shards, and why."""

    line: int
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class BuildReport:
    """What `build_shards` wrote."""

    folder: str
    num_samples: int
    num_shards: int
    seconds: float
    skipped: tuple[SkippedRow, ...]

    @property
    def num_skipped_by_reason(self) -> dict[str, int]:
        """Counts of left-out lines."""
        return dict(Counter(s.reason for s in self.skipped))


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


def build_shards(
    manifest: Path,
    out: Path,
    *,
    split: str | None = None,
    max_shard_samples: int = MAX_SHARD_SAMPLES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_skipped_fraction: float = 0.01,
    num_workers: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Check every sample of the manifest's split and write the good ones as shards into `out`, in one move.

    `out` appears complete or not at all. What was left out is listed in `out`/skipped.jsonl. Same manifest and audio:
    same bytes. If `out` appears meanwhile (another process made it), that one stays.

    Raises:
        UserError: see `read_manifest`; `out` exists and is not an empty folder; more than `max_skipped_fraction` of
            the lines cannot be used; none is left.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; delete it or choose another folder")
    rows = read_manifest(manifest, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    temporary.chmod(0o755)
    writer = ShardSetWriter(temporary, max_shard_samples, max_shard_bytes)
    try:
        total, skipped = _write_rows(writer, rows, num_workers, on_progress)
        _check_skipped(manifest, split, rows, skipped, max_skipped_fraction)
        num_shards = writer.finish()
        lines = "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in skipped)
        (temporary / SKIPPED_NAME).write_text(lines, encoding="utf-8")
        try:
            os.rename(temporary, out)
        except OSError:
            if not out.is_dir():
                raise
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return BuildReport(str(out), len(rows) - len(skipped), num_shards, total, tuple(skipped))


def _write_rows(
    writer: ShardSetWriter, rows: Sequence[Row], num_workers: int, on_progress: Callable[[int, int], None]
) -> tuple[float, list[SkippedRow]]:
    total, skipped = 0.0, []
    for done, (row, checked) in enumerate(_checked(rows, num_workers), 1):
        if isinstance(checked, SampleError):
            skipped.append(SkippedRow(row.line, row.key, checked.reason, checked.detail))
        else:
            clips, seconds = checked
            writer.add(row.key, clips, row.metadata, seconds)
            total += seconds
        on_progress(done, len(rows))
    return total, skipped


def _check_skipped(
    manifest: Path, split: str | None, rows: Sequence[Row], skipped: Sequence[SkippedRow], fraction: float
) -> None:
    if len(skipped) > fraction * len(rows):
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(s.reason for s in skipped).items()))
        examples = "; ".join(f"line {s.line} id {s.key}: {s.detail}" for s in skipped[:3])
        raise UserError(
            f"{manifest}: {len(skipped)} of {len(rows)} samples cannot be used ({counts}), more than "
            f"max_skipped_fraction = {fraction}; first: {examples}; mend them or raise the fraction"
        )
    if len(rows) == len(skipped):
        raise UserError(f"{manifest}: no samples" + (f" of split '{split}'" if split else "") + "; check the split")


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


def _checked(
    rows: Sequence[Row], num_workers: int
) -> Iterator[tuple[Row, tuple[list[tuple[str, bytes]], float] | SampleError]]:
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(rows), _CHUNK_ROWS):  # bounds the memory: a chunk's clips are held at once
            chunk = rows[start : start + _CHUNK_ROWS]
            yield from zip(chunk, pool.map(_check, chunk), strict=True)


def _check(row: Row) -> tuple[list[tuple[str, bytes]], float] | SampleError:
    clips, seconds = [], 0.0
    try:
        if row.error:
            raise row.error
        check_metadata(row.metadata)
        for path in row.audio:
            extension = path.suffix[1:].lower()
            if extension not in AUDIO_TYPES:
                raise SampleError("wrong_type", f"{path.name}: type must be one of {', '.join(AUDIO_TYPES)}")
            data = path.read_bytes()
            seconds += check_audio(data)
            clips.append((extension, data))
    except SampleError as error:
        return error
    return clips, seconds
