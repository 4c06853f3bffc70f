"""The order of samples, as a pure function of the seed, the dataset weights and a few integers.

One epoch of a dataset is a sequence that contains each of its samples once. If shuffling is enabled, the shards are
reshuffled for each epoch, then the chunks within each shard, and then the samples within each chunk. (A chunk is a
group of consecutive samples that one read of the store returns.) Samples of the same chunk are rarely in the same
batch, because each lane contributes only a few samples to a batch.

The sequence is cut into L = `num_lanes` contiguous blocks. In epoch e, lane l reads block (l + e) mod L, and then
continues with epoch e + 1. In L epochs, every lane reads each of the L blocks once. All lanes therefore advance through
the epochs at the same rate, even if the blocks differ in size or some are empty. With shuffling, the blocks contain
different samples in each epoch, so one lane may read a sample several times or never in L epochs. All lanes together
still read each sample once per epoch. The progress of a lane in a dataset is one integer, its position. Finding the
sample at a position takes the same time for every position.

The k-th global batch consists of the next `global_batch_samples / num_lanes` samples of every lane. Each rank reads
consecutive lanes. The batches of all ranks, concatenated in rank order, are therefore the global batch in lane order,
for any number of ranks.
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
"""2^64 divided by the golden ratio. The multiples of this number modulo 2^64 are evenly distributed (a Weyl
sequence)."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class LaneSpan:
    """Consecutive samples of one lane that belong to the same chunk."""

    epoch: int
    shard: int
    indices: tuple[int, ...]
    """The samples in reading order, as indices into the shard's selected samples."""


def hash_of(*key: int | str) -> int:
    """Return a 64-bit hash of `key` that is the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of 0, ..., n-1 that depends only on `key` and `n`.

    NumPy's random generators are not used, since their streams may change between versions of NumPy.
    """
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash_of(*key))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


def lanes_of_rank(rank: int, world: int, num_lanes: int) -> range:
    """Return the lanes that `rank` reads. The range is empty for some ranks if there are more ranks than lanes."""
    return range(rank * num_lanes // world, (rank + 1) * num_lanes // world)


class DatasetOrder:
    """The order of one dataset, which maps a lane and a position in that lane to a sample.

    Args:
        name: The name of the dataset. Datasets with different names are shuffled differently.
        num_per_shard: The number of selected samples in each shard; at least one must be positive.
        seed: The seed for shuffling.
        num_lanes: The number of lanes.
        shuffle: If false, samples are read in the order in which they are stored.
        chunk_samples: The number of samples in a chunk; the last chunk of a shard may have fewer.
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
        """Return the samples of `lane` that start at `position` and belong to the same chunk.

        The span ends with the chunk, or with the block that the lane reads in this epoch, whichever ends first.

        Args:
            lane: The number of the lane.
            position: The number of samples that the lane has already read from this dataset; it may exceed the size of
                the dataset.
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
        """Return the indices of all samples in the chunk that contains the sample `index` of `shard`."""
        start = index - index % self.chunk_samples
        return range(start, min(start + self.chunk_samples, int(self.num_per_shard[shard])))

    def _start(self, block: int) -> int:
        """Return the index of the first sample of `block` in the sequence of an epoch.

        Block numbers may exceed `num_lanes` - 1. Block `num_lanes` + b stands for block b of a second pass over the
        sequence, so its start is larger by the number of samples.
        """
        return block * self.num_samples // self.num_lanes

    def _shards_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the order in which an epoch reads them, and the cumulative number of samples."""
        n = len(self.num_per_shard)
        order = permutation(n, self.seed, self.name, epoch) if self.shuffle else np.arange(n)
        return order, np.cumsum(self.num_per_shard[order])

    def _rest_of_chunk(self, epoch: int, shard: int, offset: int) -> NDArray[np.int64]:
        """Return the indices of the samples from position `offset` of the shuffled shard to the end of their chunk."""
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
    """The rule that chooses the dataset from which each sample is drawn.

    After only a few batches, the fraction of draws from each dataset is close to its normalized weight.

    Args:
        datasets: The datasets with their weights.
        seed: The seed for the choice.
        num_lanes: The number of lanes.
        num_per_lane: The number of samples that each lane contributes to a batch.
        num_samples: The number of samples of each dataset; used only with a temperature.
        temperature: The value of `DataConfig.temperature`.
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
        """Return the weights of all datasets at `progress` (0 to 1). The weights need not sum to 1."""
        return [f * s.weight_at(progress) for f, s in zip(self.factors, self.datasets, strict=True)]

    def choose(self, batch: int, lane: int, draw: int, progress: float) -> int:
        """Return the index of the dataset from which a sample is drawn.

        Args:
            batch: The number of the global batch.
            lane: The number of the lane.
            draw: The number of the draw among the draws of this lane for this batch.
            progress: The progress of the training (0 to 1), which determines the weights.
        """
        weights = self.weights_at(progress)
        # The lanes are rotated for each batch; otherwise a lane could draw from the same dataset for a long time.
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
        return last  # Rounding may place the point beyond the last weight.
