"""Plans: pure functions of small integers that every rank knows. Same inputs, same plan, on every rank.

A `Route` is one rank's part of a ragged all-to-all: which of its rows go to whom, and where arriving rows are put.
A `PackPlan` says at which (replica, micro-batch, position) of the LLM each sample of the global batch lies.
`encoder_calls` says in how many calls every rank runs an encoder.

Everything is NumPy: planning never touches a device and never communicates.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.parallel.topology import Topology

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Runs of rows to be moved: `length` rows from `src_row` of rank `src` to `dst_row` of rank `dst`, each [runs]."""

    src: Ints
    src_row: Ints
    dst: Ints
    dst_row: Ints
    length: Ints

    @staticmethod
    def of(rows: Sequence[tuple[int, int, int, int, int]]) -> Segments:
        """From (src, src_row, dst, dst_row, length) tuples."""
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return Segments(*(np.ascontiguousarray(column) for column in table.T))


@dataclass(frozen=True)
class Route:
    """One rank's part of an exchange over `world` ranks."""

    send_rows: Ints
    """Own rows to send, by destination rank."""
    send_counts: Ints
    """[world] how many of them go to each rank."""
    recv_rows: Ints
    """Where arriving rows (by source rank) are put."""
    recv_counts: Ints
    """[world] how many arrive from each rank."""
    num_out: int
    """Rows after the exchange."""

    def restricted(self, keep_sent: NDArray[np.bool_], keep_received: NDArray[np.bool_]) -> Route:
        """Only rows whose flag is set; the two flags of a row, at its source and its destination, must agree.

        Args:
            keep_sent: per own row before the exchange.
            keep_received: per row after it.
        """
        sent, received = keep_sent[self.send_rows], keep_received[self.recv_rows]
        return Route(
            self.send_rows[sent],
            _count_true(sent, self.send_counts),
            self.recv_rows[received],
            _count_true(received, self.recv_counts),
            self.num_out,
        )

    def renumbered(self, names: Ints) -> Route:
        """The same movement where own row r is now called `names[r]`."""
        return replace(self, send_rows=names[self.send_rows])


def route(segments: Segments, rank: int, world: int, num_out: int) -> Route:
    """`rank`'s part of moving `segments`; `num_out` rows exist after the exchange on this rank."""
    sent, received = np.flatnonzero(segments.src == rank), np.flatnonzero(segments.dst == rank)
    # Stable sorts: sender and receiver list the rows of a pair of ranks in the same order.
    sent = sent[np.argsort(segments.dst[sent], kind="stable")]
    received = received[np.argsort(segments.src[received], kind="stable")]
    length = segments.length

    def counts(peer: Ints, which: Ints) -> Ints:
        return np.bincount(peer[which], weights=length[which], minlength=world).astype(np.int64)

    return Route(
        runs(segments.src_row[sent], length[sent]),
        counts(segments.dst, sent),
        runs(segments.dst_row[received], length[received]),
        counts(segments.src, received),
        num_out,
    )


def runs(starts: Ints, lengths: Ints) -> Ints:
    """start, start+1, …, start+length-1 for each pair, end to end."""
    total = int(lengths.sum())
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(total, dtype=np.int64)


def _count_true(flags: NDArray[np.bool_], group_sizes: Ints) -> Ints:
    ends = np.cumsum(group_sizes)
    sums = np.concatenate([[0], np.cumsum(flags)])
    return (sums[ends] - sums[ends - group_sizes]).astype(np.int64)


def balance(costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Longest processing time first: each item, the costliest first, goes to the bin that has least.

    Returns the items of every bin, ascending. Graham 1969: the fullest bin is at most 4/3 of the optimum.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b) for b in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, b = heapq.heappop(heap)
        bins[b].append(item)
        heapq.heappush(heap, (load + costs[item], b))
    return [sorted(b) for b in bins]


def place_experts(costs: Sequence[float], ep: int) -> tuple[int, ...]:
    """Which of the `ep` slots of an expert-parallel group holds each expert: the costliest first, where least is."""
    slots = balance(costs, ep)
    return tuple(next(slot for slot, experts in enumerate(slots) if expert in experts) for expert in range(len(costs)))


@dataclass(frozen=True)
class PackPlan:
    """Where each sample of the global batch lies in the LLM's packed sequences."""

    num_microbatches: int
    """Packs per replica."""
    pack_tokens: int
    """Rows of every pack, filled up with padding: one shape for the whole pipeline."""
    members: tuple[tuple[tuple[int, ...], ...], ...]
    """Samples (index in the global batch) of pack [replica][micro-batch], in order."""
    num_tokens: tuple[int, ...]
    """Per sample."""

    def lengths(self, replica: int, microbatch: int) -> tuple[int, ...]:
        """Segment lengths of a pack; what fills it up is the last segment."""
        used = tuple(self.num_tokens[i] for i in self.members[replica][microbatch])
        rest = self.pack_tokens - sum(used)
        return (*used, rest) if rest else used

    def samples_of_rows(self, replica: int) -> Ints:
        """[num_microbatches · pack_tokens] the sample each row belongs to; -1 where it is padding."""
        owner = np.full(self.num_microbatches * self.pack_tokens, -1, dtype=np.int64)
        for m, members in enumerate(self.members[replica]):
            row = m * self.pack_tokens
            for i in members:
                owner[row : row + self.num_tokens[i]] = i
                row += self.num_tokens[i]
        return owner

    @property
    def padding_share(self) -> float:
        """Share of the LLM's rows that are padding."""
        rows = len(self.members) * self.num_microbatches * self.pack_tokens
        return 1.0 - sum(self.num_tokens) / rows


