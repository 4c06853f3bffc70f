"""Address → sample: read, check, decode (or take from memory), join, augment, pad, tokenise."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Sample
from model.errors import UserError
from model.lengths import SAMPLE_RATE, num_samples
from trainer.data.augment import augment
from trainer.data.config import DataConfig, SetConfig
from trainer.data.decode import SampleError, check_metadata, decode_audio
from trainer.data.lanes import SetOrder, hash_of
from trainer.data.sample import make_sample
from trainer.data.shards import Selection, ShardSet
from trainer.data.tokenizer import Tokenizer

Clip = NDArray[np.float32]
"""`[T]`, 16 kHz."""

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


class SetReader:
    """One set, opened for one selection of its samples."""

    def __init__(self, config: SetConfig, shards: ShardSet, selection: Selection) -> None:
        self.config, self.shards, self.selection = config, shards, selection
        self.num_per_shard = shards.num_selected(selection)
        self.num_samples = sum(self.num_per_shard)
        self.selected = lru_cache(maxsize=256)(self._selected)
        self.joinable = lru_cache(maxsize=256)(self._joinable)

    def _selected(self, shard: int) -> tuple[int, ...]:
        """Indices of the selected samples of `shard`."""
        return tuple(i for i, e in enumerate(self.shards.table(shard)) if self.selection.matches(e))

    def _joinable(self, shard: int, subset: str) -> tuple[int, ...]:
        """Selected ASR samples of `subset` with one clip."""
        table = self.shards.table(shard)
        return tuple(
            i
            for i in self.selected(shard)
            if table[i].task == "asr" and table[i].subset == subset and len(table[i].members) == 2
        )

    def skip(self, shard: int, index: int, error: SampleError) -> Skip:
        """The account of a sample that raised `error`."""
        key = self.shards.entry(shard, index).key
        return Skip(self.config.name, self.shards.shards[shard].name, key, error.reason, error.detail)


class ClipCache:
    """Decoded clips, the least recently used dropped beyond the budget. For several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[str, int, int], tuple[dict[str, Any], tuple[Clip, ...]]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[str, int, int]) -> tuple[dict[str, Any], tuple[Clip, ...]] | None:
        """Metadata and clips, or None."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: tuple[str, int, int], metadata: dict[str, Any], clips: tuple[Clip, ...]) -> None:
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
    """Makes samples of addresses. The same address and draw give the same sample, bit for bit."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, strides: tuple[int, ...], *, ctc: bool, seed: int = 0
    ) -> None:
        self.config, self.tokenizer, self.strides, self.ctc, self.seed = config, tokenizer, strides, ctc, seed
        self._cache = ClipCache(config.cache_decoded_mib << 20)

    def evaluation(self, reader: SetReader, shard: int, index: int) -> Sample:
        """The sample as evaluation sees it: the prompt alone, no augmentation. Raises SampleError."""
        metadata, clips = self._read(reader, shard, index)
        return self._make(reader, shard, index, metadata, clips, evaluate=True)

    def training(self, reader: SetReader, order: SetOrder, lane: int, position: int, progress: float) -> Sample:
        """The sample at a lane's position, joined and augmented as of `progress` (0 to 1). Raises SampleError."""
        shard, index = self.find(reader, order, lane, position)
        metadata, clips = self._read(reader, shard, index)
        rng = np.random.Generator(np.random.PCG64(hash_of(self.seed, "augment", order.name, lane, position)))
        metadata, clips = self._join(reader, shard, index, metadata, clips, progress, rng)
        if self.config.augment.enabled:
            strength = self.config.augment.strength_at(progress)
            clips = tuple(augment(c, self.config.augment, strength, rng) for c in clips)
        return self._make(reader, shard, index, metadata, clips, evaluate=False)

    @staticmethod
    def find(reader: SetReader, order: SetOrder, lane: int, position: int) -> tuple[int, int]:
        """Shard, and index in it, of the sample at a lane's position."""
        address = order.locate(lane, position)
        return address.shard, reader.selected(address.shard)[address.rank_in_shard]

    def _read(self, reader: SetReader, shard: int, index: int) -> tuple[dict[str, Any], tuple[Clip, ...]]:
        key = (reader.shards.store.url, shard, index)
        if (found := self._cache.get(key)) is not None:
            return found
        raw = reader.shards.read(shard, index)
        check_metadata(raw.metadata)
        clips = tuple(decode_audio(data, self.config.max_audio_sec) for _, data in raw.clips)
        self._cache.put(key, raw.metadata, clips)
        return raw.metadata, clips

    def _make(
        self,
        reader: SetReader,
        shard: int,
        index: int,
        metadata: dict[str, Any],
        clips: tuple[Clip, ...],
        *,
        evaluate: bool,
    ) -> Sample:
        shortest = num_samples(self.config.min_audio_sec)
        padded = (np.pad(c, (0, max(0, shortest - len(c)))) for c in clips)
        tensors = tuple(torch.from_numpy(c) for c in padded)
        duration = sum(len(t) for t in tensors) / SAMPLE_RATE
        return make_sample(
            reader.shards.entry(shard, index).key,
            {**metadata, "set": reader.config.name, "duration": duration},
            tensors,
            self.tokenizer,
            self.strides,
            ctc=self.ctc,
            evaluate=evaluate,
        )

    def _join(
        self,
        reader: SetReader,
        shard: int,
        index: int,
        metadata: dict[str, Any],
        clips: tuple[Clip, ...],
        progress: float,
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], tuple[Clip, ...]]:
        join = self.config.join
        entry = reader.shards.entry(shard, index)
        if metadata["task"] != "asr" or len(clips) != 1 or join.probability == 0 or progress < join.start:
            return metadata, clips
        if rng.random() >= join.probability:
            return metadata, clips
        others = reader.joinable(shard, entry.subset)
        parts, answers, keys = [clips[0]], [metadata["answer"]], [entry.key]
        for _ in range(int(rng.integers(1, join.max_clips)) if others else 0):
            other = others[int(rng.integers(len(others)))]
            gap = np.zeros(num_samples(rng.uniform(0, join.gap_sec)), dtype=np.float32)
            try:
                more, joined = self._read(reader, shard, other)
            except SampleError:
                continue  # it is counted and listed where its own turn comes
            if sum(map(len, parts)) + len(gap) + len(joined[0]) > join.max_sec * SAMPLE_RATE:
                break
            parts += [gap, joined[0]]
            answers.append(more["answer"])
            keys.append(reader.shards.entry(shard, other).key)
        metadata = {**metadata, "answer": " ".join(answers), "joined": keys}
        return metadata, (np.concatenate(parts),)


def merge_counts(counts: list[Mapping[str, int]]) -> dict[str, int]:
    """Sum of counts by reason."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
