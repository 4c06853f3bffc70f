"""Build shards from a manifest, in a folder or a bucket.

Every sample is checked. The same manifest and audio files always give the same bytes. The index is written last,
because shards without an index are not readable as a dataset. Until then, `building.json` identifies the build, and
each finished shard has a `.part.json` next to it, from which an interrupted build resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.data.errors import SampleError
from trainer.data.manifest import Row, read_manifest
from trainer.data.row_check import SkippedRow, UnusableError, check_skipped, checked_rows
from trainer.data.shard_writer import ShardWriter, write_index, write_json
from trainer.data.shards import FORMAT_VERSION, INDEX_NAME, Shard, read_shard, table_name
from trainer.files import locked, sweep_leftovers
from trainer.storage.open import open_store
from trainer.storage.store import LocalStore, Store

SKIPPED_NAME = "skipped.jsonl"
_BUILDING_NAME = "building.json"
_LOCK_NAME = ".building.lock"


@dataclass(frozen=True)
class ShardLimits:
    """The size limits of a shard. A shard is full when it has reached one of the limits."""

    max_samples: int = 4096
    max_bytes: int = 256 << 20


@dataclass(frozen=True)
class BuildReport:
    """The result of `build_shards`."""

    url: str
    num_samples: int
    num_shards: int
    seconds: float
    skipped: tuple[SkippedRow, ...]
    num_resumed: int = 0
    """The number of shards that were finished by an earlier, interrupted build."""

    @property
    def num_skipped_by_reason(self) -> dict[str, int]:
        """The number of skipped lines by reason."""
        return dict(Counter(s.reason for s in self.skipped))


@dataclass(frozen=True)
class _Part:
    """A finished shard, and the number of manifest rows that have been processed up to its end."""

    shard: Shard
    end_row: int
    """The number of rows in this and all earlier shards, including skipped rows."""
    skipped: tuple[SkippedRow, ...]
    """The rows that were skipped since the previous shard."""


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
    """Check every sample of a manifest and write the usable ones as shards.

    Skipped samples are listed in `out`/skipped.jsonl. If a build is interrupted, for example because the store failed,
    the same call resumes it at the first missing shard. If too many samples are unusable, the files in a folder are
    deleted, while files in a bucket remain as an unfinished build.

    Args:
        manifest: The manifest.
        out: The folder or URL for the shards; it must be empty or contain an interrupted build of the same shards.
        split: The split to read; None for all.
        limits: The size limits of a shard.
        max_skipped_fraction: The largest fraction of samples that may be skipped.
        num_workers: The number of threads that check samples in parallel.
        on_progress: A function that is called with (rows done, rows in total).

    Raises:
        UserError: If the manifest is unusable (see `read_manifest`), `out` contains other files, too many samples are
            skipped, no sample is usable, or the store cannot be written.
    """
    rows = read_manifest(manifest, split)
    store = open_store(out)
    digest = source_digest(rows, limits)
    with _alone(store) as alone:
        parts = _finished_parts(store, digest)
        _claim(store, digest)
        build = _Build(store, rows, parts, limits, digest, f"{manifest}", max_skipped_fraction)
        try:
            build.run(num_workers, on_progress)
        except UnusableError:
            if alone:
                build.remove()
            raise
        return replace(build.publish(), num_resumed=len(parts))


@contextmanager
def _alone(store: Store) -> Iterator[bool]:
    """Wait until no other process builds shards in the same folder, and delete temporary files of killed processes.

    Returns:
        A context manager that yields whether this process is certainly the only builder. The value is false for a
        bucket, where several builds of the same shards may run at once. They write the same bytes, but none of them may
        delete files.
    """
    if not isinstance(store, LocalStore):
        yield False
        return
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with locked(store.folder / _LOCK_NAME) as held:
            if held:
                sweep_leftovers(store.folder, older_sec=0)
            yield held
    except FileExistsError:
        raise UserError(f"{store.folder}: is a file, not a folder; choose another path") from None
    except OSError as error:
        raise UserError(f"{store.folder}: {error.strerror}; check the path and its permissions") from None


def _claim(store: Store, digest: str) -> None:
    """Mark the store with the digest of the shards that are built in it, so that no build of other shards begins there.

    Raises:
        UserError: If other shards are being built there, or have been finished in the meantime.
    """
    if not store.put_if_absent(_BUILDING_NAME, json.dumps({"source": digest}).encode()):
        raise UserError(f"{store.url}: another build is writing other shards there; choose another path")
    if store.exists(INDEX_NAME):
        store.delete(_BUILDING_NAME)
        raise UserError(f"{store.url}: contains finished shards ({INDEX_NAME}); delete them or choose another path")


def source_digest(rows: Sequence[Row], limits: ShardLimits) -> str:
    """Return a hash of everything that determines the shards.

    The hash covers the rows, the sizes and modification times of the audio files, the limits, and the format version.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {limits.max_samples} {limits.max_bytes}\n".encode())
    for row in rows:
        digest.update(json.dumps(row.metadata, sort_keys=True).encode() + f"\n{row.line}\n".encode())
        for path in row.audio:
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Build:
    """The state of one build: its finished shards, the open shard, and the skipped rows."""

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
        self._num_recorded = len(self.skipped)
        """The number of skipped rows that are recorded in finished parts."""

    def run(self, num_workers: int, on_progress: Callable[[int, int], None]) -> None:
        """Check the remaining rows and write their shards.

        Raises:
            UnusableError: If too many samples are skipped.
            UserError: If an audio file cannot be read or the store cannot be written.
        """
        done = self.parts[-1].end_row if self.parts else 0
        on_progress(done, len(self.rows))
        for row, checked in checked_rows(self.rows[done:], num_workers):
            done += 1
            if isinstance(checked, SampleError):
                self.skipped.append(SkippedRow(row.line, row.key, checked.reason, checked.detail))
            else:
                self._add(row, *checked, done)
            on_progress(done, len(self.rows))
        self._check_skipped()
        self._finish_shard(done)

    def publish(self) -> BuildReport:
        """Write the index, delete the files that only an unfinished build needs, and return the report."""
        shards = [p.shard for p in self.parts]
        in_order = sorted(self.skipped, key=lambda s: s.line)
        lines = (json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in in_order)
        self.store.put(SKIPPED_NAME, ["".join(lines).encode()])
        write_index(self.store, shards)
        for number in range(len(shards)):
            self.store.delete(_part_name(number))
        self.store.delete(_BUILDING_NAME)
        seconds = sum(g.seconds for s in shards for g in s.groups)
        num_samples = sum(s.num_samples for s in shards)
        return BuildReport(self.store.url, num_samples, len(shards), seconds, tuple(self.skipped))

    def remove(self) -> None:
        """Delete all files of this build. The caller must know that no other process builds the same shards."""
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
        part = _Part(self._writer.finish(), end_row, tuple(self.skipped[self._num_recorded :]))
        write_json(self.store, _part_name(len(self.parts)), asdict(part))
        self.parts.append(part)
        self._writer, self._num_recorded = None, len(self.skipped)

    def _check_skipped(self) -> None:
        check_skipped(self.manifest, self.skipped, len(self.rows), self.max_skipped_fraction)
        if not self.rows:
            raise UnusableError(f"{self.manifest}: no samples in the requested split; check the split")


