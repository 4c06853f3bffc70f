"""WebDataset shards with random access.

A shard is a tar of `<key>.<type>` (one clip; `<key>.0.<type>`, `<key>.1.<type>` … for several, none for text) and
`<key>.json` (the manifest's fields). Beside the shards lie

- `shards.json`: per shard its name, bytes, SHA-256, and per (task, subset, split, language, source) the number of
  samples and seconds;
- `<shard>.idx.json`: per sample its key, task, subset, split, seconds and the byte ranges of its members, so that any
  sample costs one ranged read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from model.errors import UserError
from trainer.data.decode import SampleError
from trainer.data.store import Store

INDEX_NAME = "shards.json"
FORMAT_VERSION = 1
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Selection:
    """Which samples of a shard set; an empty field selects all."""

    split: str = ""
    tasks: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()

    def matches(self, item: Group | Entry) -> bool:
        """Whether a sample, or all samples of a group, are selected."""
        return (
            (not self.split or item.split == self.split)
            and (not self.tasks or item.task in self.tasks)
            and (not self.subsets or item.subset in self.subsets)
        )


@dataclass(frozen=True)
class Group:
    """Samples of one shard that are alike."""

    task: str
    subset: str
    split: str
    language: str
    source: str
    num_samples: int
    seconds: float


@dataclass(frozen=True)
class Shard:
    """One line of the index."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Entry:
    """One line of an offset table. `members`: (extension, first byte, bytes), in the order of the tar."""

    key: str
    task: str
    subset: str
    split: str
    seconds: float
    members: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: encoded clips as (type, bytes), and the manifest's fields."""

    key: str
    clips: tuple[tuple[str, bytes], ...]
    metadata: dict[str, Any]


def table_name(shard: str) -> str:
    """Name of a shard's offset table."""
    return shard.removesuffix(".tar") + ".idx.json"


