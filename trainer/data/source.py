"""Load samples: read them in advance, decode, join, augment, pad and tokenize them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from model.lengths import SAMPLE_RATE, TokenRate, num_samples
from model.pieces import Pieces
from trainer.data.augment import augment
from trainer.data.clip_cache import ClipCache, Decoded
from trainer.data.config import DataConfig
from trainer.data.dataset_reader import DatasetReader, Received, is_joinable
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError, sample_errors
from trainer.data.fetch import ReadAhead
from trainer.data.lanes import DatasetOrder, LaneSpan, hash_of
from trainer.data.metadata import check_metadata
from trainer.data.sample import Clip, EncodedSample, make_sample
from trainer.data.tokenizer import Tokenizer


class SampleSource:
    """A source of encoded samples. The same position of a lane always yields the same sample, bit for bit.

    Args:
        config: The recipe's data section.
        tokenizer: The tokenizer of prompts and answers.
        rate: The adapter's rule for the number of audio tokens.
        text_fields: The additional fields of the metadata that are tokenized because losses need them.
        pieces: The pieces into which transcripts are divided for a CTC head; None if there is no such head.
        max_tokens: The largest number of tokens of a sample; None for no limit.
        seed: The seed for joining and augmentation.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        rate: TokenRate,
        *,
        text_fields: tuple[str, ...] = (),
        pieces: Pieces | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.tokenizer, self.rate, self.seed = config, tokenizer, rate, seed
        self.text_fields, self.pieces, self.max_tokens = text_fields, pieces, max_tokens
        self.ahead = ReadAhead(config.read_ahead_mib << 20)
        self._cache = ClipCache(config.cache_decoded_mib << 20)

    def close(self) -> None:
        """Stop the threads that read in advance."""
        self.ahead.close()

    def missing(self, reader: DatasetReader, shard: int, indices: Sequence[int]) -> list[int]:
        """Return the elements of `indices` whose decoded samples are not in the cache."""
        return [index for index in indices if (id(reader), shard, index) not in self._cache]

    def evaluation(self, reader: DatasetReader, shard: int, index: int, received: Received) -> EncodedSample:
        """Return a sample for evaluation, which has only a prompt. Its clips are not augmented.

        Args:
            reader: The reader of the dataset.
            shard: The number of the shard.
            index: The index of the sample.
            received: The bytes of samples that have already been read; other samples are read from the store.

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
            cursor: The cursor on which `Cursor.load` has been called for the current position.
            progress: The progress of the training (0 to 1), which determines the strength of augmentation.

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
        # The hash is checked here, not in the reading thread, so that the CPU's cache holds the bytes for decoding.
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
            pieces=self.pieces,
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
        """Join the sample with others from its chunk, with the configured probability, or return it unchanged."""
        join, reader, shard = self.config.join, cursor.reader, cursor.shard
        if not is_joinable(metadata) or len(clips) != 1 or join.probability == 0 or progress < join.start:
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
                continue  # The sample is counted and listed as skipped when the lane draws it.
            if not is_joinable(more):
                continue
            if sum(map(len, parts)) + len(gap) + len(joined[0]) > join.max_sec * SAMPLE_RATE:
                break
            parts += [gap, joined[0]]
            answers.append(more["answer"])
            keys.append(reader.key(shard, other))
        metadata = {**metadata, "answer": " ".join(answers), "joined": keys}
        return metadata, (np.concatenate(parts),)


class Cursor:
    """The position of one lane in one dataset, with the samples that the lane reads next.

    The current span of samples is in memory, and the next span is read in advance.

    Args:
        source: The source of samples, whose threads and memory budget are used.
        reader: The reader of the dataset.
        order: The order of the dataset.
        lane: The number of the lane.
        position: The number of samples that the lane has already read from the dataset.
    """

    def __init__(
        self, source: SampleSource, reader: DatasetReader, order: DatasetOrder, lane: int, position: int
    ) -> None:
        self.source, self.reader, self.order, self.lane = source, reader, order, lane
        self.position = position
        """The position of the next sample."""
        self.received: Received = {}
        """The bytes of the samples of the current span that were not in the cache of decoded samples."""
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
