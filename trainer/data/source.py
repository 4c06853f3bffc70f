"""A lane's place in a set → sample: read ahead, decode (or take from memory), join, augment, pad, tokenise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np

from model.errors import UserError
from model.lengths import SAMPLE_RATE, num_samples
from trainer.data.augment import augment
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.decode import SampleError, check_metadata, decode_audio
from trainer.data.fetch import Fetched, ReadAhead, checked, read_samples, read_table, read_unchecked
from trainer.data.lanes import DatasetOrder, LaneSpan, hash_of
from trainer.data.sample import Clip, EncodedSample, make_sample
from trainer.data.shards import RawSample, Selection, ShardSet
from trainer.data.tokenizer import Tokenizer
from trainer.storage.store import ChangedError, MissingError

Arrived = dict[int, memoryview]
"""Rank → a sample's bytes, not checked yet."""

Decoded = tuple[dict[str, Any], tuple[Clip, ...]]
"""Metadata and clips."""

_GRACE_SAMPLES = 200
"""Below this many samples seen, the allowed number of skips is that of this many: one early skip is no verdict."""


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used."""

    set: str
    shard: str
    key: str
    reason: str
    detail: str


def check_skipped(num_seen: int, skipped: Mapping[str, int], max_fraction: float) -> None:
    """Raise UserError with a summary if too many of the samples seen so far had to be skipped."""
    total = sum(skipped.values())
    if total > max_fraction * max(num_seen, _GRACE_SAMPLES):
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        raise UserError(
            f"data.max_skipped_fraction = {max_fraction}: {total} of {num_seen} samples had to be skipped ({counts}); "
            "see skipped.jsonl; mend the data, or raise the fraction or data.max_audio_sec"
        )


class DatasetReader:
    """One set, opened for one selection of its samples. Its samples are counted per shard: `index`, from 0."""

    def __init__(self, config: DatasetConfig, shards: ShardSet, selection: Selection, read_bytes: int) -> None:
        self.config, self.shards, self.selection = config, shards, selection
        self.num_per_shard = shards.num_selected(selection)
        self.num_samples = sum(self.num_per_shard)
        self.mean_sample_bytes = shards.index.num_bytes // max(1, shards.index.num_samples) + 1
        self.chunk_samples = max(1, read_bytes // self.mean_sample_bytes)
        """Samples that are read at once, and shuffled among themselves: part of the order."""
        self.selected = lru_cache(maxsize=64)(self._selected)
        self.joinable = lru_cache(maxsize=1024)(self._joinable)

    @property
    def digest(self) -> str:
        """Changes with whatever changes the order."""
        return f"{self.shards.index.digest[:32]}/{self.chunk_samples}"

    def read(self, shard: int, indices: Sequence[int]) -> Fetched:
        """Rank → sample. Raises UserError if the store is away or refuses."""
        try:
            entries = self.selected(shard)
        except (MissingError, ChangedError) as error:  # its offset table
            self.shards.quarantine(shard, str(error))
            return {index: SampleError("altered", str(error)) for index in indices}
        found = read_samples(self.shards, shard, [entries[index] for index in indices])
        return {index: found[entries[index]] for index in indices}

    def read_unchecked(self, shard: int, indices: Sequence[int]) -> Arrived:
        """Rank → bytes, for `checked`; none where something is wrong with the shard: `read` finds out what."""
        try:
            entries = self.selected(shard)
            found = read_unchecked(self.shards, shard, [entries[index] for index in indices])
        except (MissingError, ChangedError):
            return {}
        return {index: found[entries[index]] for index in indices}

    def checked(self, shard: int, index: int, data: memoryview) -> RawSample | SampleError | None:
        """See `fetch.checked`."""
        return checked(self.shards, self.shards.table(shard)[self.selected(shard)[index]], data)

    def metadata(self) -> Iterator[dict[str, Any]]:
        """The fields of all selected samples, in stored order; those that cannot be used are passed over."""
        for shard, num_here in enumerate(self.num_per_shard):
            for start in range(0, num_here, self.chunk_samples):
                indices = range(start, min(start + self.chunk_samples, num_here))
                found = self.read(shard, indices)
                yield from (raw.metadata for r in indices if not isinstance(raw := found[r], SampleError))

    def key(self, shard: int, index: int) -> str:
        """The sample's key; empty if the shard's table cannot be read."""
        try:
            return self.shards.table(shard)[self.selected(shard)[index]].key
        except (MissingError, ChangedError):
            return ""

    def skip(self, shard: int, index: int, error: SampleError) -> Skip:
        """The account of a sample that raised `error`."""
        name = self.shards.shards[shard].name
        return Skip(self.config.name, name, self.key(shard, index), error.reason, error.detail)

    def _selected(self, shard: int) -> tuple[int, ...]:
        """Indices of the selected samples of `shard`. Raises MissingError, ChangedError."""
        if shard in self.shards.quarantined:
            raise ChangedError(self.shards.quarantined[shard])
        found = tuple(i for i, e in enumerate(read_table(self.shards, shard)) if self.selection.matches(e))
        if len(found) != self.num_per_shard[shard]:
            raise ChangedError(f"{self.shards.store.url}/{self.shards.shards[shard].name}: table and index differ")
        return found

    def _joinable(self, shard: int, chunk: range, subset: str) -> tuple[int, ...]:
        """Ranks within `chunk` of ASR samples of `subset` with one clip."""
        table, selected = self.shards.table(shard), self.selected(shard)
        entries = ((index, table[selected[index]]) for index in chunk)
        return tuple(r for r, e in entries if e.task == "asr" and e.subset == subset and e.num_clips == 1)


class ClipCache:
    """Decoded clips, the least recently used dropped beyond the budget. For several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[int, int, int], Decoded] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[int, int, int]) -> Decoded | None:
        """Metadata and clips, or None."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def __contains__(self, key: tuple[int, int, int]) -> bool:
        return key in self._items

    def put(self, key: tuple[int, int, int], metadata: dict[str, Any], clips: tuple[Clip, ...]) -> None:
        """Keep them while the budget lasts; they must not be changed afterwards."""
        size = sum(c.nbytes for c in clips)
        if size > self.max_bytes:
            return
        with self._lock:
            if key in self._items:
                return
            self._items[key] = (metadata, clips)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, (_, dropped) = self._items.popitem(last=False)
                self.num_bytes -= sum(c.nbytes for c in dropped)


class SampleSource:
    """Makes samples of what was read. The same place in a lane gives the same sample, bit for bit."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, strides: tuple[int, ...], *, ctc: bool, seed: int = 0
    ) -> None:
        self.config, self.tokenizer, self.strides, self.ctc, self.seed = config, tokenizer, strides, ctc, seed
        self.ahead = ReadAhead(config.read_ahead_mib << 20)
        self._cache = ClipCache(config.cache_decoded_mib << 20)

    def close(self) -> None:
        self.ahead.close()

    def missing(self, reader: DatasetReader, shard: int, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that are not in memory, decoded."""
        return [index for index in indices if (id(reader), shard, index) not in self._cache]

    def evaluation(self, reader: DatasetReader, shard: int, index: int, arrived: Arrived) -> EncodedSample:
        """The sample as evaluation sees it: the prompt alone, no augmentation. Raises SampleError."""
        metadata, clips = self.decoded(reader, shard, index, arrived)
        return self._make(reader.key(shard, index), reader, metadata, clips, evaluate=True)

    def training(self, place: Cursor, progress: float) -> EncodedSample:
        """The sample at a cursor, joined and augmented as of `progress` (0 to 1). Raises SampleError."""
        reader, shard, index = place.reader, place.shard, place.index
        metadata, clips = self.decoded(reader, shard, index, place.arrived)
        if self.config.join.probability or self.config.augment.enabled:
            name = place.order.name
            rng = np.random.Generator(np.random.PCG64(hash_of(self.seed, "augment", name, place.lane, place.position)))
            metadata, clips = self._join(place, metadata, clips, progress, rng)
            if self.config.augment.enabled:
                strength = self.config.augment.strength_at(progress) * reader.config.augment_strength
                clips = tuple(augment(c, self.config.augment, strength, rng) for c in clips)
        return self._make(reader.key(shard, index), reader, metadata, clips, evaluate=False)

    def decoded(self, reader: DatasetReader, shard: int, index: int, arrived: Arrived) -> Decoded:
        """Metadata and clips, from memory, from what has `arrived`, or else from the store. Raises SampleError."""
        key = (id(reader), shard, index)
        if (found := self._cache.get(key)) is not None:
            return found
        # Checked here, not where it was read: decoding finds the bytes in this core's cache.
        raw = reader.checked(shard, index, arrived[index]) if index in arrived else None
        if raw is None:
            raw = reader.read(shard, [index])[index]
        if isinstance(raw, SampleError):
            raise raw
        check_metadata(raw.metadata)
        clips = tuple(decode_audio(data, self.config.max_audio_sec) for data in raw.clips)
        self._cache.put(key, raw.metadata, clips)
        return raw.metadata, clips

    def _make(
        self, key: str, reader: DatasetReader, metadata: dict[str, Any], clips: tuple[Clip, ...], *, evaluate: bool
    ) -> EncodedSample:
        shortest = num_samples(self.config.min_audio_sec)
        padded = tuple(np.pad(c, (0, shortest - len(c))) if len(c) < shortest else c for c in clips)
        duration = sum(len(c) for c in padded) / SAMPLE_RATE
        return make_sample(
            key,
            {**metadata, "set": reader.config.name, "duration": duration},
            padded,
            self.tokenizer,
            self.strides,
            ctc=self.ctc,
            evaluate=evaluate,
        )

    def _join(
        self,
        place: Cursor,
        metadata: dict[str, Any],
        clips: tuple[Clip, ...],
        progress: float,
        rng: np.random.Generator,
    ) -> Decoded:
        join, reader, shard = self.config.join, place.reader, place.shard
        if metadata["task"] != "asr" or len(clips) != 1 or join.probability == 0 or progress < join.start:
            return metadata, clips
        if rng.random() >= join.probability:
            return metadata, clips
        others = reader.joinable(shard, place.order.chunk_of(shard, place.index), str(metadata.get("subset", "")))
        parts, answers, keys = [clips[0]], [metadata["answer"]], [reader.key(shard, place.index)]
        for _ in range(int(rng.integers(1, join.max_clips)) if others else 0):
            other = others[int(rng.integers(len(others)))]
            gap = np.zeros(num_samples(rng.uniform(0, join.gap_sec)), dtype=np.float32)
            try:
                more, joined = self.decoded(reader, shard, other, place.arrived)
            except SampleError:
                continue  # it is counted and listed where its own turn comes
            if sum(map(len, parts)) + len(gap) + len(joined[0]) > join.max_sec * SAMPLE_RATE:
                break
            parts += [gap, joined[0]]
            answers.append(more["answer"])
            keys.append(reader.key(shard, other))
        metadata = {**metadata, "answer": " ".join(answers), "joined": keys}
        return metadata, (np.concatenate(parts),)


class Cursor:
    """Where one lane stands in one set: the run it is in, what was read of it, and the next run on its way."""

    def __init__(
        self, source: SampleSource, reader: DatasetReader, order: DatasetOrder, lane: int, position: int
    ) -> None:
        self.source, self.reader, self.order, self.lane = source, reader, order, lane
        self.position = position
        """Of the sample to be used next."""
        self.arrived: Arrived = {}
        """What is in memory of the current run."""
        self._span = order.span(lane, position)
        self._start = position
        self._future: Future[Arrived] | None = self._read(self._span, required=True)
        self._next_span = order.span(lane, position + len(self._span.indices))
        self._next_future: Future[Arrived] | None = None

    @property
    def shard(self) -> int:
        return self._span.shard

    @property
    def index(self) -> int:
        return self._span.indices[self.position - self._start]

    def load(self) -> None:
        """Have the span of `position` in memory and begin to read the next one.

        Raises:
            UserError: see `DatasetReader.read`.
        """
        end = self._start + len(self._span.indices)
        if self.position >= end:
            self._release(self._span)
            self._span, self._start, self.arrived = self._next_span, end, {}
            self._future = self._next_future or self._read(self._span, required=True)
            self._next_span = self.order.span(self.lane, end + len(self._span.indices))
            self._next_future = None
        if self._future is not None:
            self.arrived = self._future.result()
            self._future = None
        if self._next_future is None:
            self._next_future = self._read(self._next_span, required=False)

    def _read(self, span: LaneSpan, *, required: bool) -> Future[Arrived] | None:
        reader = self.reader
        size = len(span.indices) * reader.mean_sample_bytes

        def work() -> Arrived:
            indices = self.source.missing(reader, span.shard, span.indices)
            return reader.read_unchecked(span.shard, indices) if indices else {}

        return self.source.ahead.start(work, size, required=required)

    def _release(self, span: LaneSpan) -> None:
        self.source.ahead.release(len(span.indices) * self.reader.mean_sample_bytes)
