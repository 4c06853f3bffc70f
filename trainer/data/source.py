"""Production of training samples: reading in advance, decoding, joining, augmentation, padding and tokenization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from model.errors import UserError
from model.lengths import SAMPLE_RATE, TokenRate, num_samples
from trainer.data.augment import augment
from trainer.data.clip_cache import ClipCache, Decoded
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError, sample_errors
from trainer.data.fetch import Fetched, ReadAhead, checked, read_samples, read_table, read_unchecked
from trainer.data.lanes import DatasetOrder, LaneSpan, hash_of
from trainer.data.metadata import check_metadata
from trainer.data.sample import Clip, EncodedSample, make_sample
from trainer.data.shards import RawSample, Selection, ShardSet
from trainer.data.tokenizer import Tokenizer
from trainer.scoring.tasks import TASKS
from trainer.storage.store import ChangedError, MissingError

Received = dict[int, memoryview]
"""The bytes of each sample by its index. They have not been checked yet."""

_GRACE_SAMPLES = 200
"""The minimum number of samples from which the allowed number of skips is computed, so that a few early skips do not
stop a run."""


@dataclass(frozen=True)
class Skip:
    """A skipped sample and the reason."""

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
        num_seen: number of samples so far, including skipped ones.
        skipped: number of skipped samples by reason.
        max_fraction: largest fraction of samples that may be skipped.
        examples: a skipped sample for each reason, as far as they are known.

    Raises:
        UserError: If more samples were skipped; the message summarizes the reasons.
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
        config: the dataset's section of the recipe.
        shards: shards of the dataset.
        selection: samples to read.
        read_bytes: approximate size of one read, which determines the size of a chunk.
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
        """A string that changes if the order of the samples may have changed."""
        return f"{self.shards.index.digest[:32]}/{self.chunk_samples}"

    def read(self, shard: int, indices: Sequence[int]) -> Fetched:
        """Read and check samples.

        Returns:
            Index → sample, or the reason why it cannot be used.

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
        """Read samples without comparing them with the index. Pass each to `checked` before using it.

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
        """Return the groups of samples to read at once; with a node cache, whole chunks, which are always the same."""
        if self.shards.cache is None:
            return [indices]
        size, num_here = self.chunk_samples, int(self.num_per_shard[shard])
        starts = sorted({index // size * size for index in indices})
        return [range(start, min(start + size, num_here)) for start in starts]

    def checked(self, shard: int, index: int, data: memoryview) -> RawSample | SampleError | None:
        """Return the sample in `data`, the reason why it cannot be used, or None if its bytes differ from the index."""
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


def _is_joinable(metadata: Mapping[str, Any]) -> bool:
    return _is_transcription(metadata["task"]) and metadata.get("messages") is None


class SampleSource:
    """Produces encoded samples. The same position of a lane always yields the same sample, bit for bit.

    Args:
        config: the recipe's data section.
        tokenizer: tokenizer of prompts and answers.
        rate: the adapter's rule for the number of audio tokens.
        text_fields: further fields of the metadata that are tokenized, for losses.
        max_tokens: largest number of tokens of a sample; None for no limit.
        seed: seed for joining and augmentation.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        rate: TokenRate,
        *,
        text_fields: tuple[str, ...] = (),
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.tokenizer, self.rate, self.seed = config, tokenizer, rate, seed
        self.text_fields, self.max_tokens = text_fields, max_tokens
        self.ahead = ReadAhead(config.read_ahead_mib << 20)
        self._cache = ClipCache(config.cache_decoded_mib << 20)

    def close(self) -> None:
        """Stop the threads that read in advance."""
        self.ahead.close()

    def missing(self, reader: DatasetReader, shard: int, indices: Sequence[int]) -> list[int]:
        """Return the elements of `indices` whose decoded samples are not in the cache."""
        return [index for index in indices if (id(reader), shard, index) not in self._cache]

    def evaluation(self, reader: DatasetReader, shard: int, index: int, received: Received) -> EncodedSample:
        """Return a sample for evaluation, which is the prompt alone without augmentation.

        Args:
            reader: reader of the dataset.
            shard: number of the shard.
            index: index of the sample.
            received: bytes that have been read already.

        Raises:
            SampleError: If the sample cannot be used.
            UserError: If the store is unreachable or refuses the request.
        """
        key = reader.key(shard, index)
        with sample_errors(key):
            metadata, clips = self.decoded(reader, shard, index, received)
            return self._make(key, reader, metadata, clips, evaluate=True)

    def training(self, cursor: Cursor, progress: float) -> EncodedSample:
        """Return the training sample at the position of a cursor, after joining and augmentation.

        Args:
            cursor: cursor whose samples are loaded.
            progress: progress of the training (0 to 1), which determines the strength of augmentation.

        Raises:
            SampleError: If the sample cannot be used.
            UserError: If the store is unreachable or refuses the request.
        """
        key = cursor.reader.key(cursor.shard, cursor.index)
        with sample_errors(key):
            metadata, clips = self._augmented(cursor, progress)
            return self._make(key, cursor.reader, metadata, clips, evaluate=False)

    def _augmented(self, cursor: Cursor, progress: float) -> Decoded:
        reader = cursor.reader
        metadata, clips = self.decoded(reader, cursor.shard, cursor.index, cursor.received)
        if self.config.join.probability or self.config.augment.enabled:
            key = hash_of(self.seed, "augment", cursor.order.name, cursor.lane, cursor.position)
            rng = np.random.Generator(np.random.PCG64(key))
            metadata, clips = self._join(cursor, metadata, clips, progress, rng)
            if self.config.augment.enabled:
                strength = self.config.augment.strength_at(progress) * reader.config.augment_strength
                clips = tuple(augment(c, self.config.augment, strength, rng) for c in clips)
        return metadata, clips

    def decoded(self, reader: DatasetReader, shard: int, index: int, received: Received) -> Decoded:
        """Return the metadata and clips of a sample, from the cache, from `received`, or from the store.

        Raises:
            SampleError: If the sample cannot be used.
            UserError: If the store is unreachable or refuses the request.
        """
        key = (id(reader), shard, index)
        if (found := self._cache.get(key)) is not None:
            return found
        # The bytes are checked here rather than in the reading thread, so that decoding finds them in the core's cache.
        raw = reader.checked(shard, index, received[index]) if index in received else None
        if raw is None:
            raw = reader.read(shard, [index])[index]
        if isinstance(raw, SampleError):
            raise raw
        check_metadata(raw.metadata, len(raw.clips))
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
            self.rate,
            text_fields=self.text_fields,
            max_tokens=self.max_tokens,
            loss_turns=self.config.loss_turns,
            evaluate=evaluate,
        )

    def _join(
        self,
        cursor: Cursor,
        metadata: dict[str, Any],
        clips: tuple[Clip, ...],
        progress: float,
        rng: np.random.Generator,
    ) -> Decoded:
        """Join the sample with others from its chunk with the configured probability; otherwise return it unchanged."""
        join, reader, shard = self.config.join, cursor.reader, cursor.shard
        if not _is_joinable(metadata) or len(clips) != 1 or join.probability == 0 or progress < join.start:
            return metadata, clips
        if rng.random() >= join.probability:
            return metadata, clips
        others = reader.joinable(shard, cursor.order.chunk_of(shard, cursor.index), str(metadata.get("subset", "")))
        parts, answers, keys = [clips[0]], [metadata["answer"]], [reader.key(shard, cursor.index)]
        for _ in range(int(rng.integers(1, join.max_clips)) if others else 0):
            other = others[int(rng.integers(len(others)))]
            gap = np.zeros(num_samples(rng.uniform(0, join.gap_sec)), dtype=np.float32)
            try:
                more, joined = self.decoded(reader, shard, other, cursor.received)
            except SampleError:
                continue  # It is counted and listed when it is drawn itself.
            if not _is_joinable(more):
                continue
            if sum(map(len, parts)) + len(gap) + len(joined[0]) > join.max_sec * SAMPLE_RATE:
                break
            parts += [gap, joined[0]]
            answers.append(more["answer"])
            keys.append(reader.key(shard, other))
        metadata = {**metadata, "answer": " ".join(answers), "joined": keys}
        return metadata, (np.concatenate(parts),)


