"""Differentiable exchanges of rows and sequences between ranks according to a plan.

All samples that move between ranks pass through this module. `exchange` moves rows: it copies them into the order in
which they are sent, and uses one collective. `deliver` moves whole sequences as point-to-point messages directly from
where they are stored in memory, which avoids this copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.transfer import to_device
from trainer.parallel.plan import Ints, Route, rows_of_spans
from trainer.parallel.tree import all_gather_numbers, broadcast_bytes


def exchange(rows: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """Move rows between ranks. In the backward pass, gradients are sent in the opposite direction.

    Collective: every rank of `group` must call it, even if it has nothing to send.

    If the rows of any rank require a gradient, the rows of all ranks must require one. A row may be sent to several
    ranks. Its gradient is then the sum of the gradients from these ranks.

    Args:
        rows: This rank's rows, [N, …].
        route: The rows to send and to receive.
        group: The ranks; None for the world.

    Returns:
        The received rows [route.num_out, …] in the dtype of `rows`. Rows that no rank sends are zero.
    """
    device = rows.device
    outgoing = rows.index_select(0, to_device(route.send_rows, device))
    arriving = cast(Tensor, _AllToAll.apply(outgoing, route.send_counts.tolist(), route.recv_counts.tolist(), group))
    result = rows.new_zeros(route.num_out, *rows.shape[1:])
    return result.index_copy(0, to_device(route.recv_rows, device), arriving)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = (send, receive), group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.counts
        return _all_to_all(grads[0], receive, send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    arriving = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arriving, rows.contiguous(), receive, send, group=group)
    return arriving


@dataclass(frozen=True)
class Parcels:
    """One rank's part of an exchange of whole sequences."""

    send_to: tuple[int, ...]
    """The destination rank of each of this rank's sequences."""
    recv_from: tuple[int, ...]
    """The source rank of each received sequence."""
    recv_lengths: tuple[int, ...]
    """The number of rows of each received sequence."""
    spans: tuple[range, ...]
    """The index ranges that divide the received sequences into pieces. A sequence that stays on its rank is a separate
    piece."""


def deliver(
    sequences: Sequence[Tensor],
    parcels: Parcels,
    anchor: Tensor,
    group: dist.ProcessGroup,
    before_backward: Callable[[], None] | None = None,
) -> tuple[Tensor, ...]:
    """Move whole sequences between ranks. In the backward pass, gradients are sent in the opposite direction.

    Collective: every rank of `group` must call it.

    Sender and receiver must list the sequences between them in the same order. A sequence that stays on its rank is not
    copied.

    Args:
        sequences: This rank's sequences, each [rows, …] and contiguous.
        parcels: The destinations of the sequences, and the sequences to receive.
        anchor: A tensor [0, …] in the dtype and on the device of the sequences. If the sequences of any rank require a
            gradient, the anchors of all ranks must require one, because every rank sends gradients to others.
        group: The ranks.
        before_backward: A function that the backward pass calls once, before it sends gradients.

    Returns:
        The pieces, followed by a tensor [0, …] through which this rank takes part in the backward pass.
    """
    return cast(tuple[Tensor, ...], _Deliver.apply(parcels, group, before_backward, anchor, *sequences))


