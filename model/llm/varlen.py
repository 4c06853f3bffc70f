"""Causal attention within the segments of a pack without padding, by PyTorch's kernel for sequences of unequal length.

`torch.nn.attention.varlen` (PyTorch 2.10) calls FlashAttention (arXiv 2307.08691). It needs a GPU of compute capability
8.0 or higher, half precision and heads of at most 256 channels. Its gradients may differ between runs.

Shapes: t rows of a pack, H query heads and G key-value heads of this rank, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from model.llm.packing import PackedSequences

Varlen = Callable[..., Tensor]

_PARAMETERS = frozenset({"scale", "window_size", "enable_gqa"})
_LEAST_CAPABILITY, _MOST_CHANNELS, _CHANNEL_MULTIPLE = (8, 0), 256, 8


def varlen_attention(dtype: torch.dtype, head_width: int) -> Varlen | None:
    """Return `torch.nn.attention.varlen.varlen_attn`, or None if it cannot compute attention on the current device.

    Args:
        dtype: The dtype of queries, keys and values.
        head_width: The number D of channels of a head.
    """
    if dtype not in (torch.bfloat16, torch.float16) or head_width > _MOST_CHANNELS or head_width % _CHANNEL_MULTIPLE:
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return None
    return _known()


def _known() -> Varlen | None:
    """Return the function of the installed PyTorch; None if it lacks the function or an argument."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found = cast(Varlen, varlen_attn)  # It returns a pair if it is called with `return_aux`.
    return found if inspect.signature(found).parameters.keys() >= _PARAMETERS else None


def attend_without_padding(
    kernel: Varlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSequences,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Compute the attention of every row to itself and to previous rows of its segment.

    Args:
        kernel: The result of `varlen_attention`.
        query: [t, H, D].
        key: [t, G, D], where G divides H.
        value: [t, G, D].
        packed: The pack.
        window: The number of rows to which a row attends, including itself; None for all.
        scale: The factor on scores; None for 1/√D.

    Returns:
        [t, H, D].
    """
    ends, longest = packed.segment_ends(query.device), max(packed.lengths)
    return kernel(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # the numbers of other rows before and after a row
        enable_gqa=query.shape[1] != key.shape[1],
    )
