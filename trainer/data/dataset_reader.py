"""Read the samples of one dataset by shard and index, check them, and record those that are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from model.errors import UserError
from trainer.data.config import DatasetConfig
from trainer.data.errors import SampleError
from trainer.data.fetch import Fetched, checked, read_samples, read_table, read_unchecked
from trainer.data.shards import RawSample, Selection, ShardSet
from trainer.scoring.tasks import TASKS
from trainer.storage.store import ChangedError, MissingError

Received = dict[int, memoryview]
"""Index of a sample → its bytes, which have not been checked yet."""

_GRACE_SAMPLES = 200
"""The smallest number of samples for which the fraction of skipped samples is computed, so that a few early skips do
not stop a run."""


@dataclass(frozen=True)
class Skip:
    """A skipped sample, with the reason why it was skipped."""

    set: str
    shard: str
    key: str
    reason: str
    detail: str


def check_skipped(
    num_seen: int, skipped: Mapping[str, int], max_fraction: float, examples: Mapping[str, Skip] | None = None
) -> None:
    """Check that not too many samples were skipped.

    Args:
        num_seen: The number of samples so far, including skipped ones.
        skipped: The number of skipped samples by reason.
        max_fraction: The largest fraction of samples that may be skipped.
        examples: A skipped sample for each reason, for the error message. Reasons may be missing.

    Raises:
        UserError: If too many samples were skipped. The message contains the number of samples for each reason.
    """
    total = sum(skipped.values())
    if total > max_fraction * max(num_seen, _GRACE_SAMPLES):
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        first = "; ".join(f"{s.set} {s.shard} {s.key}: {s.detail}" for _, s in sorted((examples or {}).items()))
        raise UserError(
            f"data.max_skipped_fraction = {max_fraction}: {total} of {num_seen} samples had to be skipped ({counts}), "
            f"listed in skipped.jsonl{f' (first: {first})' if first else ''}; fix the data, or raise this fraction or "
            "data.max_audio_sec"
        )


class DatasetReader:
    """A reader of the selected samples of one dataset.

    A sample is addressed by its shard and its index, which counts the selected samples of the shard from 0.

    Args:
        config: The dataset's section of the recipe.
        shards: The shards of the dataset.
        selection: The samples to read.
        read_bytes: The approximate size of one read, which determines the size of a chunk.
    """

    def __init__(self, config: DatasetConfig, shards: ShardSet, selection: Selection, read_bytes: int) -> None:
        self.config, self.shards, self.selection = config, shards, selection
        self.num_per_shard = shards.num_selected(selection)
        self.num_samples = sum(self.num_per_shard)
        self.mean_sample_bytes = shards.index.num_bytes // max(1, shards.index.num_samples) + 1
        self.chunk_samples = max(1, read_bytes // self.mean_sample_bytes)
        """The number of samples in a chunk, on which the order of samples depends."""
        self.selected = lru_cache(maxsize=64)(self._selected)
        self.joinable = lru_cache(maxsize=1024)(self._joinable)

    @property
    def digest(self) -> str:
        """An identifier of the order of the samples: the digest of the index, and the size of a chunk."""
        return f"{self.shards.index.digest[:32]}/{self.chunk_samples}"

    def read(self, shard: int, indices: Sequence[int]) -> Fetched:
        """Read and check samples.

        Returns:
            Index → sample, or the reason why the sample cannot be used.

        Raises:
            UserError: If the store is unreachable or refuses the request.
        """
        try:
            entries = self.selected(shard)
        except (MissingError, ChangedError) as error:  # The offset table cannot be used.
            self.shards.quarantine(shard, str(error))
            return {index: SampleError("altered", str(error)) for index in indices}
        found = read_samples(self.shards, shard, [entries[index] for index in indices])
        return {index: found[entries[index]] for index in indices}

    def read_unchecked(self, shard: int, indices: Sequence[int]) -> Received:
        """Read samples without comparing them with their hashes. Callers must pass each sample to `checked`.

        Returns:
            Index → bytes. The mapping is empty if the shard is missing or altered; `read` reports the reason.

        Raises:
            UserError: If the store is unreachable or refuses the request.
        """
        try:
            entries = self.selected(shard)
            found: dict[int, memoryview] = {}
            for part in self._parts(shard, indices):
                found |= read_unchecked(self.shards, shard, [entries[index] for index in part])
        except (MissingError, ChangedError):
            return {}
        return {index: found[entries[index]] for index in indices}

    def _parts(self, shard: int, indices: Sequence[int]) -> list[Sequence[int]]:
        """Divide samples into groups, each of which is read at once.

        With a node cache, the groups are whole chunks, so that the cache is asked for the same byte ranges each time.
        """
        if self.shards.cache is None:
            return [indices]
        size, num_here = self.chunk_samples, int(self.num_per_shard[shard])
        starts = sorted({index // size * size for index in indices})
        return [range(start, min(start + size, num_here)) for start in starts]

    def checked(self, shard: int, index: int, data: memoryview) -> RawSample | SampleError | None:
        """Return the sample in `data`, the reason why it cannot be used, or None if its bytes do not match its hash."""
        return checked(self.shards, self.shards.table(shard)[self.selected(shard)[index]], data)

    def metadata(self) -> Iterator[dict[str, Any]]:
        """Yield the metadata of all selected samples that can be used, in stored order."""
        for shard, num_here in enumerate(self.num_per_shard):
            for start in range(0, num_here, self.chunk_samples):
                indices = range(start, min(start + self.chunk_samples, num_here))
                found = self.read(shard, indices)
                yield from (raw.metadata for r in indices if not isinstance(raw := found[r], SampleError))

    def key(self, shard: int, index: int) -> str:
        """Return the key of a sample, or an empty string if the offset table of its shard cannot be read."""
        try:
            return self.shards.table(shard)[self.selected(shard)[index]].key
        except (MissingError, ChangedError):
            return ""

    def skip(self, shard: int, index: int, error: SampleError) -> Skip:
        """Return the record of a sample that raised `error`."""
        name = self.shards.shards[shard].name
        return Skip(self.config.name, name, self.key(shard, index), error.reason, error.detail)

    def _selected(self, shard: int) -> tuple[int, ...]:
        """Return the positions of the selected samples of `shard` in its offset table.

        Raises:
            MissingError: If the offset table is missing.
            ChangedError: If the shard is quarantined, or its offset table does not agree with the index.
        """
        if shard in self.shards.quarantined:
            raise ChangedError(self.shards.quarantined[shard])
        found = tuple(i for i, e in enumerate(read_table(self.shards, shard)) if self.selection.matches(e))
        if len(found) != self.num_per_shard[shard]:
            raise ChangedError(
                f"{self.shards.store.url}/{self.shards.shards[shard].name}: its offset table differs from the index"
            )
        return found

    def _joinable(self, shard: int, chunk: range, subset: str) -> tuple[int, ...]:
        """Return the indices in `chunk` of the transcription samples that have one clip and belong to `subset`."""
        table, selected = self.shards.table(shard), self.selected(shard)
        entries = ((index, table[selected[index]]) for index in chunk)
        return tuple(r for r, e in entries if _is_transcription(e.task) and e.subset == subset and e.num_clips == 1)


def _is_transcription(task: str) -> bool:
    # The index may contain unknown tasks. Samples of these tasks are skipped when they are read.
    return task in TASKS and TASKS[task].is_transcription


def is_joinable(metadata: Mapping[str, Any]) -> bool:
    """Return whether a sample can be joined with others: a transcription that is not a conversation."""
    return _is_transcription(metadata["task"]) and metadata.get("messages") is None