class ShardSet:
    """A folder of shards, opened by its index; offset tables are read when first needed.

    Raises:
        UserError: no index, another format version, or a shard whose size is not the index's.
    """

    def __init__(self, store: Store, num_cached_tables: int = 64) -> None:
        self.store = store
        index = _json_object(store, INDEX_NAME)
        if index.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{store.url}/{INDEX_NAME}: version {index.get('version')!r}, this program reads {FORMAT_VERSION}; "
                "make the shards again"
            )
        try:
            self.shards: tuple[Shard, ...] = tuple(_shard(s) for s in index["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{store.url}/{INDEX_NAME}: malformed ({error!r}); make the shards again") from None
        self.digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        for shard in self.shards:
            if (found := store.size_bytes(shard.name)) != shard.num_bytes:
                raise UserError(
                    f"{store.url}/{shard.name}: {found} bytes, its index says {shard.num_bytes}: "
                    "cut or altered; make or copy it again"
                )
        self.table = lru_cache(maxsize=num_cached_tables)(self._read_table)

    def __len__(self) -> int:
        return sum(s.num_samples for s in self.shards)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all shards."""
        return tuple(g for s in self.shards for g in s.groups)

    def num_selected(self, selection: Selection) -> tuple[int, ...]:
        """Selected samples per shard; read from the index alone."""
        return tuple(sum(g.num_samples for g in s.groups if selection.matches(g)) for s in self.shards)

    def entry(self, shard: int, index: int) -> Entry:
        """Sample `index` of `shard`: what the offset table knows of it."""
        return self.table(shard)[index]

    def metadata(self, shard: int, index: int) -> dict[str, Any]:
        """The manifest's fields; reads no audio. Raises SampleError `wrong_type`."""
        _, offset, size = self.entry(shard, index).members[-1]
        return _metadata(self.store.read_range(self.shards[shard].name, offset, size))

    def read(self, shard: int, index: int) -> RawSample:
        """The whole sample by one ranged read. Raises SampleError `wrong_type` if its metadata is no JSON object."""
        entry = self.entry(shard, index)
        start = entry.members[0][1]
        span = entry.members[-1][1] + entry.members[-1][2] - start
        data = self.store.read_range(self.shards[shard].name, start, span)
        parts = [(ext, data[offset - start : offset - start + size]) for ext, offset, size in entry.members]
        return RawSample(entry.key, tuple((e.split(".")[-1], b) for e, b in parts[:-1]), _metadata(parts[-1][1]))

    def _read_table(self, shard: int) -> tuple[Entry, ...]:
        info = self.shards[shard]
        table = _json_object(self.store, table_name(info.name))
        entries = tuple(
            Entry(
                s["key"], s["task"], s["subset"], s["split"], s["seconds"], tuple((e, o, n) for e, o, n in s["members"])
            )
            for s in table["samples"]
        )
        if table.get("sha256") != info.sha256 or len(entries) != info.num_samples:
            raise UserError(
                f"{self.store.url}/{table_name(info.name)}: belongs to another version of the shard; make it again"
            )
        return entries


class ShardSetWriter:
    """Writes shards, tables and index into `folder`, which must exist and be empty. Same samples, same bytes.

    The caller writes into a temporary folder and renames it when done; see `manifest.build_shards`.
    """

    def __init__(self, folder: Path, max_shard_samples: int, max_shard_bytes: int) -> None:
        assert max_shard_samples > 0 and max_shard_bytes > 0
        self.folder = folder
        self.max_shard_samples = max_shard_samples
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._entries: list[Entry] = []
        self._groups: dict[tuple[str, str, str, str, str], tuple[int, float]] = {}

    def add(self, key: str, clips: Sequence[tuple[str, bytes]], metadata: dict[str, Any], seconds: float) -> None:
        """Append one sample; `clips` are (type, bytes), `seconds` their total length."""
        assert "." not in key and "/" not in key, key
        if self._file is None:
            self._open()
        names = [ext if len(clips) == 1 else f"{i}.{ext}" for i, (ext, _) in enumerate(clips)]
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
        members = [
            (name, self._append(f"{key}.{name}", data), len(data))
            for name, data in zip([*names, "json"], [*(b for _, b in clips), text], strict=True)
        ]
        task, subset, split, language, source = (
            str(metadata.get(n, "")) for n in ("task", "subset", "split", "language", "source")
        )
        self._entries.append(Entry(key, task, subset, split, round(seconds, 4), tuple(members)))
        group = (task, subset, split, language, source)
        count, total = self._groups.get(group, (0, 0.0))
        self._groups[group] = (count + 1, total + seconds)
        if len(self._entries) >= self.max_shard_samples or self._position >= self.max_shard_bytes:
            self._close_shard()

    def finish(self) -> int:
        """Write the index; returns the number of shards. Nothing may be added afterwards."""
        self._close_shard()
        index = {
            "version": FORMAT_VERSION,
            "num_samples": sum(s.num_samples for s in self._shards),
            "num_bytes": sum(s.num_bytes for s in self._shards),
            "shards": [asdict(s) for s in self._shards],
        }
        _write_json(self.folder / INDEX_NAME, index)
        return len(self._shards)

    def close(self) -> None:
        """Close the open shard's file after an error."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._name = f"shard-{len(self._shards):06d}.tar"
        self._file = open(self.folder / self._name, "wb")
        self._position = 0
        self._hash = hashlib.sha256()

    def _append(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # mtime, uid, gid 0, mode 0644: same input, same bytes
        info.size = len(data)
        offset = self._position + len(header := info.tobuf(tarfile.USTAR_FORMAT))
        self._write(header + data + bytes(-len(data) % _BLOCK_BYTES))
        return offset

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._write(bytes(2 * _BLOCK_BYTES))
        self.close()
        digest = self._hash.hexdigest()
        groups = tuple(Group(*g, count, round(total, 4)) for g, (count, total) in sorted(self._groups.items()))
        self._shards.append(Shard(self._name, self._position, len(self._entries), digest, groups))
        table = {"sha256": digest, "samples": [asdict(e) for e in self._entries]}
        _write_json(self.folder / table_name(self._name), table)
        self._entries, self._groups = [], {}


def _shard(line: dict[str, Any]) -> Shard:
    if "/" in line["name"] or not line["name"].endswith(".tar"):
        raise ValueError(f"shard name {line['name']!r}")
    groups = tuple(Group(**g) for g in line["groups"])
    return Shard(line["name"], line["num_bytes"], line["num_samples"], line["sha256"], groups)


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise SampleError("wrong_type", f"metadata is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SampleError("wrong_type", "metadata is not a JSON object")
    return value


def _json_object(store: Store, name: str) -> dict[str, Any]:
    data = store.read(name)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{store.url}/{name}: not JSON ({error}); make the shards again") from None
    if not isinstance(value, dict):
        raise UserError(f"{store.url}/{name}: not a JSON object; make the shards again")
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True, indent=None) + "\n", encoding="utf-8")
