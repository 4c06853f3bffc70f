"""Attention of encoders on CPUs in bf16, computed in fp32.

The backward pass of PyTorch's kernel for CPUs takes about four times as long in bf16 as in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute what transformers' function `sdpa` computes, with the same arguments."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    attended, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return attended.to(dtype), weights


def use_fp32_attention() -> None:
    """Make all models of transformers in this process use `attend`."""
    AttentionInterface.register("sdpa", attend)
