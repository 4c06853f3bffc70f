"""Attention in PyTorch with the attention sinks and the bounded scores of some LLMs.

An *attention sink* is a learned score per head that takes part in the softmax of every query, but has no value
(GPT-OSS, arXiv 2508.10925). It is computed as an additional key with a value of zero, so that any kernel for attention
can be used. In an additional channel, a query has the sink's score of its head, a key has zero, and the key of the sink
has one. The key of the sink is zero in all other channels. The gradient of a sink is a part of the query's gradient.

A bound c turns a score s into c · tanh(s / c) (Gemma 2, arXiv 2408.00118). No kernel of PyTorch does this, so the
scores of a block of queries are stored, and computed again in the backward pass.

Shapes: H query heads, L queries, K keys, D head width, W the width of a query with its additional channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.llm.features import SINK_CHANNELS
from model.precision import for_cpu_attention

BOUNDED_ROWS = 256
"""The number of queries in a block whose bounded scores are stored at the same time."""


def widen_queries(query: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Return queries [..., H, W] for which `attend` adds a sink.

    Args:
        query: [..., H, D].
        sinks: The scores of the sinks, [H].
        scale: The factor on scores, by which the scores of the sinks have already been multiplied.
    """
    score = (sinks / scale).to(query.dtype)[:, None].expand(*query.shape[:-1], 1)
    return functional.pad(torch.cat((query, score), dim=-1), (0, SINK_CHANNELS - 1))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, cap: float | None = None
) -> Tensor:
    """Compute attention, with a sink if queries are wider than keys.

    Args:
        query: [..., H, L, D], or [..., H, L, W] of `widen_queries`.
        key: [..., G, K, D], where G divides H; with a mask, G must be H.
        value: [..., G, K, D].
        mask: True where a query attends to a key; it can be broadcast to [..., H, L, K]. None for causal attention of L
            = K rows.
        scale: The factor on scores; None for 1/√D, which is not allowed with sinks.
        cap: The bound of scores; None for no bound. It excludes sinks.

    Returns:
        [..., H, L, D].
    """
    width, head_width = query.shape[-1], key.shape[-1]
    if cap is not None:
        assert width == head_width
        return _attend_bounded(query, key, value, mask, head_width**-0.5 if scale is None else scale, cap)
    is_causal = mask is None
    if width > head_width:
        assert scale is not None
        key, value = _add_sink(key, value, width)
        if mask is None:
            # The queries also get a row in front, so that the sink is a previous token of every query.
            query = functional.pad(query, (0, 0, 1, 0))
        else:
            mask = functional.pad(mask, (1, 0), value=True)
    dtype = query.dtype
    query, key, value = for_cpu_attention(query, key, value)
    found = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_causal
    ).to(dtype)
    if width > head_width:
        found = found[..., 1:, :head_width] if is_causal else found[..., :head_width]
    return found


def _add_sink(key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [..., 1 + K, W] that begin with a sink.

    Args:
        key: [..., K, D].
        value: [..., K, D].
        width: The width W of a query with its additional channels.
    """
    head_width = key.shape[-1]
    keys, values = (functional.pad(x, (0, width - head_width, 1, 0)) for x in (key, value))
    keys[..., 0, head_width] = 1.0
    return keys, values


def _attend_bounded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Compute attention with bounded scores, block by block; see `attend`."""
    rows, copies = query.shape[-2], query.shape[-3] // key.shape[-3]
    if mask is None:
        mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=-3) for x in (key, value))
    mask = mask.expand(*mask.shape[:-2], rows, mask.shape[-1])
    found = []
    for first in range(0, rows, BOUNDED_ROWS):
        block = slice(first, first + BOUNDED_ROWS)
        bounded = partial(_bounded, mask=mask[..., block, :], scale=scale, cap=cap)
        found.append(
            checkpoint(bounded, query[..., block, :], key, value, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(found, dim=-2)


def _bounded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / cap)) * cap
    probs = scores.float().masked_fill(~mask, -torch.inf).softmax(-1)
    return probs.to(value.dtype) @ value
