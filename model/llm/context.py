"""Context parallelism: which rows of a pack each rank holds, and attention to the keys of other ranks.

A *pack* is a packed sequence (`model.llm.packing`). A pack of T rows is cut into 2·N equal chunks for N ranks. Rank i
holds the chunks i and 2·N - 1 - i, in this order. Under a causal mask, late rows attend to more keys than early rows.
This division nevertheless gives all ranks the same work (arXiv 2407.21783, section 3.3.2). As in that paper, keys and
values are gathered from all ranks.

Shapes: T rows of a whole pack, t = T/N rows of a rank, H query heads and G key-value heads of a rank, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from model.llm.scores import attend

BLOCK_ROWS = 256
"""The number of queries in a block. The scores of only one block are in memory at the same time."""


class ContextPart(NamedTuple):
    """The part of every pack that one rank holds."""

    rank: int = 0
    """The index of this rank among the context-parallel ranks."""
    size: int = 1
    """The number of context-parallel ranks, N."""

    def chunks(self, num_rows: int) -> tuple[range, ...]:
        """Return the rows of a pack that this rank holds, as ranges in the order in which the rank stores them.

        Args:
            num_rows: The number of rows of the pack, a multiple of 2·N if N > 1.
        """
        if self.size == 1:
            return (range(num_rows),)
        length, rest = divmod(num_rows, 2 * self.size)
        assert rest == 0, (num_rows, self.size)
        return tuple(range(n * length, (n + 1) * length) for n in (self.rank, 2 * self.size - 1 - self.rank))

    def rows(self, num_rows: int) -> NDArray[np.int64]:
        """Return the rows of a pack that this rank holds, [t]; see `chunks`."""
        return np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in self.chunks(num_rows)])


class Piece(NamedTuple):
    """The rows of one segment within one chunk."""

    start: int
    """The position of the first row in its segment."""
    length: int
    """The number of rows."""
    first_key: int
    """The row of the whole pack at which the segment begins."""


def pieces(lengths: tuple[int, ...], part: ContextPart) -> list[Piece]:
    """Return the pieces of a rank in order, given the lengths of the segments of a whole pack."""
    ends = np.cumsum(lengths)
    found = []
    for chunk in part.chunks(int(ends[-1])):
        for i in range(int(np.searchsorted(ends, chunk.start, side="right")), len(lengths)):
            first = int(ends[i]) - lengths[i]
            low, high = max(first, chunk.start), min(int(ends[i]), chunk.stop)
            if low >= high:
                break
            found.append(Piece(low - first, high - low, first))
    return found


def crosses_chunks(lengths: tuple[int, ...], part: ContextPart) -> bool:
    """Return whether any segment of a pack has rows in more than one chunk. Keys must be gathered in this case."""
    ends = np.cumsum(lengths)
    edges = np.arange(1, 2 * part.size) * (int(ends[-1]) // (2 * part.size))
    return part.size > 1 and not bool(np.isin(edges, ends).all())


class Continued(NamedTuple):
    """A piece that continues a segment from an earlier chunk."""

    row: int
    """The first row of the piece among this rank's rows."""
    piece: Piece
    """The piece."""


