"""The exchange: one differentiable ragged all-to-all that carries out a plan. Nothing else moves samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.plan import Ints, Route


def exchange(rows: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """Move `rows` [N, …] as `route` says; gradients travel the same way back.

    Every rank of `group` must call it, also with nothing to send. A row may be sent to several ranks: its gradient is
    the sum of theirs. Rows of the result that nobody sends are zero.

    Returns:
        [route.num_out, …] in the dtype of `rows`.
    """
    device = rows.device
    outgoing = rows.index_select(0, torch.from_numpy(route.send_rows).to(device))
    arriving = all_to_all(outgoing, route.send_counts, route.recv_counts, group)
    result = rows.new_zeros(route.num_out, *rows.shape[1:])
    return result.index_copy(0, torch.from_numpy(route.recv_rows).to(device), arriving)


def all_to_all(rows: Tensor, send: Ints, receive: Ints, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [Σ send, …], by destination, become rows [Σ receive, …], by source; gradients travel the same way back.

    Every rank of `group` must call it, and where any rank's `rows` require a gradient, all ranks' must.
    """
    return cast(Tensor, _AllToAll.apply(rows, send.tolist(), receive.tolist(), group))


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