class Cursor:
    """The position of one lane in one dataset, and the samples that are read from that position on.

    The current span of samples is in memory, and the next span is read in advance.

    Args:
        source: source of samples, whose threads and memory budget are used.
        reader: reader of the dataset.
        order: order of the dataset.
        lane: number of the lane.
        position: number of samples that the lane has already read from the dataset.
    """

    def __init__(
        self, source: SampleSource, reader: DatasetReader, order: DatasetOrder, lane: int, position: int
    ) -> None:
        self.source, self.reader, self.order, self.lane = source, reader, order, lane
        self.position = position
        """The position of the next sample."""
        self.received: Received = {}
        """The samples of the current span whose bytes are in memory."""
        self._span = order.span(lane, position)
        self._start = position
        self._future: Future[Received] | None = self._read(self._span, required=True)
        self._next_span = order.span(lane, position + len(self._span.indices))
        self._next_future: Future[Received] | None = None

    @property
    def shard(self) -> int:
        """The shard of the sample at `position`."""
        return self._span.shard

    @property
    def index(self) -> int:
        """The index of the sample at `position`."""
        return self._span.indices[self.position - self._start]

    def load(self) -> None:
        """Wait until the span that contains `position` is in memory, and start reading the next one.

        Raises:
            UserError: If the store is unreachable or refuses the request.
        """
        end = self._start + len(self._span.indices)
        if self.position >= end:
            self._release(self._span)
            self._span, self._start, self.received = self._next_span, end, {}
            self._future = self._next_future or self._read(self._span, required=True)
            self._next_span = self.order.span(self.lane, end + len(self._span.indices))
            self._next_future = None
        if self._future is not None:
            self.received = self._future.result()
            self._future = None
        if self._next_future is None:
            self._next_future = self._read(self._next_span, required=False)

    def _read(self, span: LaneSpan, *, required: bool) -> Future[Received] | None:
        reader = self.reader
        size = len(span.indices) * reader.mean_sample_bytes

        def work() -> Received:
            indices = self.source.missing(reader, span.shard, span.indices)
            return reader.read_unchecked(span.shard, indices) if indices else {}

        return self.source.ahead.start(work, size, required=required)

    def _release(self, span: LaneSpan) -> None:
        self.source.ahead.release(len(span.indices) * self.reader.mean_sample_bytes)
