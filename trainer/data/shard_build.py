"""Manifest → checked shards, in a folder or a bucket. Same manifest and audio, same bytes.

The index is written last: shards without one are not a set. Until then `building.json` names what is being made, and
each finished shard has a `.part.json` beside it, from which a build that was cut short goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data.decode import AUDIO_TYPES, SampleError, check_audio, check_metadata
from trainer.data.manifest import Row, read_manifest
from trainer.data.shard_writer import ShardWriter, write_index, write_json
from trainer.data.shards import FORMAT_VERSION, INDEX_NAME, Group, Shard, table_name
from trainer.storage.open import open_store
from trainer.storage.store import Store

SKIPPED_NAME = "skipped.jsonl"
_BUILDING_NAME = "building.json"
_CHECKED_AHEAD = 128
"""Rows whose clips are held in memory, beside those of the open shard."""

Checked = tuple[list[tuple[str, bytes]], float] | SampleError
"""Clips as (type, bytes) and their seconds, or why the row cannot be used."""


@dataclass(frozen=True)
class ShardLimits:
    """A shard is full when it has reached either."""

    max_samples: int = 4096
    max_bytes: int = 256 << 20


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

    url: str
    num_samples: int
    num_shards: int
    seconds: float
    skipped: tuple[SkippedRow, ...]
    num_resumed: int = 0
    """Shards that an earlier, unfinished build had left."""

    @property
    def num_skipped_by_reason(self) -> dict[str, int]:
        """Counts of left-out lines."""
        return dict(Counter(s.reason for s in self.skipped))


@dataclass(frozen=True)
class _Part:
    """A finished shard and the rows it was made of."""

    shard: Shard
    end_row: int
    skipped: tuple[SkippedRow, ...]


def build_shards(
    manifest: Path,
    out: str,
    *,
    split: str | None = None,
    limits: ShardLimits = ShardLimits(),  # noqa: B008 (frozen)
    max_skipped_fraction: float = 0.01,
    num_workers: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Check every sample of the manifest's split and write the good ones as shards to `out` (folder or URL).

    What was left out is listed in `out`/skipped.jsonl. A build that was cut short, by a kill or by its store, goes on
    with the first shard that is not there; one that fails for its samples leaves nothing behind.

    Raises:
        UserError: see `read_manifest`; `out` holds something else; more than `max_skipped_fraction` of the lines
            cannot be used; none is left; the store cannot be written.
    """
    rows = read_manifest(manifest, split)
    store = open_store(out)
    digest = source_digest(rows, limits)
    parts = _left_by_earlier(store, digest)
    build = _Build(store, rows, parts, limits, digest, f"{manifest}", max_skipped_fraction)
    try:
        build.run(num_workers, on_progress)
    except UnusableError:
        build.remove()
        raise
    return replace(build.publish(), num_resumed=len(parts))


def source_digest(rows: Sequence[Row], limits: ShardLimits) -> str:
    """Changes with whatever would change the shards: rows, audio files (size, time), limits, format."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {limits.max_samples} {limits.max_bytes}\n".encode())
    for row in rows:
        digest.update(json.dumps(row.metadata, sort_keys=True).encode() + f"\n{row.line}\n".encode())
        for path in row.audio:
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class UnusableError(UserError):
    """Too few of a manifest's samples can be used."""


