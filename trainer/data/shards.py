"""WebDataset shards with random access.

A shard is a tar of `<key>.<type>` (one clip; `<key>.0.<type>`, `<key>.1.<type>` … for several, none for text) and
`<key>.json` (the manifest's fields). Beside the shards lie

- `shards.json`: per shard its name, bytes, SHA-256, and per (task, subset, split, language, source) the number of
  samples and seconds;
- `<shard>.idx.json`: per sample its key, task, subset, split, seconds, the byte ranges of its members, and the XXH3-64
  of all bytes from its first member's to its last member's, so that any samples cost one ranged read and are checked.

Shards of others have the same index (`tools.inspect_shards --build-index`); what their `<key>.json` lacks is in the
index's `defaults`, and a `<key>.txt` is the answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from model.errors import UserError
from trainer.data.decode import AUDIO_TYPES, SampleError
from trainer.storage.store import ChangedError, Store

log = logging.getLogger(__name__)

INDEX_NAME = "shards.json"
FORMAT_VERSION = 3


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
class ShardIndex:
    """The whole index, without what lies in the offset tables."""

    shards: tuple[Shard, ...]
    digest: str
    """Of the index's bytes: two sets with one digest hold the same samples."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Fields of samples whose metadata lack them."""

    @property
    def num_samples(self) -> int:
        return sum(s.num_samples for s in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.shards)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all shards."""
        return tuple(g for s in self.shards for g in s.groups)


@dataclass(frozen=True)
class Entry:
    """One line of an offset table. `members`: (extension, first byte, bytes), in the order of the tar."""

    key: str
    task: str
    subset: str
    split: str
    seconds: float
    xxh3: str
    members: tuple[tuple[str, int, int], ...]

    @property
    def span(self) -> tuple[int, int]:
        """First byte of the first member, and the byte after the last one's."""
        return self.members[0][1], self.members[-1][1] + self.members[-1][2]

    @property
    def num_clips(self) -> int:
        return sum(extension.split(".")[-1] in AUDIO_TYPES for extension, _, _ in self.members)


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: encoded clips, and the manifest's fields."""

    key: str
    clips: tuple[memoryview, ...]
    metadata: dict[str, Any]


def table_name(shard: str) -> str:
    """Name of a shard's offset table."""
    return shard.removesuffix(".tar") + ".idx.json"


def read_index(store: Store) -> ShardIndex:
    """The index of the shards in `store`.

    Raises:
        UserError: there is none, or it is malformed or of another format version.
    """
    data = store.get(INDEX_NAME)
    index = _json_object(f"{store.url}/{INDEX_NAME}", data)
    if index.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{store.url}/{INDEX_NAME}: version {index.get('version')!r}, this program reads {FORMAT_VERSION}; "
            "make the shards again"
        )
    try:
        shards = tuple(_shard(s) for s in index["shards"])
        defaults = {str(k): str(v) for k, v in index.get("defaults", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{store.url}/{INDEX_NAME}: malformed ({error!r}); make the shards again") from None
    return ShardIndex(shards, hashlib.sha256(data).hexdigest(), defaults)


class ShardSet:
    """Shards in a store; their offset tables are read when first needed.

    Args:
        store: where they lie.
        index: from `read_index`, where it has been read already.
        num_cached_tables: offset tables held in memory.

    Raises:
        UserError: see `read_index`.
    """

    def __init__(self, store: Store, index: ShardIndex | None = None, num_cached_tables: int = 64) -> None:
        self.store = store
        self.index = read_index(store) if index is None else index
        self.table = lru_cache(maxsize=num_cached_tables)(self._read_table)
        self.quarantined: dict[int, str] = {}
        """Shards that are not what the index says, and why."""
        self.altered: set[tuple[int, int]] = set()
        """Samples (shard, index) of other shards that are not, however often they are fetched."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.index.shards

    def num_selected(self, selection: Selection) -> tuple[int, ...]:
        """Selected samples per shard; read from the index alone."""
        return tuple(sum(g.num_samples for g in s.groups if selection.matches(g)) for s in self.shards)

    def quarantine(self, shard: int, why: str) -> None:
        """Use nothing more of `shard`; its name and the reason go to the log, once."""
        if shard not in self.quarantined:
            log.warning("%s/%s is quarantined: %s", self.store.url, self.shards[shard].name, why)
            self.quarantined[shard] = why

    def parse(self, entry: Entry, data: memoryview) -> RawSample:
        """The sample from the bytes of its span. Raises SampleError `wrong_type` if its metadata is no JSON object."""
        start = entry.span[0]
        clips, metadata = [], dict(self.index.defaults)
        for extension, offset, size in entry.members:
            kind, part = extension.split(".")[-1], data[offset - start : offset - start + size]
            if kind in AUDIO_TYPES:
                clips.append(part)
            elif kind == "json":
                metadata |= _metadata(bytes(part))
            elif extension == "txt":
                metadata["answer"] = bytes(part).decode("utf-8", errors="replace").strip()
        return RawSample(entry.key, tuple(clips), metadata)

    def _read_table(self, shard: int) -> tuple[Entry, ...]:
        """Raises MissingError, ChangedError."""
        info = self.shards[shard]
        where = f"{self.store.url}/{table_name(info.name)}"
        table = _json_object(where, self.store.get(table_name(info.name)), ChangedError)
        if table.get("sha256") != info.sha256 or len(table.get("samples", ())) != info.num_samples:
            raise ChangedError(f"{where}: belongs to another version of the shard; make it again")
        try:
            return tuple(
                Entry(key, *_three(table["groups"][group]), seconds, xxh3, tuple((e, o, n) for e, o, n in members))
                for key, group, seconds, xxh3, members in table["samples"]
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ChangedError(f"{where}: malformed ({error!r}); make the shards again") from None


def _shard(line: Mapping[str, Any]) -> Shard:
    if not isinstance(line["name"], str) or "/" in line["name"] or not line["name"].endswith(".tar"):
        raise ValueError(f"shard name {line['name']!r}")
    groups = tuple(Group(**g) for g in line["groups"])
    return Shard(line["name"], int(line["num_bytes"]), int(line["num_samples"]), str(line["sha256"]), groups)


def _three(group: Sequence[str]) -> tuple[str, str, str]:
    task, subset, split = group
    return task, subset, split


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise SampleError("wrong_type", f"metadata is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SampleError("wrong_type", "metadata is not a JSON object")
    return value


def _json_object(where: str, data: bytes, kind: type[UserError] = UserError) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise kind(f"{where}: not JSON ({error}); make the shards again") from None
    if not isinstance(value, dict):
        raise kind(f"{where}: not a JSON object; make the shards again")
    return value