def _finished_parts(store: Store, digest: str) -> list[_Part]:
    """Return the finished shards of an interrupted build of the same shards.

    Raises:
        UserError: If the store contains anything else.
    """
    names = store.list()
    if not names:
        return []
    if INDEX_NAME in names:
        raise UserError(f"{store.url}: contains finished shards ({INDEX_NAME}); delete them or choose another path")
    known = _json_object(store, _BUILDING_NAME) if _BUILDING_NAME in names else {}
    if known.get("source") != digest:
        raise UserError(
            f"{store.url}: is neither empty nor an unfinished build of this manifest; delete it or choose another path"
        )
    parts: list[_Part] = []
    while (name := _part_name(len(parts))) in names:
        part = _read_part(_json_object(store, name))
        if (
            part is None
            or names.get(part.shard.name) != part.shard.num_bytes
            or table_name(part.shard.name) not in names
        ):
            break
        parts.append(part)
    return parts


def _part_name(number: int) -> str:
    return f"shard-{number:06d}.part.json"


def _json_object(store: Store, name: str) -> dict[str, Any]:
    """Return the content of a file of an unfinished build; an empty dictionary if the file is damaged."""
    try:
        value = parse_json(store.get(name))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_part(value: dict[str, Any]) -> _Part | None:
    """Return the finished shard that a file describes, or None if the file is damaged."""
    try:
        return _Part(
            read_shard(value["shard"]), int(value["end_row"]), tuple(SkippedRow(**s) for s in value["skipped"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
