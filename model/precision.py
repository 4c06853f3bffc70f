"""Casts between single and half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and persistent buffers to a floating-point type, as `nn.Module.to` does.

    Non-persistent buffers keep their type, as when transformers loads a model in `dtype`. They are computed
    from the config, and some need full precision. In bf16, for example, the errors of rotary embeddings would grow with
    the position.
    """
    kept = [
        (child, name, buffer)
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name in child._non_persistent_buffers_set
    ]
    module.to(dtype)
    for child, name, buffer in kept:
        child._buffers[name] = buffer


def for_cpu_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of attention in the dtype in which attention is computed. On CPUs, this is fp32 instead of
    bf16.

    The backward pass of PyTorch's kernel for CPUs takes about four times as long in bf16 as in fp32.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return query.float(), key.float(), value.float()
    return query, key, value
