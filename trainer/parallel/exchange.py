"""The exchange: one differentiable ragged all-to-all that carries out a plan. Nothing else moves samples.

Rows (`exchange`) are put in the order of sending and travel by one collective. Whole sequences (`deliver`) travel from
where they lie, as the messages that such a collective consists of: ordering them would copy each once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.transfer import to_device
from trainer.parallel.plan import Ints, Route


def exchange(rows: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """Move `rows` [N, …] as `route` says; gradients travel the same way back.

    Every rank of `group` must call it, also with nothing to send, and where any rank's `rows` require a gradient, all
    ranks' must. A row may be sent to several ranks: its gradient is
    the sum of theirs. Rows of the result that nobody sends are zero.

    Returns:
        [route.num_out, …] in the dtype of `rows`.
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
    """One rank's part of a movement of whole sequences between ranks."""

    send_to: tuple[int, ...]
    """Rank that each own sequence goes to."""
    recv_from: tuple[int, ...]
    """Rank that each sequence afterwards comes from."""
    recv_lengths: tuple[int, ...]
    """Rows of these."""
    spans: tuple[range, ...]
    """The sequences afterwards, cut into pieces, in order; one that stays on its rank is a piece of its own."""


def deliver(
    sequences: Sequence[Tensor],
    parcels: Parcels,
    anchor: Tensor,
    group: dist.ProcessGroup,
    before_backward: Callable[[], None] | None = None,
) -> tuple[Tensor, ...]:
    """Move whole sequences between ranks, each straight from where it lies; gradients travel the same way back.

    Between two ranks they keep their order, which both must list alike. One that stays is not copied.

    Args:
        sequences: own ones, each [rows, …] and contiguous.
        parcels: where they go, and what comes.
        anchor: [0, …], in the dtype and on the device of the sequences. Where any rank's sequences require a gradient,
            all ranks' anchors must: a rank whose own do not still sends gradients to others.
        group: all ranks.
        before_backward: called once, before gradients travel and before those of any sequence are computed.

    Returns:
        The pieces, and [0, …], which ties this rank into the backward pass.
    """
    return cast(tuple[Tensor, ...], _Deliver.apply(parcels, group, before_backward, anchor, *sequences))


class _Deliver(torch.autograd.Function):
    """All gradients arrive at this one node: nothing of what made the sequences runs backward before they travelled."""

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
        for span, grad in zip(parcels.spans, grads, strict=False):  # the last gradient is the anchor's
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
    """What comes from other ranks, end to end."""
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


_FIRST = 64
"""Integers of every rank that travel with their number; only more than these take a second gathering."""


def gather_ragged(values: np.ndarray, group: dist.ProcessGroup | None) -> list[np.ndarray]:
    """Every rank's 1-D int64 array, by rank: the few integers that plans are made of."""
    begun = _gather(np.array([len(values), *values[:_FIRST]]), 1 + _FIRST, group)
    sizes, found = begun[:, 0], begun[:, 1:]
    if sizes.max() > _FIRST:
        rest = _gather(values[_FIRST:], int(sizes.max()) - _FIRST, group)
        found = np.concatenate([found, rest], axis=1)
    return [row[:n] for row, n in zip(found, sizes, strict=True)]


def _gather(values: np.ndarray, width: int, group: dist.ProcessGroup | None) -> np.ndarray:
    """[world, width] every rank's values, filled up with zeros."""
    world = dist.get_world_size(group)
    mine = torch.zeros(width, dtype=torch.int64)
    mine[: len(values)] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    everyone = torch.empty(world * width, dtype=torch.int64)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.view(world, width).numpy()


def check_same_plan(what: str, plan: Sequence[Ints], group: dist.ProcessGroup) -> None:
    """Raise on every rank, naming those that differ from rank 0, instead of hanging in an exchange.

    Args:
        what: name of the plan, for the message.
        plan: its arrays.
        group: all ranks that planned.
    """
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in plan)).digest()
    digests = [int(d[0]) for d in gather_ragged(np.array([int.from_bytes(digest[:7], "little")]), group)]
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise RuntimeError(f"{what}: ranks {others} planned otherwise than rank 0: their input or topology differs")
