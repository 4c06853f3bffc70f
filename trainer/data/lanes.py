"""The order of samples, as a pure function of the seed, the dataset weights and a few integers.

One epoch of a dataset is a sequence of its samples. The shards are shuffled, then the chunks within each shard, then
the samples within each chunk. (A chunk is a group of consecutive samples that one read of the store returns.) Samples
of one chunk rarely meet in a batch, because a lane gives each batch only one sample or a few.

The sequence is cut into L = `num_lanes` contiguous blocks. In epoch e, lane l reads block (l + e) mod L, and then
continues with epoch e + 1. In L epochs every lane reads every sample once. Lanes therefore keep the same pace even if
the dataset does not divide evenly or has fewer samples than there are lanes. How far a lane has read a dataset is one
integer, its position. Finding the sample takes the same time at every position.

The k-th global batch consists of the next `global_batch_samples / num_lanes` samples of every lane. Each rank owns
consecutive lanes. The concatenation of the ranks' batches is therefore the global batch in lane order, for any number
of ranks.
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
"""2^64 divided by the golden ratio. Its multiples modulo 2^64 are evenly distributed (a Weyl sequence)."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class LaneSpan:
    """Consecutive samples of a lane that belong to the same chunk."""

    epoch: int
    shard: int
    indices: tuple[int, ...]
    """The samples in the order in which they are read, as indices among the selected samples of the shard."""


def hash_of(*key: int | str) -> int:
    """Return a 64-bit hash of `key` that is the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of 0, ..., n-1 that depends on `key` only.

    NumPy's random streams are not used, since they may change between its versions.
    """
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash_of(*key))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


def lanes_of_rank(rank: int, world: int, num_lanes: int) -> range:
    """Return the lanes that `rank` reads. Some ranks have none if there are more ranks than lanes."""
    return range(rank * num_lanes // world, (rank + 1) * num_lanes // world)


class DatasetOrder:
    """The order of one dataset, which maps a lane and a position to a sample.

    Args:
        name: name of the dataset. Datasets of different names have different orders.
        num_per_shard: number of selected samples of each shard; their sum must be positive.
        seed: seed of the order.
        num_lanes: number of lanes.
        shuffle: if false, samples are in stored order.
        chunk_samples: number of samples of a chunk.
    """

    def __init__(
        self,
        name: str,
        num_per_shard: Sequence[int],
        seed: int,
        num_lanes: int,
        shuffle: bool,
        chunk_samples: int,
    ) -> None:
        self.name = name
        self.num_per_shard = np.asarray(num_per_shard, dtype=np.int64)
        self.num_samples = int(self.num_per_shard.sum())
        self.seed, self.num_lanes, self.shuffle, self.chunk_samples = seed, num_lanes, shuffle, chunk_samples
        assert self.num_samples > 0 and chunk_samples > 0
        self._epoch = lru_cache(maxsize=4)(self._shards_of_epoch)

    def span(self, lane: int, position: int) -> LaneSpan:
        """Return the samples of `lane` from `position` to the end of the chunk that it is in.

        Args:
            lane: number of the lane.
            position: number of samples that the lane has read before; it is not limited by the size of the dataset.
        """
        # A cycle is num_lanes epochs, in which the lane reads every block once.
        cycle, offset = divmod(position, self.num_samples)
        turn = 0
        while offset >= (size := self._start(lane + turn + 1) - self._start(lane + turn)):
            offset -= size
            turn += 1
        epoch = cycle * self.num_lanes + turn
        index_in_epoch = self._start((lane + turn) % self.num_lanes) + offset
        shards, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, index_in_epoch, side="right"))
        shard = int(shards[at])
        indices = self._rest_of_chunk(epoch, shard, index_in_epoch - (int(ends[at - 1]) if at else 0))
        return LaneSpan(epoch, shard, tuple(indices[: size - offset].tolist()))

    def chunk_of(self, shard: int, index: int) -> range:
        """Return the indices of the chunk that contains `index`."""
        start = index - index % self.chunk_samples
        return range(start, min(start + self.chunk_samples, int(self.num_per_shard[shard])))

    def _start(self, block: int) -> int:
        """Return the first sample of a block; blocks beyond `num_lanes` repeat, shifted by the size of the dataset."""
        return block * self.num_samples // self.num_lanes

    def _shards_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the order of an epoch, and the number of samples up to the end of each."""
        n = len(self.num_per_shard)
        order = permutation(n, self.seed, self.name, epoch) if self.shuffle else np.arange(n)
        return order, np.cumsum(self.num_per_shard[order])

    def _rest_of_chunk(self, epoch: int, shard: int, offset: int) -> NDArray[np.int64]:
        """Return the indices from the `offset`-th in the shard's order to the end of its chunk."""
        num_chunks = -(-int(self.num_per_shard[shard]) // self.chunk_samples)
        order = permutation(num_chunks, self.seed, self.name, epoch, shard, "chunks") if self.shuffle else None
        # All chunks have the same size, except the one that is stored last.
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
    """The choice of the dataset of each draw.

    The shares follow the weights closely over any short time, not only on average.

    Args:
        datasets: the datasets with their weights.
        seed: seed of the choice.
        num_lanes: number of lanes.
        num_per_lane: samples that each lane gives to a batch.
        num_samples: number of samples of each dataset; used only with a temperature.
        temperature: see `DataConfig.temperature`.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        seed: int,
        num_lanes: int,
        num_per_lane: int,
        num_samples: Sequence[int] = (),
        temperature: float | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.seed, self.num_lanes, self.num_per_lane = seed, num_lanes, num_per_lane
        self.factors = [1.0] * len(datasets) if temperature is None else [n ** (1 / temperature) for n in num_samples]

    def weights_at(self, progress: float) -> list[float]:
        """Return the weight of every dataset at `progress` (0 to 1). They need not sum to 1."""
        return [f * s.weight_at(progress) for f, s in zip(self.factors, self.datasets, strict=True)]

    def choose(self, batch: int, lane: int, draw: int, progress: float) -> int:
        """Return the index of the dataset of a draw.

        Args:
            batch: number of the global batch.
            lane: number of the lane.
            draw: number of the draw among the lane's draws for the batch.
            progress: progress of the training (0 to 1), which determines the weights.
        """
        weights = self.weights_at(progress)
        # Lanes change places from batch to batch; at a fixed place a lane could draw from one dataset for a long time.
        turn = (lane + hash_of(self.seed, "blend", batch)) % self.num_lanes
        number = (batch * self.num_lanes + turn) * self.num_per_lane + draw
        point = (number * _GOLDEN & _MASK) / (1 << 64) * sum(weights)
        last = 0
        for index, weight in enumerate(weights):
            if weight > 0:
                last = index
                if point < weight:
                    return index
                point -= weight
        return last  # rounding may put the point beyond the last weight
