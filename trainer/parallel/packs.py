"""Planning of the LLM's packed sequences: the position of each sample, and the rows to move between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.parallel.balance import spread, stable_order
from trainer.parallel.plan import Ints, Segments, rows_of_spans
from trainer.parallel.topology import Topology


@dataclass(frozen=True)
class PackPlan:
    """The positions of n samples in the packs of all replicas.

    Within a pack, samples are in the order of the global batch.
    """

    num_microbatches: int
    """The number of packs of each replica."""
    pack_tokens: int
    """The number of rows of every pack, including padding. It is the same for all packs, as the pipeline needs."""
    replicas: int
    """The number of LLM replicas."""
    pack: Ints
    """The pack of each sample, [n], which is replica · num_microbatches + micro-batch."""
    row: Ints
    """The first row of each sample in its pack, [n]."""
    num_tokens: Ints
    """The length of each sample in tokens, [n]."""

    def members(self, replica: int, microbatch: int) -> Ints:
        """Return the samples of a pack, in order, as indices into the global batch."""
        return np.flatnonzero(self.pack == replica * self.num_microbatches + microbatch)

    def lengths(self, replica: int, microbatch: int) -> tuple[int, ...]:
        """Return the segment lengths of a pack. Padding, if any, is the last segment."""
        used = self.num_tokens[self.members(replica, microbatch)].tolist()
        rest = self.pack_tokens - sum(used)
        return (*used, rest) if rest else tuple(used)

    @cached_property
    def replica_row(self) -> Ints:
        """The first row of each sample in the concatenation of its replica's packs, [n]."""
        return self.pack % self.num_microbatches * self.pack_tokens + self.row

    def with_lengths(self, kept: Ints, num_tokens: Ints, multiple: int) -> PackPlan:
        """Return a plan for companions of the samples `kept`, each in the same replica and micro-batch as its sample.

        Args:
            kept: The indices of the samples that have a companion, in order.
            num_tokens: The length of each companion, at least 1.
            multiple: The number of rows of a pack is a multiple of this.
        """
        pack = self.pack[kept]
        longest = int(np.bincount(pack, weights=num_tokens, minlength=1).max())
        rows = max(multiple, -(-longest // multiple) * multiple)
        return PackPlan(self.num_microbatches, rows, self.replicas, pack, _starts(num_tokens, pack), num_tokens)


def plan_packs(
    num_tokens: Sequence[int] | Ints, replicas: int, budget_tokens: int, multiple: int, packs_multiple: int = 1
) -> PackPlan:
    """Distribute samples over packs of equal length.

    Args:
        num_tokens: The lengths [n] of the samples of the global batch in tokens.
        replicas: The number of LLM replicas.
        budget_tokens: The largest number of rows of a pack. It is exceeded only if a sample is longer, or if it is not
            divisible by `multiple`.
        multiple: The number of rows of a pack is a multiple of this, which must be a multiple of the tensor-parallel
            size. Larger values lead to fewer distinct pack lengths and more padding.
        packs_multiple: The number of packs of a replica is a multiple of this. The samples are spread over all packs,
            so that more packs are shorter ones.
    """
    sizes = np.asarray(num_tokens, dtype=np.int64)
    limit = max(budget_tokens, int(sizes.max(initial=0)))
    microbatches = max(1, -(-int(sizes.sum()) // (replicas * limit)))
    microbatches = -(-microbatches // packs_multiple) * packs_multiple
    while True:
        bins = spread(sizes.astype(np.float64), replicas * microbatches)
        longest = int(np.bincount(bins, weights=sizes, minlength=1).max())
        if longest <= limit:
            break
        microbatches += packs_multiple
    rows = max(multiple, -(-longest // multiple) * multiple)
    pack = bins % replicas * microbatches + bins // replicas
    return PackPlan(microbatches, rows, replicas, pack, _starts(sizes, pack), sizes)


def token_segments(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Segments:
    """Return the token rows to move from each sample's source rank to its replica's first and last pipeline stage.

    Args:
        plan: The packs of n samples.
        source_ranks: [n], the rank that loaded each sample. It holds its samples in global order, without gaps.
        topology: The grid of ranks.
        rank: The rank that sends or receives. Segments between other ranks may be missing.
    """
    which = _samples_of(plan, source_ranks, topology, rank)
    ends = [sorted({*topology.first_stage_ranks(d), *topology.last_stage_ranks(d)}) for d in range(topology.dp)]
    targets = np.array(ends, dtype=np.int64)
    num_targets = targets.shape[1]
    src, src_row, dst_row, length = (
        np.repeat(column[which], num_targets)
        for column in (source_ranks, _starts(plan.num_tokens, source_ranks), plan.replica_row, plan.num_tokens)
    )
    return Segments(src, src_row, targets[plan.pack[which] // plan.num_microbatches].ravel(), dst_row, length)


def embedding_segments(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Segments:
    """Return the rows of embeddings to move from each sample's source rank to the first pipeline stage.

    With sequence parallelism, a row goes only to the tensor-parallel rank whose slice of the sequence contains it.
    There, its index is micro-batch · slice length + index in the slice.

    Args:
        plan: The packs of n samples.
        source_ranks: [n], the rank that loaded each sample. It holds its samples in global order, without gaps.
        topology: The grid of ranks.
        rank: The rank that sends or receives. Segments between other ranks may be missing.
    """
    share = plan.pack_tokens // topology.tp
    samples = _samples_of(plan, source_ranks, topology, rank)
    row = plan.replica_row[samples]
    first, last = row // share, (row + plan.num_tokens[samples] - 1) // share
    parts = last - first + 1
    which = np.repeat(samples, parts)
    piece = rows_of_spans(first, parts)
    begin = np.maximum(plan.replica_row[which], piece * share)
    end = np.minimum((plan.replica_row + plan.num_tokens)[which], (piece + 1) * share)
    stages = np.array([topology.first_stage_ranks(d) for d in range(topology.dp)], dtype=np.int64)
    microbatch, tensor_rank = np.divmod(piece, topology.tp)
    return Segments(
        src=source_ranks[which],
        src_row=_starts(plan.num_tokens, source_ranks)[which] + begin - plan.replica_row[which],
        dst=stages[plan.pack[which] // plan.num_microbatches, tensor_rank],
        dst_row=microbatch * share + begin - piece * share,
        length=end - begin,
    )


def _samples_of(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Ints:
    """Return the samples that a rank loaded or that its replica processes, in order."""
    first = topology.coordinates(rank).dp * plan.num_microbatches
    return np.flatnonzero((source_ranks == rank) | ((plan.pack >= first) & (plan.pack < first + plan.num_microbatches)))


def _starts(lengths: Ints, owners: Ints) -> Ints:
    """Return the start of each item in the concatenation of its owner's items, [n]."""
    is_sorted = bool((owners[1:] >= owners[:-1]).all())
    by_owner = np.arange(len(owners)) if is_sorted else stable_order(owners, int(owners.max(initial=0)) + 1)
    ends = np.cumsum(lengths[by_owner])
    begins = ends - lengths[by_owner]
    sizes = np.bincount(owners)
    sizes = sizes[sizes > 0]
    first = np.cumsum(sizes) - sizes
    starts = np.empty_like(begins)
    starts[by_owner] = begins - np.repeat(begins[first], sizes)
    return starts
