"""Where each sample of the global batch lies in the LLM's packed sequences, and what must move to get it there."""

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
    """The place of n samples in replicas × micro-batches. Samples of a pack lie in it end to end, in global order."""

    num_microbatches: int
    """Packs per replica."""
    pack_tokens: int
    """Rows of every pack, filled up with padding: one shape for the whole pipeline."""
    replicas: int
    pack: Ints
    """[n] replica · num_microbatches + micro-batch."""
    row: Ints
    """[n] first row within the pack."""
    num_tokens: Ints
    """[n]"""

    def members(self, replica: int, microbatch: int) -> Ints:
        """The samples (index in the global batch) of a pack, in order."""
        return np.flatnonzero(self.pack == replica * self.num_microbatches + microbatch)

    def lengths(self, replica: int, microbatch: int) -> tuple[int, ...]:
        """Segment lengths of a pack; what fills it up is the last segment."""
        used = self.num_tokens[self.members(replica, microbatch)].tolist()
        rest = self.pack_tokens - sum(used)
        return (*used, rest) if rest else tuple(used)

    @cached_property
    def replica_row(self) -> Ints:
        """[n] first row in the replica's packs, laid end to end."""
        return self.pack % self.num_microbatches * self.pack_tokens + self.row

    def with_lengths(self, kept: Ints, num_tokens: Ints, multiple: int) -> PackPlan:
        """Return a plan that sends companions of the samples `kept` where these samples go.

        Args:
            kept: The indices of the samples that have a companion, in order.
            num_tokens: The length of each companion, at least 1.
            multiple: The number of which the rows of a pack are a multiple.
        """
        pack = self.pack[kept]
        longest = int(np.bincount(pack, weights=num_tokens, minlength=1).max())
        rows = max(multiple, -(-longest // multiple) * multiple)
        return PackPlan(self.num_microbatches, rows, self.replicas, pack, _starts(num_tokens, pack), num_tokens)


def plan_packs(num_tokens: Sequence[int] | Ints, replicas: int, budget_tokens: int, multiple: int) -> PackPlan:
    """Spread samples over `replicas` × micro-batches so that all packs are equally long.

    A pack exceeds `budget_tokens` only where a sample does, or where `multiple` does not divide it.

    Args:
        num_tokens: [n] of the samples of the global batch.
        replicas: data-parallel size of the LLM.
        budget_tokens: a pack holds at most this many rows, unless a single sample is longer.
        multiple: pack length in rows is a multiple of this, and this a multiple of the tensor-parallel size. The larger
            it is, the fewer lengths there are, and the more rows are padding.
    """
    sizes = np.asarray(num_tokens, dtype=np.int64)
    limit = max(budget_tokens, int(sizes.max(initial=0)))
    microbatches = max(1, -(-int(sizes.sum()) // (replicas * limit)))
    while True:
        bins = spread(sizes.astype(np.float64), replicas * microbatches)
        longest = int(np.bincount(bins, weights=sizes, minlength=1).max())
        if longest <= limit:
            break
        microbatches += 1
    rows = max(multiple, -(-longest // multiple) * multiple)
    pack = bins % replicas * microbatches + bins // replicas
    return PackPlan(microbatches, rows, replicas, pack, _starts(sizes, pack), sizes)


def token_segments(plan: PackPlan, source_ranks: Ints, topology: Topology) -> Segments:
    """Token rows from every sample's home to all ranks of its replica's first and last stage.

    Args:
        plan: of n samples.
        homes: [n] rank that loaded the sample; the samples of a home lie there end to end, in global order.
        topology: of the ranks.
    """
    ends = [sorted({*topology.first_stage_ranks(d), *topology.last_stage_ranks(d)}) for d in range(topology.dp)]
    targets = np.array(ends, dtype=np.int64)
    num_targets = targets.shape[1]
    src, src_row, dst_row, length = (
        np.repeat(column, num_targets)
        for column in (source_ranks, _starts(plan.num_tokens, source_ranks), plan.replica_row, plan.num_tokens)
    )
    return Segments(src, src_row, targets[plan.pack // plan.num_microbatches].ravel(), dst_row, length)


def embedding_segments(plan: PackPlan, source_ranks: Ints, topology: Topology) -> Segments:
    """Token rows from every sample's home to the first stage, each to the one tensor rank whose slice of the sequence
    (sequence parallelism) holds it. There, rows are numbered micro-batch · slice length + place in the slice.
    Arguments as for `token_segments`."""
    share = plan.pack_tokens // topology.tp
    first, last = plan.replica_row // share, (plan.replica_row + plan.num_tokens - 1) // share
    parts = last - first + 1
    which = np.repeat(np.arange(len(parts)), parts)
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


def _starts(lengths: Ints, owners: Ints) -> Ints:
    """[n] where each item begins when the items of an owner lie end to end in their order."""
    by_owner = stable_order(owners, int(owners.max(initial=0)) + 1)
    ends = np.cumsum(lengths[by_owner])
    begins = ends - lengths[by_owner]
    sizes = np.bincount(owners)
    sizes = sizes[sizes > 0]
    first = np.cumsum(sizes) - sizes
    starts = np.empty_like(begins)
    starts[by_owner] = begins - np.repeat(begins[first], sizes)
    return starts
