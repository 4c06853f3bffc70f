"""Which sample comes when: a pure function of (seed, epoch, blend) and small integers.

A set's epoch is the sequence E: its shards in a shuffled order, the chunks of each shard (neighbours in storage, one
read of the store) shuffled, the samples of each chunk shuffled. Shards are fair mixtures, and a lane gives a batch only
a sample or few, so neighbours do not meet in a batch. E is cut into `num_lanes` contiguous blocks. In epoch e lane l
reads block (l + e) mod L, then goes on with epoch e + 1: over L epochs every lane has read every sample once, so lanes
stay together even if the set does not divide evenly or has fewer samples than there are lanes. Where a lane stands in a
set is one integer, its position; to find the sample at a position costs the same at the first and at the billionth.

The k-th global batch takes the next `global_batch_samples / num_lanes` samples of every lane. Ranks own lanes in
contiguous runs, so the ranks' batches, one after another, are the global batch in lane order on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.config import DatasetConfig

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it, modulo 2^64, fill the range evenly (Weyl sequence)."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class LaneSpan:
    """Consecutive samples of a lane that lie in one chunk. `indices` count the selected samples of the shard."""

    epoch: int
    shard: int
    indices: tuple[int, ...]


def hash_of(*key: int | str) -> int:
    """64 bits that depend on all of `key`; the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of 0..n-1 drawn by `key` (numpy's own streams may change between versions)."""
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash_of(*key))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


def lanes_of_rank(rank: int, world: int, num_lanes: int) -> range:
    """Lanes that `rank` reads; empty for some ranks if there are more ranks than lanes."""
    return range(rank * num_lanes // world, (rank + 1) * num_lanes // world)


class DatasetOrder:
    """The order of one set: lane and position → sample."""

    def __init__(
        self,
        name: str,
        num_per_shard: Sequence[int],
        seed: int,
        num_lanes: int,
        shuffle: bool,
        chunk_samples: int,
    ) -> None:
        """`num_per_shard`: selected samples of each shard; their sum must be positive."""
        self.name = name
        self.num_per_shard = np.asarray(num_per_shard, dtype=np.int64)
        self.num_samples = int(self.num_per_shard.sum())
        self.seed, self.num_lanes, self.shuffle, self.chunk_samples = seed, num_lanes, shuffle, chunk_samples
        assert self.num_samples > 0 and chunk_samples > 0
        self._epoch = lru_cache(maxsize=4)(self._shards_of_epoch)

    def span(self, lane: int, position: int) -> LaneSpan:
        """The samples of `lane` from its `position`-th (from 0, without end) to the end of that one's chunk."""
        cycle, rest = divmod(position, self.num_samples)
        turn = 0
        while rest >= (size := self._start(lane + turn + 1) - self._start(lane + turn)):
            rest -= size
            turn += 1
        epoch = cycle * self.num_lanes + turn
        place = self._start((lane + turn) % self.num_lanes) + rest
        shards, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[at])
        indices = self._rest_of_chunk(epoch, shard, place - (int(ends[at - 1]) if at else 0))
        return LaneSpan(epoch, shard, tuple(indices[: size - rest].tolist()))

    def chunk_of(self, shard: int, index: int) -> range:
        """The ranks that are stored and read together with `index`."""
        start = index - index % self.chunk_samples
        return range(start, min(start + self.chunk_samples, int(self.num_per_shard[shard])))

    def _start(self, block: int) -> int:
        # Beyond num_lanes the blocks repeat, one set size further on.
        return block * self.num_samples // self.num_lanes

    def _shards_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n = len(self.num_per_shard)
        order = permutation(n, self.seed, self.name, epoch) if self.shuffle else np.arange(n)
        return order, np.cumsum(self.num_per_shard[order])

    def _rest_of_chunk(self, epoch: int, shard: int, offset: int) -> NDArray[np.int64]:
        """Ranks from the `offset`-th of the shard's order to the end of its chunk."""
        num_chunks = -(-int(self.num_per_shard[shard]) // self.chunk_samples)
        order = permutation(num_chunks, self.seed, self.name, epoch, shard, "chunks") if self.shuffle else None
        # All chunks are of one size, but for the stored last.
        last = num_chunks - 1 if order is None else int(np.flatnonzero(order == num_chunks - 1)[0])
        short = num_chunks * self.chunk_samples - int(self.num_per_shard[shard])
        at = offset // self.chunk_samples
        if at >= last:
            at = max(last, (offset + short) // self.chunk_samples)
        start = at * self.chunk_samples - (short if at > last else 0)
        chunk = self.chunk_of(shard, (at if order is None else int(order[at])) * self.chunk_samples)
        if order is None:
            return np.arange(chunk.start, chunk.stop)[offset - start :]
        within = permutation(len(chunk), self.seed, self.name, epoch, shard, chunk.start)
        return chunk.start + within[offset - start :]


class DatasetMixture:
    """Which set a draw takes: shares follow the weights closely at every moment, not only on average."""

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        seed: int,
        num_lanes: int,
        num_per_lane: int,
        num_samples: Sequence[int] = (),
        temperature: float | None = None,
    ) -> None:
        """`num_samples`: of each set, for `temperature` (see `DataConfig.temperature`)."""
        self.datasets = tuple(datasets)
        self.seed, self.num_lanes, self.num_per_lane = seed, num_lanes, num_per_lane
        self.factors = [1.0] * len(datasets) if temperature is None else [n ** (1 / temperature) for n in num_samples]

    def weights_at(self, progress: float) -> list[float]:
        """Of every set; they need not sum to one."""
        return [f * s.weight_at(progress) for f, s in zip(self.factors, self.datasets, strict=True)]

    def choose(self, batch: int, lane: int, draw: int, progress: float) -> int:
        """Index of the set that the `draw`-th sample of `lane` in global batch `batch` comes from."""
        weights = self.weights_at(progress)
        # Lanes take turns at the places of a batch: a lane at a fixed place could meet one set for a long time.
        turn = (lane + hash_of(self.seed, "blend", batch)) % self.num_lanes
        place = (batch * self.num_lanes + turn) * self.num_per_lane + draw
        point = (place * _GOLDEN & _MASK) / (1 << 64) * sum(weights)
        last = 0
        for place, weight in enumerate(weights):
            if weight > 0:
                last = place
                if point < weight:
                    return place
                point -= weight
        return last  # rounding may leave a point at the very end
