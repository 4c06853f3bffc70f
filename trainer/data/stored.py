"""Samples of any manifest or any shards, as they are stored: what there is, and its encoded bytes on demand.

For tools that look at data which no recipe names. Several processes that open the same data see the same list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import soundfile

from model.errors import UserError
from trainer.data.decode import SampleError
from trainer.data.fetch import read_samples
from trainer.data.manifest import Row, read_manifest
from trainer.data.shards import INDEX_NAME, ShardSet
from trainer.storage.open import open_store, scheme_of

CHUNK_SAMPLES = 128
"""Samples whose bytes are held at a time by those who read everything."""


@dataclass(frozen=True)
class Stored:
    """One sample, before its bytes are read."""

    key: str
    task: str
    """Empty where the manifest's line has no legal one."""
    seconds: float
    """Of all its clips, as the index or the manifest says: good enough to sort by."""


Encoded = tuple[Sequence[bytes | memoryview], dict[str, Any]]
"""Whole audio files of a sample's clips, and the manifest's fields."""


class StoredData(ABC):
    """A list of samples; `read` takes places in it."""

    items: list[Stored]

    @abstractmethod
    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        """Samples, or why one cannot be used, in the order of `places`. UserError: the store is away."""


class ManifestData(StoredData):
    """Lines of a manifest; audio files beside it."""

    def __init__(self, path: Path, split: str | None) -> None:
        self._rows = read_manifest(path, split)
        self.items = [Stored(r.key, _task_of(r.metadata), _seconds_of(r)) for r in self._rows]

    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        rows = (self._rows[place] for place in places)
        return [r.error or ([path.read_bytes() for path in r.audio], r.metadata) for r in rows]


class ShardData(StoredData):
    """Samples of shards, from a folder or a bucket."""

    def __init__(self, shards: ShardSet, split: str | None) -> None:
        known = sorted({group.split for group in shards.index.groups})
        if split is not None and split not in known:
            raise UserError(f"{shards.store.url}: no samples of split '{split}'; splits there are: {', '.join(known)}")
        self._shards = shards
        self._places: list[tuple[int, int]] = []
        self.items = []
        for shard in range(len(shards.shards)):
            for index, entry in enumerate(shards.table(shard)):
                if split is None or entry.split == split:
                    self._places.append((shard, index))
                    self.items.append(Stored(entry.key, entry.task, entry.seconds))

    @property
    def digest(self) -> str:
        """Of the index, and with it of all samples."""
        return self._shards.index.digest

    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        wanted = sorted({self._places[place] for place in places})
        found: dict[tuple[int, int], Encoded | SampleError] = {}
        for shard, group in groupby(wanted, key=lambda item: item[0]):
            for index, raw in read_samples(self._shards, shard, [index for _, index in group]).items():
                found[shard, index] = raw if isinstance(raw, SampleError) else (raw.clips, raw.metadata)
        return [found[self._places[place]] for place in places]


def open_stored(data: str, split: str | None = None) -> StoredData:
    """What lies at `data`: a manifest (JSONL), a folder of shards, or a bucket with shards.

    Args:
        split: only this one; None: all.

    Raises:
        UserError: it is none of them, or has no sample of the split.
    """
    if scheme_of(data):
        return ShardData(ShardSet(open_store(data)), split)
    path = Path(data)
    if (path / INDEX_NAME).is_file():
        return ShardData(ShardSet(open_store(data)), split)
    if path.is_dir():
        raise UserError(f"{data}: no {INDEX_NAME} in it: give a folder of shards, or a manifest")
    found = ManifestData(path, split)
    if not found.items:
        raise UserError(f"{data}: no samples" + (f" of split '{split}'" if split else ""))
    return found


def _task_of(metadata: dict[str, Any]) -> str:
    task = metadata.get("task")
    return task if isinstance(task, str) else ""


def _seconds_of(row: Row) -> float:
    told = row.metadata.get("duration")
    if isinstance(told, int | float) and told > 0:
        return float(told)
    seconds = 0.0
    for path in row.audio:
        try:
            seconds += soundfile.info(str(path)).duration
        except soundfile.LibsndfileError:
            pass  # reported by whoever decodes it
    return seconds
