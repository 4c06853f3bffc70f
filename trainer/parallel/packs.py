"""The plan of packs, which are the LLM's packed sequences.

It determines the position of each sample, and the rows to move between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from model.llm.context import ContextPart
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
    """The number of rows of every pack, including padding. The pipeline requires the same number for all packs."""
    replicas: int
    """The number of LLM replicas."""
    pack: Ints
    """The number of each sample's pack, [n]. It is replica · num_microbatches + micro-batch."""
    num_tokens: Ints
    """The length of each sample in tokens, [n]."""

    @cached_property
    def row(self) -> Ints:
        """The first row of each sample in its pack, [n]."""
        return _starts(self.num_tokens, self.pack)

    def replica_rows(self, samples: Ints) -> Ints:
        """Return the first row of each of the given samples in the concatenation of its replica's packs.

        Only the packs of these samples are computed, which takes far less time than for all replicas.

        Args:
            samples: The indices of the samples in the global batch, in any order.
        """
        concerned = np.zeros(self.replicas * self.num_microbatches, dtype=bool)
        concerned[self.pack[samples]] = True
        members = np.flatnonzero(concerned[self.pack])
        pack = self.pack[members]
        row = pack % self.num_microbatches * self.pack_tokens + _starts(self.num_tokens[members], pack)
        return row[np.searchsorted(members, samples)]

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
        return self.replica_rows(np.arange(len(self.pack)))

    @cached_property
    def tokens_before(self) -> Ints:
        """The number of tokens of all samples before each sample in the global batch, [n]."""
        return np.cumsum(self.num_tokens) - self.num_tokens

    def with_lengths(self, kept: Ints, num_tokens: Ints, multiple: int) -> PackPlan:
        """Return a plan for companion sequences of some samples.

        A companion is assigned to the replica and micro-batch of its sample.

        Args:
            kept: The indices of the samples that have a companion, in ascending order.
            num_tokens: The length of each companion, at least 1.
            multiple: A divisor of the number of rows of a pack.
        """
        pack = self.pack[kept]
        longest = int(np.bincount(pack, weights=num_tokens, minlength=1).max())
        rows = max(multiple, -(-longest // multiple) * multiple)
        return PackPlan(self.num_microbatches, rows, self.replicas, pack, num_tokens)


def plan_packs(
    num_tokens: Sequence[int] | Ints, replicas: int, budget_tokens: int, multiple: int, packs_multiple: int = 1
) -> PackPlan:
    """Distribute samples over packs of equal length.

    Args:
        num_tokens: The lengths [n] of the samples of the global batch in tokens.
        replicas: The number of LLM replicas.
        budget_tokens: The largest number of rows of a pack. It is exceeded only if a sample is longer, or if `multiple`
            does not divide it.
        multiple: A divisor of the number of rows of a pack. It must be a multiple of `Topology.row_multiple`. Larger
            values lead to fewer distinct pack lengths and more padding.
        packs_multiple: A divisor of the number of packs of a replica. The samples are spread over all packs, so a
            larger number of packs makes each pack shorter.
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
    return PackPlan(microbatches, rows, replicas, pack, sizes)


def token_segments(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Segments:
    """Return the token rows to move from each sample's source rank to its replica's first and last pipeline stage.

    Args:
        plan: The packs of n samples.
        source_ranks: The rank that loaded each sample, [n]. A rank holds its samples in global order, without gaps.
        topology: The grid of ranks.
        rank: The rank that sends or receives. Segments between other ranks may be missing.
    """
    which = _samples_of(plan, source_ranks, topology, rank)
    columns = (source_ranks[which], _source_rows(plan, source_ranks, which), plan.replica_rows(which))
    replica, length = plan.pack[which] // plan.num_microbatches, plan.num_tokens[which]
    targets = _end_ranks(topology)[replica]
    # Segments between two other ranks are not needed.
    chosen = (source_ranks[which] == rank)[:, None] | (targets == rank)
    item = np.nonzero(chosen)[0]
    src, src_row, dst_row = (column[item] for column in columns)
    return Segments(src, src_row, targets[chosen], dst_row, length[item])


def embedding_segments(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Segments:
    """Return the rows of embeddings to move from each sample's source rank to the first pipeline stage.

    A row goes only to the context- and tensor-parallel rank whose slice of the pack contains it. On that rank, the
    index of the row is micro-batch · slice length + index in the slice.

    Args:
        plan: The packs of n samples.
        source_ranks: The rank that loaded each sample, [n]. A rank holds its samples in global order, without gaps.
        topology: The grid of ranks.
        rank: The rank that sends or receives. Segments between other ranks may be missing.
    """
    holders, places = _slices(topology)
    num_units = len(holders)
    unit = plan.pack_tokens // num_units
    share = plan.pack_tokens // (topology.tp * topology.cp)
    samples = _samples_of(plan, source_ranks, topology, rank)
    row, length = plan.replica_rows(samples), plan.num_tokens[samples]
    first, last = row // unit, (row + length - 1) // unit
    parts = last - first + 1
    which = np.repeat(np.arange(len(samples)), parts)
    piece = rows_of_spans(first, parts)
    begin = np.maximum(row[which], piece * unit)
    end = np.minimum((row + length)[which], (piece + 1) * unit)
    stages = _first_stages(topology)
    microbatch, in_pack = np.divmod(piece, num_units)
    return Segments(
        src=source_ranks[samples[which]],
        src_row=_source_rows(plan, source_ranks, samples)[which] + begin - row[which],
        dst=stages[plan.pack[samples[which]] // plan.num_microbatches, holders[in_pack]],
        dst_row=microbatch * share + places[in_pack] * unit + begin - piece * unit,
        length=end - begin,
    )


@cache
def _slices(topology: Topology) -> tuple[Ints, Ints]:
    """Divide the rows of a pack into U units of equal length, and return the rank of a stage that holds each unit.

    With context parallelism, there are TP units in each of the 2·CP chunks (`model.llm.context.ContextPart`). A rank's
    slice then consists of two units, which may be in different chunks.

    Returns:
        The index in `Topology.stage_ranks` of the rank that holds each unit, and the index of the unit in the rank's
        slice, both [U].
    """
    if topology.cp == 1:
        return np.arange(topology.tp), np.zeros(topology.tp, dtype=np.int64)
    held = np.stack([ContextPart(cp, topology.cp).rows(topology.row_multiple) for cp in range(topology.cp)])
    holders, places = np.empty((2, topology.row_multiple), dtype=np.int64)
    holders[held.ravel()], places[held.ravel()] = np.divmod(np.arange(topology.row_multiple), 2)
    return holders, places


@cache
def _first_stages(topology: Topology) -> Ints:
    """Return the ranks of the first stage of each replica, [replicas, ranks of a stage]."""
    return np.array([topology.first_stage_ranks(d) for d in range(topology.dp)], dtype=np.int64)


@cache
def _end_ranks(topology: Topology) -> Ints:
    """Return the ranks of the first and the last stage of each replica, [replicas, number of these ranks]."""
    ends = [sorted({*topology.first_stage_ranks(d), *topology.last_stage_ranks(d)}) for d in range(topology.dp)]
    return np.array(ends, dtype=np.int64)


def _samples_of(plan: PackPlan, source_ranks: Ints, topology: Topology, rank: int) -> Ints:
    """Return the samples that a rank loaded or that its replica processes, in order."""
    first = topology.coordinates(rank).dp * plan.num_microbatches
    concerned = np.zeros(plan.replicas * plan.num_microbatches, dtype=bool)
    concerned[first : first + plan.num_microbatches] = True
    is_concerned = concerned[plan.pack]
    begin, end = np.searchsorted(source_ranks, [rank, rank + 1])
    is_concerned[begin:end] = True
    return np.flatnonzero(is_concerned)


def _source_rows(plan: PackPlan, source_ranks: Ints, samples: Ints) -> Ints:
    """Return the first row of each of the given samples in the concatenation of its source rank's samples."""
    before = plan.tokens_before
    return before[samples] - before[np.searchsorted(source_ranks, source_ranks[samples])]


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