def plan_packs(num_tokens: Sequence[int], replicas: int, budget_tokens: int, multiple: int) -> PackPlan:
    """Spread samples over `replicas` × micro-batches so that all packs are equally long.

    Args:
        num_tokens: per sample of the global batch.
        replicas: data-parallel size of the LLM.
        budget_tokens: a pack holds at most this many rows, unless a single sample is longer.
        multiple: pack length is a multiple of this (tensor-parallel size).
    """
    sizes = [int(n) for n in num_tokens]
    limit = max(budget_tokens, max(sizes, default=0))
    microbatches = max(1, -(-sum(sizes) // (replicas * limit)))
    while True:
        bins = balance(sizes, replicas * microbatches)
        longest = max((sum(sizes[i] for i in b) for b in bins), default=0)
        if longest <= limit:
            break
        microbatches += 1
    rows = max(multiple, -(-longest // multiple) * multiple)
    members = tuple(tuple(tuple(bins[m * replicas + d]) for m in range(microbatches)) for d in range(replicas))
    return PackPlan(microbatches, rows, members, tuple(sizes))


def placements(plan: PackPlan, homes: Sequence[int], world: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(home, first row there, replica, first row in the replica's packs, length) of every sample.

    `homes[i]` is the rank that loaded sample i; the samples of a home lie there end to end, in global order.
    """
    first_row, filled = [], [0] * world
    for i, home in enumerate(homes):
        first_row.append(filled[home])
        filled[home] += plan.num_tokens[i]
    for d, microbatches in enumerate(plan.members):
        for m, members in enumerate(microbatches):
            row = m * plan.pack_tokens
            for i in members:
                yield homes[i], first_row[i], d, row, plan.num_tokens[i]
                row += plan.num_tokens[i]


def token_segments(plan: PackPlan, homes: Sequence[int], topology: Topology) -> Segments:
    """Token rows from every sample's home to all ranks of its replica's first and last stage."""
    moves = []
    for home, start, d, row, length in placements(plan, homes, topology.world):
        targets = sorted({*topology.first_stage_ranks(d), *topology.last_stage_ranks(d)})
        moves += [(home, start, target, row, length) for target in targets]
    return Segments.of(moves)


def embedding_segments(plan: PackPlan, homes: Sequence[int], topology: Topology) -> Segments:
    """Token rows from every sample's home to the first stage, each to the one tensor rank whose slice of the sequence
    (sequence parallelism) holds it. There, rows are numbered micro-batch · slice length + place in the slice."""
    share = plan.pack_tokens // topology.tp
    moves = []
    for home, start, d, row, length in placements(plan, homes, topology.world):
        ranks = topology.first_stage_ranks(d)
        end = row + length
        while row < end:
            microbatch, place = divmod(row, plan.pack_tokens)
            tensor_rank, offset = divmod(place, share)
            part = min(end - row, share - offset)
            moves.append((home, start, ranks[tensor_rank], microbatch * share + offset, part))
            row, start = row + part, start + part
    return Segments.of(moves)


CALL_COST_SAMPLES = 160_000
"""What one more encoder call costs, as audio: ten seconds. Every call passes ZeRO-3's hooks of every module."""


def encoder_calls(lengths_by_rank: Sequence[Sequence[int]], budget: int) -> int:
    """In how many calls every rank runs an encoder: the largest number that any rank's clips (lengths in samples) need,
    since all ranks must call it equally often; at least 1."""
    return max((len(group_by_length(lengths, budget)) for lengths in lengths_by_rank), default=1)


def group_by_length(lengths: Sequence[int], budget: int, num_groups: int | None = None) -> list[list[int]]:
    """Split clips into padded batches with the least padding.

    The clips, sorted by length, are cut where Σ (count · longest + CALL_COST_SAMPLES) is smallest (dynamic
    programming, exact).

    Args:
        lengths: of the clips, in samples.
        budget: largest count · longest of a batch; a single longer clip is a batch of its own.
        num_groups: fill up with empty groups to this number.

    Returns:
        Groups of indices into `lengths`; without clips, one empty group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        for start in range(end - 1, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if padded > budget and end - start > 1:
                break
            if best[start] + padded + CALL_COST_SAMPLES < best[end]:
                best[end], cut[end] = best[start] + padded + CALL_COST_SAMPLES, start
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    groups = groups[::-1] or [[]]
    if num_groups is None:
        return groups
    assert len(groups) <= num_groups, (len(groups), num_groups)
    return groups + [[] for _ in range(num_groups - len(groups))]