class _Build:
    """One build: what is finished, the open shard, and what was left out since the last finished one."""

    def __init__(
        self,
        store: Store,
        rows: Sequence[Row],
        parts: Sequence[_Part],
        limits: ShardLimits,
        digest: str,
        manifest: str,
        max_skipped_fraction: float,
    ) -> None:
        self.store, self.rows, self.limits, self.digest = store, rows, limits, digest
        self.manifest, self.max_skipped_fraction = manifest, max_skipped_fraction
        self.parts = list(parts)
        self.skipped = [s for p in parts for s in p.skipped]
        self._writer: ShardWriter | None = None
        self._num_told = len(self.skipped)

    def run(self, num_workers: int, on_progress: Callable[[int, int], None]) -> None:
        done = self.parts[-1].end_row if self.parts else 0
        on_progress(done, len(self.rows))
        for row, checked in _checked(self.rows[done:], num_workers):
            done += 1
            if isinstance(checked, SampleError):
                self.skipped.append(SkippedRow(row.line, row.key, checked.reason, checked.detail))
            else:
                self._add(row, *checked, done)
            on_progress(done, len(self.rows))
        self._check_skipped()
        self._finish_shard(done)

    def publish(self) -> BuildReport:
        """Write the index, and take away what only an unfinished build needs."""
        shards = [p.shard for p in self.parts]
        lines = (json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in self.skipped)
        self.store.put(SKIPPED_NAME, ["".join(lines).encode()])
        write_index(self.store, shards)
        for number in range(len(shards)):
            self.store.delete(_part_name(number))
        self.store.delete(_BUILDING_NAME)
        seconds = sum(g.seconds for s in shards for g in s.groups)
        num_samples = sum(s.num_samples for s in shards)
        return BuildReport(self.store.url, num_samples, len(shards), seconds, tuple(self.skipped))

    def remove(self) -> None:
        """Take away what was written."""
        for number, part in enumerate(self.parts):
            for name in (part.shard.name, table_name(part.shard.name), _part_name(number)):
                self.store.delete(name)
        self.store.delete(_BUILDING_NAME)

    def _add(self, row: Row, clips: list[tuple[str, bytes]], seconds: float, end_row: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self.store, len(self.parts))
        self._writer.add(row.key, clips, row.metadata, seconds)
        full = len(self._writer.entries) >= self.limits.max_samples or self._writer.num_bytes >= self.limits.max_bytes
        if full:
            self._check_skipped()
            self._finish_shard(end_row)

    def _finish_shard(self, end_row: int) -> None:
        if self._writer is None:
            return
        if not self.parts:
            write_json(self.store, _BUILDING_NAME, {"source": self.digest})
        part = _Part(self._writer.finish(), end_row, tuple(self.skipped[self._num_told :]))
        write_json(self.store, _part_name(len(self.parts)), asdict(part))
        self.parts.append(part)
        self._writer, self._num_told = None, len(self.skipped)

    def _check_skipped(self) -> None:
        skipped, num_rows = self.skipped, len(self.rows)
        if len(skipped) > self.max_skipped_fraction * num_rows:
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(s.reason for s in skipped).items()))
            examples = "; ".join(f"line {s.line} id {s.key}: {s.detail}" for s in skipped[:3])
            raise UnusableError(
                f"{self.manifest}: {len(skipped)} of {num_rows} samples cannot be used ({counts}), more than "
                f"max_skipped_fraction = {self.max_skipped_fraction}; first: {examples}; mend them or allow more"
            )
        if num_rows == len(skipped):
            raise UnusableError(f"{self.manifest}: no samples (of the split that was asked for); check the split")


def _left_by_earlier(store: Store, digest: str) -> list[_Part]:
    """The finished shards of an unfinished build of the same. Raises UserError if there is anything else."""
    names = store.list()
    if not names:
        return []
    where = f"{store.url}: exists and is not empty"
    if INDEX_NAME in names:
        raise UserError(f"{where}: it holds {INDEX_NAME}; delete it or choose another place")
    known = json.loads(store.get(_BUILDING_NAME)) if _BUILDING_NAME in names else {}
    if known.get("source") != digest:
        raise UserError(f"{where}, and is no unfinished build of this manifest; delete it or choose another place")
    parts: list[_Part] = []
    while (name := _part_name(len(parts))) in names:
        part = _read_part(json.loads(store.get(name)))
        if names.get(part.shard.name) != part.shard.num_bytes or table_name(part.shard.name) not in names:
            break
        parts.append(part)
    return parts


def _part_name(number: int) -> str:
    return f"shard-{number:06d}.part.json"


def _read_part(value: dict[str, Any]) -> _Part:
    shard = value["shard"]
    groups = tuple(Group(**g) for g in shard.pop("groups"))
    return _Part(Shard(**shard, groups=groups), value["end_row"], tuple(SkippedRow(**s) for s in value["skipped"]))


def _checked(rows: Sequence[Row], num_workers: int) -> Iterator[tuple[Row, Checked]]:
    """The rows in order, each checked; threads suffice, since decoding runs outside the interpreter's lock."""
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        waiting: deque[tuple[Row, Future[Checked]]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(_check, row)))
            if len(waiting) >= _CHECKED_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for row, future in waiting:
            yield row, future.result()


def _check(row: Row) -> Checked:
    clips, seconds = [], 0.0
    try:
        if row.error:
            raise row.error
        check_metadata(row.metadata)
        for path in row.audio:
            extension = path.suffix[1:].lower()
            if extension not in AUDIO_TYPES:
                raise SampleError("wrong_type", f"{path.name}: type must be one of {', '.join(AUDIO_TYPES)}")
            try:
                data = path.read_bytes()
            except OSError as error:  # of the disk, not of the sample: nothing may be left out for it
                raise UserError(f"line {row.line} id {row.key}: {path}: {error.strerror}; try again") from None
            seconds += check_audio(data)
            clips.append((extension, data))
    except SampleError as error:
        return error
    return clips, seconds
