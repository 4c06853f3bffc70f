"""The format of shards: WebDataset tar files with random access.

A shard is a tar file. For each sample it contains `<key>.json` with the fields of the manifest, and `<key>.<type>` with
the clip. Several clips are named `<key>.0.<type>`, `<key>.1.<type>` and so on. A text sample has no clip. Two kinds of
files are stored next to the shards:

- `shards.json`, the index, contains the name, size and SHA-256 of every shard. For each (task, subset, split, language,
  source), it contains the number of samples and the seconds of audio in the shard.
- `<shard>.idx.json`, the offset table of a shard, contains for every sample its key, task, subset, split, length in
  seconds, the byte ranges of its members, and an XXH3-64 hash. The hash covers all bytes from the first member's data
  to the last member's, so that a sample that was fetched by a ranged read can be checked.

`earshot shards inspect --build-index` writes an index for tar files that other programs wrote. In such files,
`<key>.txt` contains the answer, and the `defaults` of the index are the values of fields that `<key>.json` lacks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.data.decode import AUDIO_TYPES
from trainer.data.node_cache import NodeCache
from trainer.data.tar_samples import Member, arrange, metadata_of
from trainer.scoring.fields import is_amount
from trainer.storage.store import ChangedError, Store

log = logging.getLogger(__name__)

INDEX_NAME = "shards.json"
"""The file name of the index, which is stored next to the shards."""
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Selection:
    """A selection of samples by split, task and subset. An empty field does not restrict the selection."""

    split: str = ""
    tasks: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()

    def matches(self, item: Group | Entry) -> bool:
        """Return whether `item`, a sample or a group of samples, is selected."""
        return (
            (not self.split or item.split == self.split)
            and (not self.tasks or item.task in self.tasks)
            and (not self.subsets or item.subset in self.subsets)
        )


@dataclass(frozen=True)
class Group:
    """The samples of one shard with the same task, subset, split, language and source."""

    task: str
    subset: str
    split: str
    language: str
    source: str
    num_samples: int
    seconds: float


@dataclass(frozen=True)
class Shard:
    """A shard, as described by the index."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class ShardIndex:
    """The index of all shards of a store."""

    shards: tuple[Shard, ...]
    digest: str
    """The SHA-256 of the index file. Shards with the same digest contain the same samples."""
    defaults: dict[str, str] = field(default_factory=dict)
    """The values of fields that a sample's metadata lacks."""

    @property
    def num_samples(self) -> int:
        return sum(s.num_samples for s in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.shards)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all shards, shard by shard."""
        return tuple(g for s in self.shards for g in s.groups)


@dataclass(frozen=True)
class Entry:
    """A sample, as described by the offset table of its shard."""

    key: str
    task: str
    subset: str
    split: str
    seconds: float
    xxh3: str
    members: tuple[Member, ...]
    """(extension, first byte, number of bytes) of every member, in the order of the tar."""

    @property
    def span(self) -> tuple[int, int]:
        """The byte range of the sample: the first byte of its first member, and the byte after its last member."""
        return self.members[0][1], self.members[-1][1] + self.members[-1][2]

    @property
    def num_clips(self) -> int:
        return sum(extension.split(".")[-1] in AUDIO_TYPES for extension, _, _ in self.members)


@dataclass(frozen=True)
class RawSample:
    """A stored sample: its encoded clips and the fields of the manifest."""

    key: str
    clips: tuple[memoryview, ...]
    metadata: dict[str, Any]


def table_name(shard: str) -> str:
    """Return the name of the offset table of a shard."""
    return shard.removesuffix(".tar") + ".idx.json"


def read_index(store: Store) -> ShardIndex:
    """Read the index of the shards in `store`.

    Raises:
        UserError: If the index is missing, is malformed, or has a different format version.
    """
    data = store.get(INDEX_NAME)
    index = _json_object(f"{store.url}/{INDEX_NAME}", data)
    if index.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{store.url}/{INDEX_NAME}: has format version {index.get('version')!r}, but this program reads version "
            f"{FORMAT_VERSION}; make the shards again"
        )
    try:
        shards = tuple(read_shard(s) for s in index["shards"])
        defaults = {_text(k): _text(v) for k, v in index.get("defaults", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{store.url}/{INDEX_NAME}: malformed ({error!r}); make the shards again") from None
    return ShardIndex(shards, hashlib.sha256(data).hexdigest(), defaults)


class ShardSet:
    """The shards of a store. The offset table of a shard is read when it is first needed.

    Args:
        store: The store that contains the shards.
        index: The result of `read_index`; None to read it now.
        num_cached_tables: The largest number of offset tables that are kept in memory.
        cache: The cache of byte ranges on the disk of this node; None to read all of them from the store.

    Raises:
        UserError: If the index cannot be read; see `read_index`.
    """

    def __init__(
        self,
        store: Store,
        index: ShardIndex | None = None,
        num_cached_tables: int = 64,
        cache: NodeCache | None = None,
    ) -> None:
        self.store = store
        self.cache = cache
        self.index = read_index(store) if index is None else index
        self.table = lru_cache(maxsize=num_cached_tables)(self._read_table)
        self.quarantined: dict[int, str] = {}
        """Number of each shard that is not read because it differs from the index → the reason."""
        self.altered: set[tuple[int, int]] = set()
        """The samples that did not match their hashes each time they were fetched, although their shard is not
        quarantined. Each is a pair of the shard's number and the position in its offset table."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.index.shards

    def num_selected(self, selection: Selection) -> tuple[int, ...]:
        """Return the number of selected samples per shard, computed from the index alone."""
        return tuple(sum(g.num_samples for g in s.groups if selection.matches(g)) for s in self.shards)

    def read(self, shard: int, offset: int, num_bytes: int, *, fresh: bool = False) -> memoryview:
        """Return a byte range of a shard, which may come from the cache.

        Args:
            shard: The number of the shard.
            offset: The first byte of the range.
            num_bytes: The length of the range.
            fresh: Whether to read from the store even if the range is cached, because the cached bytes were wrong.

        Raises:
            UserError: See `Store.get_range`.
        """
        info = self.shards[shard]

        def fetch() -> memoryview:
            return self.store.get_range(info.name, offset, num_bytes, info.num_bytes)

        if self.cache is None:
            return fetch()
        key = f"{self.store.url} {info.name} {info.sha256} {offset} {num_bytes}"
        return self.cache.read(key, fetch, fresh=fresh)

    def quarantine(self, shard: int, why: str) -> None:
        """Exclude `shard` from use, and log its name and the reason once."""
        if shard not in self.quarantined:
            log.warning("%s/%s is quarantined: %s", self.store.url, self.shards[shard].name, why)
            self.quarantined[shard] = why

    def parse(self, entry: Entry, data: memoryview) -> RawSample:
        """Parse the bytes of one sample; see `parse_sample`."""
        return parse_sample(entry, data, self.index.defaults)

    def _read_table(self, shard: int) -> tuple[Entry, ...]:
        """Read the offset table of a shard.

        Raises:
            MissingError: If the table is missing.
            ChangedError: If the table is malformed or does not belong to the shard.
        """
        info = self.shards[shard]
        name = table_name(info.name)
        if self.cache is None:
            return self._parse_table(info, self.store.get(name))

        def fetch() -> memoryview:
            return memoryview(self.store.get(name))

        key = f"{self.store.url} {name} {self.index.digest}"
        try:
            return self._parse_table(info, bytes(self.cache.read(key, fetch)))
        except ChangedError:
            return self._parse_table(info, bytes(self.cache.read(key, fetch, fresh=True)))

    def _parse_table(self, info: Shard, content: bytes) -> tuple[Entry, ...]:
        where = f"{self.store.url}/{table_name(info.name)}"
        table = _json_object(where, content, ChangedError)
        samples = table.get("samples")
        if table.get("sha256") != info.sha256 or not isinstance(samples, list) or len(samples) != info.num_samples:
            raise ChangedError(f"{where}: belongs to another version of the shard; make it again")
        try:
            return tuple(_entry(sample, table["groups"], info.num_bytes) for sample in samples)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ChangedError(f"{where}: malformed ({error!r}); make the shards again") from None