class ContinuedAttention(torch.autograd.Function):
    """The attention of a rank's continued pieces to the keys of their segments, which are distributed over all ranks.

    Only this rank's queries, keys and values are saved for the backward pass. The backward pass gathers the keys again,
    and recomputes the scores one block of queries at a time. Gradients of keys are added up in fp32.

    Collective: every rank of the context-parallel group must call it, in both passes, even if it has no continued
        piece.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        continued: tuple[Continued, ...],
        window: int | None,
        scale: float | None,
        cap: float | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Return the result [n, H, D] for the n rows of `continued`, in order.

        Args:
            ctx: See `torch.autograd.Function`.
            query: [t, H, D], rotated; wider if every head has a sink (`model.llm.scores`).
            key: [t, G, D], rotated.
            value: [t, G, D].
            continued: The pieces.
            window: The number of keys to which a query attends, including its own; None for all.
            scale: The factor on scores; None for 1/√D.
            cap: The bound of scores; None for no bound.
            group: The context-parallel group.
        """
        ctx.save_for_backward(query, key, value)
        ctx.rest = continued, window, scale, cap, group
        keys, values = _gather(key, value, group)
        found = [query[:0, :, : value.shape[-1]]]  # The result has no channel for a sink.
        for rows, span, mask in _blocks(continued, window, query.device):
            found.append(_attend(query[rows], keys[span], values[span], mask, scale, cap))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Return the gradients of `query`, `key` and `value`."""
        query, key, value = ctx.saved_tensors
        continued, window, scale, cap, group = ctx.rest
        keys, values = _gather(key, value, group)
        grad_query = torch.zeros_like(query)
        grad_keys, grad_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        done = 0
        for rows, span, mask in _blocks(continued, window, query.device):
            q, k, v = (x.detach().requires_grad_() for x in (query[rows], keys[span], values[span]))
            with torch.enable_grad():
                attended = _attend(q, k, v, mask, scale, cap)
            found = torch.autograd.grad(attended, (q, k, v), grads[0][done : done + len(q)])
            done += len(q)
            grad_query[rows] = found[0]
            grad_keys[span] += found[1]
            grad_values[span] += found[2]
        own = _scatter(grad_keys, grad_values, group)
        return grad_query, own[0].to(key.dtype), own[1].to(value.dtype), None, None, None, None, None


def _blocks(
    continued: tuple[Continued, ...], window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows of each block of queries, the rows of the block's keys in the whole pack, and the mask [L, K]."""
    for row, piece in continued:
        for first in range(0, piece.length, BLOCK_ROWS):
            count = min(BLOCK_ROWS, piece.length - first)
            position = piece.start + first
            oldest = 0 if window is None else max(0, position - window + 1)
            span = slice(piece.first_key + oldest, piece.first_key + position + count)
            queries = torch.arange(position, position + count, device=device)[:, None]
            positions = torch.arange(oldest, position + count, device=device)
            mask = positions <= queries
            if window is not None:
                mask &= positions > queries - window
            yield slice(row + first, row + first + count), span, mask


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, cap: float | None) -> Tensor:
    """Return the attention [L, H, D] of queries [L, H, D] to keys and values [K, G, D] under a mask [L, K].

    The query heads that share a key head form a batch, so keys are not copied for each query head.
    """
    copies = query.shape[1] // key.shape[1]
    by_group = query.unflatten(1, (-1, copies)).permute(2, 1, 0, 3)
    key, value = (x.transpose(0, 1)[None].expand(copies, -1, -1, -1) for x in (key, value))
    found = attend(by_group, key, value, mask, scale, cap)
    return found.permute(2, 1, 0, 3).flatten(1, 2)


def _gather(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the keys and the values [T, G, D] of all rows of the pack, in the order of the pack."""
    own = torch.stack((key, value))
    everyone = own.new_empty(group.size(), *own.shape)
    dist.all_gather_into_tensor(everyone.view(-1), own.view(-1), group=group)
    # [N, 2, 2 chunks, rows of a chunk, G, D]
    halves = everyone.unflatten(2, (2, -1))
    both = torch.cat((halves[:, :, 0], halves[:, :, 1].flip(0))).transpose(0, 1).flatten(1, 2)
    return both[0], both[1]


def _scatter(keys: Tensor, values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows [2, t, G, D] of the sums of `keys` and `values` [T, G, D] over all ranks."""
    chunks = torch.stack((keys, values)).unflatten(1, (2 * group.size(), -1))
    early, late = chunks.transpose(0, 1).chunk(2)
    by_rank = torch.stack((early, late.flip(0)), dim=2).flatten(2, 3).contiguous()
    own = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(own.view(-1), by_rank.view(-1), group=group)
    return own