class _Deliver(torch.autograd.Function):
    """One autograd node for all sequences. The backward pass continues past it only when all gradients have arrived."""

    @staticmethod
    def forward(
        ctx: Any,
        parcels: Parcels,
        group: dist.ProcessGroup,
        before_backward: Callable[[], None] | None,
        anchor: Tensor,
        *sequences: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.parcels, ctx.group, ctx.before_backward = parcels, group, before_backward
        ctx.lengths, ctx.like = [len(s) for s in sequences], anchor.detach()
        arriving = _carry(sequences, parcels.send_to, parcels.recv_from, parcels.recv_lengths, anchor, group)
        rank = dist.get_rank(group)
        kept = iter([s.view_as(s) for s, to in zip(sequences, parcels.send_to, strict=True) if to == rank])
        pieces, start = [], 0
        for span in parcels.spans:
            if parcels.recv_from[span.start] == rank:
                pieces.append(next(kept))
            else:
                end = start + sum(parcels.recv_lengths[span.start : span.stop])
                pieces.append(arriving[start:end])
                start = end
        return (*pieces, anchor.view_as(anchor))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.before_backward is not None:
            ctx.before_backward()
        parcels, rank = ctx.parcels, dist.get_rank(ctx.group)
        returning = []
        for span, grad in zip(parcels.spans, grads, strict=False):  # The last gradient belongs to the anchor.
            returning += grad.split(list(parcels.recv_lengths[span.start : span.stop]))
        arriving = _carry(returning, parcels.recv_from, parcels.send_to, ctx.lengths, ctx.like, ctx.group)
        kept = iter([g for g, to in zip(returning, parcels.recv_from, strict=True) if to == rank])
        found, start = [], 0
        for source, length in zip(parcels.send_to, ctx.lengths, strict=True):
            if source == rank:
                found.append(next(kept))
            else:
                found.append(arriving[start : start + length])
                start += length
        return None, None, None, grads[-1], *found


def _carry(
    sequences: Sequence[Tensor],
    send_to: Sequence[int],
    recv_from: Sequence[int],
    recv_lengths: Sequence[int],
    like: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """Send sequences to other ranks, and return the concatenation of the sequences received from them.

    Collective: every rank of `group` must call it.
    """
    rank = dist.get_rank(group)
    coming = [(source, n) for source, n in zip(recv_from, recv_lengths, strict=True) if source != rank]
    arriving = like.new_empty(sum(n for _, n in coming), *like.shape[1:])
    places = arriving.split([n for _, n in coming]) if coming else ()
    moves = [
        dist.P2POp(dist.isend, sequence.contiguous(), group=group, group_peer=to)
        for sequence, to in zip(sequences, send_to, strict=True)
        if to != rank
    ]
    moves += [
        dist.P2POp(dist.irecv, place, group=group, group_peer=source)
        for place, (source, _) in zip(places, coming, strict=True)
    ]
    for work in dist.batch_isend_irecv(moves) if moves else ():
        work.wait()
    return arriving


FIRST = 64
"""The default number of integers that are gathered together with the length of an array."""


def gather_ragged(
    values: np.ndarray, group: dist.ProcessGroup | None, first: int = FIRST
) -> tuple[np.ndarray, np.ndarray]:
    """Gather a 1-D int64 array from each rank, in the order of the ranks. Plans are computed from these arrays.

    Collective: every rank of `group` must call it.

    Args:
        values: This rank's array.
        group: The ranks; None for the world.
        first: The number of integers that are gathered together with the length of the array. It must be the same on
            all ranks. If an array is longer, a second collective gathers the rest.

    Returns:
        The arrays as the rows of a matrix, which are padded with zeros to at least the longest length, and the lengths
        of the arrays, [ranks].
    """
    begun = gather_padded(np.array([len(values), *values[:first]]), 1 + first, group)
    sizes, found = begun[:, 0], begun[:, 1:]
    if sizes.max() > first:
        rest = gather_padded(values[first:], int(sizes.max()) - first, group)
        found = np.concatenate([found, rest], axis=1)
    return found, sizes


def gather_padded(values: np.ndarray, width: int, group: dist.ProcessGroup | None) -> np.ndarray:
    """Gather the values of all ranks, padded with zeros to [width], as one array [world, width].

    Collective: every rank of `group` must call it.
    """
    mine = np.zeros(width, dtype=np.int64)
    mine[: len(values)] = values
    return all_gather_numbers(mine, group)


def take_spans(rows: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the concatenation of one span of each row of a matrix.

    Args:
        rows: The matrix [number of rows, width].
        first: The first column of each span, [number of rows].
        counts: The number of columns of each span, [number of rows].
    """
    if (first == first[0]).all() and (counts == counts[0]).all():
        return rows[:, first[0] : first[0] + counts[0]].ravel()
    return rows.ravel()[rows_of_spans(np.arange(len(rows)) * rows.shape[1] + first, counts)]


def gather_distinct(texts: Sequence[str], group: dist.ProcessGroup) -> list[list[str]]:
    """Return the distinct lists `texts` of all ranks, ordered by the first rank that has each list.

    Collective: every rank of `group` must call it.

    Only digests are gathered from all ranks, and each distinct list is sent once. The cost therefore does not grow with
    the number of ranks that have the same list.
    """
    payload = json.dumps(list(texts)).encode()
    digest = np.frombuffer(hashlib.sha256(payload).digest(), dtype=np.int64)
    everyone = all_gather_numbers(digest, group)
    firsts = sorted({row.tobytes(): rank for rank, row in reversed(list(enumerate(everyone)))}.values())
    return [json.loads(broadcast_bytes(payload, first, group)) for first in firsts]


def check_same_plan(what: str, plan: Sequence[Ints], group: dist.ProcessGroup) -> None:
    """Check that all ranks computed the same plan. With different plans, an exchange would hang.

    Collective: every rank of `group` must call it.

    Args:
        what: The name of the plan, for the message.
        plan: The arrays of the plan.
        group: The ranks that computed the plan.

    Raises:
        RuntimeError: If the plan of any rank differs from that of rank 0. All ranks raise it, and the message lists the
            ranks that differ.
    """
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in plan)).digest()
    digests = all_gather_numbers(np.array([int.from_bytes(digest[:7], "little")]), group)[:, 0]
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise RuntimeError(
            f"{what}: the plans of ranks {others} differ from that of rank 0, so their input or topology differs, too"
        )