def parse_sample(entry: Entry, data: memoryview, defaults: Mapping[str, Any]) -> RawSample:
    """Parse the bytes of one sample.

    Args:
        entry: The sample's entry in the offset table.
        data: The bytes of the sample's span (`Entry.span`).
        defaults: The values of fields that the sample may lack.

    Raises:
        SampleError: If the metadata of the sample cannot be read (`wrong_type`), or its files may belong to several
            samples (`ambiguous`).
    """
    start = entry.span[0]
    clips, json_place, txt_place = arrange([extension for extension, _, _ in entry.members])

    def part(place: int) -> memoryview:
        _, offset, size = entry.members[place]
        return data[offset - start : offset - start + size]

    json_text = None if json_place is None else bytes(part(json_place))
    answer_text = None if txt_place is None else bytes(part(txt_place))
    return RawSample(entry.key, tuple(map(part, clips)), metadata_of(defaults, json_text, answer_text))


def read_shard(line: Mapping[str, Any]) -> Shard:
    """Return the shard that an element of an index describes.

    Raises:
        KeyError, TypeError, ValueError: If the element is malformed.
    """
    name = _text(line["name"])
    if "/" in name or not name.endswith(".tar"):
        raise ValueError(f"shard name {name!r}")
    groups = tuple(_group(**group) for group in line["groups"])
    num_samples = _whole(line["num_samples"])
    if sum(group.num_samples for group in groups) != num_samples:
        raise ValueError(f"{name}: the samples of its groups do not add up to {num_samples}")
    return Shard(name, _whole(line["num_bytes"]), num_samples, _text(line["sha256"]), groups)


def _group(task: Any, subset: Any, split: Any, language: Any, source: Any, num_samples: Any, seconds: Any) -> Group:
    names = _text(task), _text(subset), _text(split), _text(language), _text(source)
    return Group(*names, _whole(num_samples), _amount(seconds))


def _entry(sample: Any, groups: Sequence[Any], num_bytes: int) -> Entry:
    """Return an entry of an offset table.

    Raises:
        ValueError, TypeError, IndexError: If the entry is malformed, or its members are not in order within the shard.
    """
    key, number, seconds, xxh3, members = sample
    task, subset, split = map(_text, groups[_whole(number)])
    checked, end = [], 0
    for extension, offset, size in members:
        if _whole(offset) < end or offset + _whole(size) > num_bytes:
            raise ValueError(f"the files of {key!r} are not in order within the shard")
        end = offset + size
        checked.append((_text(extension), offset, size))
    if not checked:
        raise ValueError(f"{key!r} has no files")
    return Entry(_text(key), task, subset, split, _amount(seconds), _text(xxh3), tuple(checked))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is not a non-negative integer")
    return value


def _amount(value: Any) -> float:
    if not is_amount(value):
        raise TypeError(f"{value!r} is not a non-negative number")
    return value


def _json_object(where: str, data: bytes, kind: type[UserError] = UserError) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise kind(f"{where}: not JSON ({error}); make the shards again") from None
    if not isinstance(value, dict):
        raise kind(f"{where}: not a JSON object; make the shards again")
    return value
