"""Write shards, offset tables and the index in the format of `trainer.data.shards`.

The same samples always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import xxhash

from trainer.data.shards import FORMAT_VERSION, INDEX_NAME, Entry, Group, Shard, table_name
from trainer.storage.store import Store

_BLOCK_BYTES = 512
GroupKey = tuple[str, str, str, str, str]
"""(task, subset, split, language, source)."""


class ShardWriter:
    """A writer of one shard, which is kept in memory until `finish` writes it."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.name = f"shard-{number:06d}.tar"
        self.num_bytes = 0
        self.entries: list[Entry] = []
        self._parts: list[bytes] = []
        self._groups = Groups()

    def add(self, key: str, clips: Sequence[tuple[str, bytes]], metadata: dict[str, Any], seconds: float) -> None:
        """Append one sample.

        Args:
            key: The key of the sample, unique within the shards.
            clips: (type, content) of each audio file.
            metadata: The fields of the manifest.
            seconds: The total length of the clips.
        """
        assert "." not in key and "/" not in key, key
        names = [ext if len(clips) == 1 else f"{i}.{ext}" for i, (ext, _) in enumerate(clips)]
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
        first_part = len(self._parts)
        members = [
            (name, self._append(f"{key}.{name}", data), len(data))
            for name, data in zip([*names, "json"], [*(b for _, b in clips), text], strict=True)
        ]
        digest = xxhash.xxh3_64()
        for part in self._parts[first_part + 1 :]:  # The header of the first member is not hashed.
            digest.update(part)
        self.entries.append(self._groups.entry(key, metadata, seconds, digest.hexdigest(), tuple(members)))

    def finish(self) -> Shard:
        """Write the shard and its offset table. No sample can be added afterwards.

        Returns:
            The description of the shard for the index.
        """
        self._write(bytes(-self.num_bytes % _BLOCK_BYTES + 2 * _BLOCK_BYTES))
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(part)
        shard = Shard(self.name, self.num_bytes, len(self.entries), digest.hexdigest(), self._groups.lines())
        self.store.put(shard.name, self._parts)
        write_table(self.store, shard, self.entries)
        return shard

    def _append(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # The default mtime, uid, gid and mode make the bytes reproducible.
        info.size = len(data)
        padding = bytes(-self.num_bytes % _BLOCK_BYTES)
        self._write(padding + info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(data)
        return offset

    def _write(self, data: bytes) -> None:
        self._parts.append(data)
        self.num_bytes += len(data)


class Groups:
    """The number of samples and the seconds of audio in each group of a shard."""

    def __init__(self) -> None:
        self._totals: dict[GroupKey, tuple[int, float]] = {}

    def entry(
        self,
        key: str,
        metadata: Mapping[str, Any],
        seconds: float,
        xxh3: str,
        members: tuple[tuple[str, int, int], ...],
    ) -> Entry:
        """Count a sample in its group, and return its entry for the offset table.

        Args:
            key: The key of the sample.
            metadata: The fields of the manifest.
            seconds: The total length of the clips.
            xxh3: The XXH3-64 hash of the sample's bytes, in hexadecimal.
            members: The extension, the first byte and the number of bytes of every member.
        """
        group = tuple(str(metadata.get(n, "")) for n in ("task", "subset", "split", "language", "source"))
        task, subset, split, language, source = group
        count, total = self._totals.get((task, subset, split, language, source), (0, 0.0))
        self._totals[task, subset, split, language, source] = (count + 1, total + seconds)
        return Entry(key, task, subset, split, round(seconds, 4), xxh3, members)

    def lines(self) -> tuple[Group, ...]:
        """Return the sorted list of groups for the index."""
        return tuple(Group(*g, count, round(total, 4)) for g, (count, total) in sorted(self._totals.items()))


def write_table(store: Store, shard: Shard, entries: Sequence[Entry]) -> None:
    """Write the offset table of a shard."""
    kinds = sorted({(e.task, e.subset, e.split) for e in entries})
    number = {kind: i for i, kind in enumerate(kinds)}
    samples = [[e.key, number[e.task, e.subset, e.split], e.seconds, e.xxh3, e.members] for e in entries]
    write_json(store, table_name(shard.name), {"sha256": shard.sha256, "groups": kinds, "samples": samples})


def write_index(store: Store, shards: Sequence[Shard], defaults: Mapping[str, str] | None = None) -> None:
    """Write the index. It must be written last, because shards without an index are not readable as a dataset.

    Args:
        store: The store that contains the shards.
        shards: The descriptions of all shards.
        defaults: The values of fields that a sample's metadata may lack.
    """
    index = {
        "version": FORMAT_VERSION,
        "num_samples": sum(s.num_samples for s in shards),
        "num_bytes": sum(s.num_bytes for s in shards),
        "shards": [asdict(s) for s in shards],
    }
    write_json(store, INDEX_NAME, {**index, "defaults": dict(defaults)} if defaults else index)


def write_json(store: Store, name: str, value: Any) -> None:
    """Write `value` as one line of JSON with sorted keys."""
    store.put(name, [json.dumps(value, ensure_ascii=False, sort_keys=True).encode() + b"\n"])
