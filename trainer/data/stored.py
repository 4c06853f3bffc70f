"""Access to the stored samples of any manifest or shards, for tools that do not read a recipe.

The list of samples is available without reading their audio. Several processes that open the same data get the same
list.
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
from trainer.data.errors import SampleError
from trainer.data.fetch import read_samples
from trainer.data.manifest import Row, read_manifest
from trainer.data.shards import INDEX_NAME, ShardSet
from trainer.scoring.fields import is_amount
from trainer.storage.open import open_store, scheme_of

CHUNK_SAMPLES = 128
"""The number of samples per call of `StoredData.read` in tools that read a whole dataset."""


@dataclass(frozen=True)
class Stored:
    """The description of a stored sample, which is available before its audio is read."""

    key: str
    task: str
    """The task; empty if the line of the manifest has no valid task."""
    seconds: float
    """The total length of the sample's clips in seconds, as given by the index or the manifest. It may be inexact."""
    split: str | None = None
    """The split; None if the line of the manifest has no valid split."""


Encoded = tuple[Sequence[bytes | memoryview], dict[str, Any]]
"""The content of a sample's audio files, and the fields of the manifest."""


class StoredData(ABC):
    """A list of stored samples. A sample is addressed by its position in the list."""

    items: list[Stored]
    """The samples in stored order."""

    @abstractmethod
    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        """Read samples.

        Args:
            places: The positions in `items`.

        Returns:
            Each sample, or the reason why it cannot be used, in the order of `places`.

        Raises:
            UserError: If the store is unreachable or refuses the request.
        """


class ManifestData(StoredData):
    """The samples of a manifest.

    Raises:
        UserError: If the manifest cannot be used; see `read_manifest`.
    """

    def __init__(self, path: Path, split: str | None) -> None:
        self._rows = read_manifest(path, split)
        self.items = [Stored(r.key, _task_of(r.metadata), _seconds_of(r), _split_of(r.metadata)) for r in self._rows]

    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        rows = (self._rows[place] for place in places)
        return [r.error or ([path.read_bytes() for path in r.audio], r.metadata) for r in rows]


class ShardData(StoredData):
    """The samples of shards in a folder or a bucket.

    Raises:
        UserError: If the shards contain no sample of the split.
    """

    def __init__(self, shards: ShardSet, split: str | None) -> None:
        known = sorted({group.split for group in shards.index.groups})
        if split is not None and split not in known:
            raise UserError(f"{shards.store.url}: no samples of split '{split}'; choose one of {', '.join(known)}")
        self._shards = shards
        self._places: list[tuple[int, int]] = []
        self.items = []
        for shard in range(len(shards.shards)):
            for index, entry in enumerate(shards.table(shard)):
                if split is None or entry.split == split:
                    self._places.append((shard, index))
                    self.items.append(Stored(entry.key, entry.task, entry.seconds, entry.split))

    @property
    def digest(self) -> str:
        """The SHA-256 of the index, which identifies all samples."""
        return self._shards.index.digest

    def read(self, places: Sequence[int]) -> list[Encoded | SampleError]:
        wanted = sorted({self._places[place] for place in places})
        found: dict[tuple[int, int], Encoded | SampleError] = {}
        for shard, group in groupby(wanted, key=lambda item: item[0]):
            for index, raw in read_samples(self._shards, shard, [index for _, index in group]).items():
                found[shard, index] = raw if isinstance(raw, SampleError) else (raw.clips, raw.metadata)
        return [found[self._places[place]] for place in places]


def open_stored(data: str, split: str | None = None) -> StoredData:
    """Open a manifest or shards.

    Args:
        data: The path to a manifest (JSONL), a folder of shards, or the URL of shards in a bucket.
        split: The split to read; None for all.

    Raises:
        UserError: If `data` is none of these, or contains no sample of the split.
    """
    if scheme_of(data):
        return ShardData(ShardSet(open_store(data)), split)
    path = Path(data)
    if (path / INDEX_NAME).is_file():
        return ShardData(ShardSet(open_store(data)), split)
    if path.is_dir():
        raise UserError(f"{data}: contains no {INDEX_NAME}; use a folder of shards, or a manifest")
    found = ManifestData(path, split)
    if not found.items:
        raise UserError(f"{data}: no samples" + (f" of split '{split}'" if split else "") + "; check the manifest")
    return found


def _task_of(metadata: dict[str, Any]) -> str:
    task = metadata.get("task")
    return task if isinstance(task, str) else ""


def _split_of(metadata: dict[str, Any]) -> str | None:
    split = metadata.get("split")
    return split if isinstance(split, str) else None


def _seconds_of(row: Row) -> float:
    duration = row.metadata.get("duration")
    if is_amount(duration) and duration > 0:
        return float(duration)
    seconds = 0.0
    for path in row.audio:
        try:
            seconds += soundfile.info(str(path)).duration
        except soundfile.LibsndfileError:
            pass  # The problem is reported when the sample is decoded.
    return seconds
